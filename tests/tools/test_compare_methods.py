"""The comparison of methods: a short run of everything, and what it writes."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from tools import compare_methods


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[compare_methods.Row]:
    """One task, three steps of each method."""
    patch = pytest.MonkeyPatch()
    patch.setattr(compare_methods, "TASKS", ("sentences",))
    output = tmp_path_factory.mktemp("compared") / "out"
    made: list[compare_methods.Row] = []
    compare = compare_methods.compare
    patch.setattr(compare_methods, "compare", lambda *given: made.extend(compare(*given)) or made)
    compare_methods.main(["--output", str(output), "--max-steps", "3"])
    patch.undo()
    with (output / "comparison.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == list(compare_methods.METHODS)
    assert [float(row["corpus_loss_after"]) for row in written] == [row.corpus_loss_after for row in made]
    assert (output / "comparison.png").stat().st_size > 10_000
    return made


def test_adapters_are_small_and_can_be_switched_off(rows: list[compare_methods.Row]) -> None:
    full = next(row for row in rows if row.method == "full")
    for row in rows:
        assert row.switched_off == ("-" if row is full else "bit-equal")
        assert row.corpus_loss_before == full.corpus_loss_before
        if row is not full:
            assert 20 * row.trained_parameters < full.trained_parameters
            assert 20 * row.artefact_megabytes < 4e-6 * full.trained_parameters
    counts = {row.method: row.trained_parameters for row in rows}
    assert counts == {"lora": 14_336, "llama_adapter": 4 * (60 * 128 + 4), "prefix": 30 * 2 * 4 * 64, "full": 922_752}


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
