"""Every combination that is not refused is the loop in float64; what is refused, is so for the reason that is declared."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fsdp_train.config import parse_config
from fsdp_train.main import fine_tune
from llama.errors import InputError
from tests.combinations.__main__ import described, fast_cases, results
from tests.combinations.array import CORE, NEEDS_A_GPU, REFUSALS, SETTINGS, Refusal, all_rows, allows, here
from tests.combinations.case import TOKENIZER, Case
from tests.combinations.covering import Row, parts, parts_of
from tests.combinations.verdict import Verdict
from tests.launch import spawn

NAMES = [case.name for case in fast_cases(Path())]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, Verdict]]:
    """All cases are run together, which shares processes and what training starts from."""
    work = tmp_path_factory.mktemp("array")
    return {case.name: (case, verdict) for case, verdict in results(fast_cases(work), work)}


@pytest.mark.parametrize("name", NAMES)
def test_the_program_is_the_loop_in_float64(name: str, verdicts: dict[str, tuple[Case, Verdict]]) -> None:
    case, verdict = verdicts[name]
    assert verdict.equal, f"{described(case.row)}: {verdict}"


def test_every_pair_and_core_triple_stands_in_a_row_or_is_refused() -> None:
    rows, impossible = all_rows()
    assert all(allows(row) for row in rows)
    held = {part for row in rows for part in parts_of(row, CORE)}
    for part in set(parts(here(), CORE)) - held:
        assert part in impossible
        row = dict(part)
        others = [(name, values) for name, values in here().items() if name not in row]
        beside_none = any(not any(allows({**row, name: value}) for value in values) for name, values in others)
        assert not allows(row) or beside_none


def examples(refusal: Refusal) -> list[Row]:
    """Every pair of values that it is about, with what has to stand beside it."""
    (one, values), (other, others) = refusal.one, refusal.other
    return [{**dict(refusal.beside), one: a, other: b} for a in values for b in others]


def refused(rank: int, commands: Sequence[list[str]]) -> list[str]:
    """What the program says to each, in a group of processes that none of them opens."""
    found = []
    for flags in commands:
        try:
            fine_tune(parse_config(flags))
            found.append("")
        except InputError as error:
            found.append(str(error))
    return found


def command(row: Row, model: Path, adapter: Path, out: Path) -> list[str]:
    flags = [flag for name, value in row.items() for flag in SETTINGS[name][value]]
    flags += ["--finetune.from_adapter", str(adapter)] if row.get("from_adapter") == "yes" else []
    flags += ["--data.eval_path", "nowhere.jsonl"] if "evaluation" in row else []
    return [*flags, "--model.path", str(model), "--data.path", "nowhere.jsonl", "--train.output_dir", str(out)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_what_is_refused_is_refused_before_anything_is_read(processes: int, tmp_path: Path) -> None:
    """Neither the base nor the data exist, so that whatever looked for them would say so."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5}))
    cases = [(row, refusal) for refusal in REFUSALS if not refusal.of_the_base for row in examples(refusal)]
    cases = [(row, refusal) for row, refusal in cases if int(row.get("processes", "1")) == processes]
    assert cases
    commands = [command(row, tmp_path / "nowhere", adapter, tmp_path / "out") for row, _ in cases]
    said = spawn(processes, refused, commands, tmp_path=tmp_path)
    for rank in range(processes):
        for (row, refusal), error in zip(cases, said[rank], strict=True):
            assert re.search(refusal.reason, error), f"{row}: {error}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("refusal", [refusal for refusal in REFUSALS if refusal.of_the_base], ids=lambda r: r.reason)
def test_what_the_base_does_not_have_is_refused_before_it_is_filled(refusal: Refusal, tmp_path: Path) -> None:
    data = TOKENIZER.parent / "labels_train.jsonl"
    for row in examples(refusal):
        flags = [*command(row, TOKENIZER, tmp_path, tmp_path / "out"), "--data.path", str(data)]
        with pytest.raises(InputError, match=refusal.reason):
            fine_tune(parse_config(flags))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("setting", "value", "reason"), NEEDS_A_GPU)
def test_what_needs_a_gpu_is_refused_without_one(setting: str, value: str, reason: str, tmp_path: Path) -> None:
    row = {setting: value, "strategy": "fsdp"}
    with pytest.raises(InputError, match=reason):
        fine_tune(parse_config(command(row, tmp_path, tmp_path, tmp_path / "out")))
