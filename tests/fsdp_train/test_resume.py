"""A run that goes on with another strategy, or on another number of processes, is the same run: within 1e-6 per step of one
process that was never interrupted, and to the last bit where nothing changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fsdp_train.curves import run_on

STEPS, CUT, BATCH = 5, 2, 4  # 2.5 steps per epoch: the cut is in the middle of one
SAME = 1e-6  # per step and element, fp32: other orders of summation
FORMS = {
    "none": (),
    "ddp": ("--parallel.strategy", "ddp"),
    "fsdp": ("--parallel.strategy", "fsdp"),
    "grad": ("--parallel.strategy", "fsdp", "--parallel.sharding", "shard_grad_op"),
    "whole": ("--parallel.strategy", "fsdp", "--parallel.sharding", "no_shard"),
    "fsdp2": ("--parallel.strategy", "fsdp2"),
    "hsdp": ("--parallel.strategy", "hsdp", "--parallel.replicas", 2),
    "mesh": ("--parallel.strategy", "fsdp2", "--parallel.replicas", 2),
}
WRITERS = {1: ("none", "fsdp"), 2: ("ddp", "fsdp", "grad", "whole", "fsdp2"), 4: ("fsdp", "fsdp2", "hsdp", "mesh")}
# Who goes on with what whom wrote: every form reads and is read, across 1, 2 and 4 processes.
PAIRS = {
    1: {"none": ["1none", "2fsdp", "4hsdp"], "fsdp": ["2fsdp2"]},
    2: {"fsdp": ["2fsdp", "1none", "2ddp"], "ddp": ["2ddp", "4mesh"], "fsdp2": ["2fsdp2", "4fsdp"], "grad": ["2whole"],
        "whole": ["2grad"]},
    4: {"fsdp": ["2fsdp2"], "hsdp": ["4hsdp", "1none"], "fsdp2": ["2fsdp"], "mesh": ["4fsdp2"]},
}  # fmt: skip
FEWER = {
    1: {"none": ["2fsdp2"]},
    2: {"fsdp": ["2fsdp", "1none", "4hsdp"], "fsdp2": ["2fsdp"], "ddp": ["4hsdp"]},
    4: {"hsdp": ["2ddp"]},
}
METHODS = {
    "full": ("--finetune.method", "full", "--optim.lr", 1e-4),
    "lora": ("--finetune.lora.modules_to_save", "lm_head", "--optim.lr", 1e-4),
}


def flags(model: Path, data: Path, out: Path, processes: int, form: str, method: str, steps: int = STEPS) -> list[str]:
    chosen = [
        *("--model.path", model, "--data.path", data, "--train.output_dir", out, "--train.max_steps", steps),
        *("--train.batch_size", BATCH // processes, "--train.grad_accum", 2, "--parallel.precision", "fp32"),
        *("--checkpoint.every", CUT, "--checkpoint.keep", 9, "--log.every", 1, "--train.samples", 0, "--data.max_length", 200),
        *("--optim.schedule", "constant", *FORMS[form], *METHODS[method]),
    ]
    return list(map(str, chosen))


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows if "loss" in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next(path for path in out.glob("*/*.safetensors")))


@pytest.mark.parametrize("method", METHODS)
def test_any_strategy_goes_on_with_what_any_other_wrote(
    method: str, model_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    pairs = PAIRS if method == "full" else FEWER
    needed = {source for forms in pairs.values() for sources in forms.values() for source in sources} | {"1none"}

    def run(out: str, processes: int, form: str) -> list[str]:
        return flags(model_dir, alpaca_file, tmp_path / out, processes, form, method)

    writers = {n: [form for form in forms if f"{n}{form}" in needed] for n, forms in WRITERS.items()}
    for processes, forms in writers.items():
        run_on(processes, [run(f"{processes}{form}", processes, form) for form in forms], tmp_path / f"w{processes}")
    readers = {
        (processes, form, source): f"{source}-{processes}{form}"
        for processes, forms in pairs.items()
        for form, sources in forms.items()
        for source in sources
    }
    for (_, _, source), out in readers.items():
        kept = tmp_path / out / "checkpoints" / f"step_{CUT:08d}"
        shutil.copytree(tmp_path / source / "checkpoints" / kept.name, kept)
        lines = (tmp_path / source / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / out / "metrics.jsonl").write_text("".join(lines[:CUT]))
    for processes in pairs:
        runs = [run(out, n, form) for (n, form, _), out in readers.items() if n == processes]
        run_on(processes, runs, tmp_path / f"r{processes}")

    wanted, final = losses(tmp_path / "1none"), weights(tmp_path / "1none")
    everyone = [f"{n}{form}" for n, forms in writers.items() for form in forms] + list(readers.values())
    for name in everyone:
        assert max(abs(a - b) for a, b in zip(losses(tmp_path / name), wanted, strict=True)) <= SAME * max(wanted), name
        found = weights(tmp_path / name)
        assert max((found[key] - final[key]).abs().max().item() for key in final) <= SAME, name
    for (processes, form, source), out in readers.items():
        if source == f"{processes}{form}":  # nothing changed: not a bit does
            assert losses(tmp_path / out) == losses(tmp_path / source)
            again, whole = weights(tmp_path / out), weights(tmp_path / source)
            assert all(torch.equal(again[key], whole[key]) for key in whole)
