"""The comparison of methods: a short run of everything, and what it writes."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from tools import compare_methods


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[compare_methods.Row]:
    """One task of each kind, three steps of the methods that differ most."""
    patch = pytest.MonkeyPatch()
    answers, labels = compare_methods.ANSWERS, compare_methods.LABELS
    chosen = {
        "sentences": {name: answers[name] for name in ("lora", "full", "partial, 2 layers by gradient", "head, 64 more")},
        "labels": {name: labels[name] for name in ("head", "lora")},
    }
    patch.setattr(compare_methods, "TASKS", chosen)
    patch.setattr(compare_methods, "CORPUS_DOCUMENTS", 20)
    patch.setattr(compare_methods, "QUESTIONS", 16)
    output = tmp_path_factory.mktemp("compared") / "out"
    made: list[compare_methods.Row] = []
    compare = compare_methods.compare
    patch.setattr(compare_methods, "compare", lambda *given: made.extend(compare(*given)) or made)
    compare_methods.main(["--output", str(output), "--max-steps", "3"])
    patch.undo()
    with (output / "comparison.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == [name for methods in chosen.values() for name in methods]
    assert [row["corpus_loss_after"] for row in written] == [
        "" if row.corpus_loss_after is None else repr(row.corpus_loss_after) for row in made
    ]
    assert (output / "comparison.png").stat().st_size > 10_000
    return made


def test_adapters_are_small_and_can_be_switched_off(rows: list[compare_methods.Row]) -> None:
    full = next(row for row in rows if row.method == "full")
    for row in (row for row in rows if row.task == "sentences"):
        adapter = row.method in compare_methods.ADAPTERS
        assert row.switched_off == ("bit-equal" if adapter else "-")
        assert row.corpus_loss_before == full.corpus_loss_before
        assert row.forgotten is not None
        if adapter:
            assert 20 * row.trained_parameters < full.trained_parameters
            assert 20 * row.artefact_megabytes < 4e-6 * full.trained_parameters


def test_what_trains_is_what_the_method_says(rows: list[compare_methods.Row]) -> None:
    width, vocabulary, layer = 128, 1536, 128 * (2 * 128 + 2 * 64) + 3 * 128 * 344 + 2 * 128
    base = 4 * layer + width + vocabulary * width
    extra = width * 64 + 64  # of the layer that goes in front of the head
    assert {row.method: row.trained_parameters for row in rows if row.task == "sentences"} == {
        "lora": 14_336, "full": base, "partial, 2 layers by gradient": 2 * layer,
        "head, 64 more": vocabulary * width + extra + 64 * width,
    }  # fmt: skip
    assert {row.method: row.trained_parameters for row in rows if row.task == "labels"} == {
        "head": 12 * width, "lora": 14_336 + 12 * width,
    }  # fmt: skip


def test_what_it_says(rows: list[compare_methods.Row]) -> None:
    table = compare_methods.table(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1


def test_without_matplotlib_it_says_what_is_missing(
    rows: list[compare_methods.Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not compare_methods.plot(rows, tmp_path / "x.png")
    assert '[ui]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_it_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(SystemExit):
        compare_methods.main(["--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
