"""On a GPU, one process: every strategy is the CPU's run in fp32, close to it in bf16 and fp16, offloaded or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fsdp_train.main import main

SAME, ROUNDED = 1e-4, 3e-2  # fp32 with other kernels; bf16 and fp16 have two and three digits
STRATEGIES = ("none", "ddp", "fsdp", "fsdp2")


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["full", "lora", "prefix"])
def test_one_gpu_is_one_cpu(
    method: str, model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, *more: object) -> list[float]:
        flags = [
            *("--model.path", model_dir, "--data.path", alpaca_file, "--train.output_dir", tmp_path / name, "--log.every", 1),
            *("--train.max_steps", 6, "--train.batch_size", 4, "--train.samples", 0, "--optim.lr", 1e-4),
            *("--finetune.method", method, *more),
        ]
        main(list(map(str, flags)))
        return losses(tmp_path / name)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        wanted = run("cpu", "--parallel.precision", "fp32")

    def worst(found: list[float]) -> float:
        return max(abs(a - b) / b for a, b in zip(found, wanted, strict=True))

    for strategy in STRATEGIES:
        for precision, tolerance in (("fp32", SAME), ("bf16", ROUNDED), ("fp16", ROUNDED)):
            chosen = ("--parallel.strategy", strategy, "--parallel.precision", precision)
            found = run(f"{strategy} {precision}", *chosen)
            assert worst(found) <= tolerance, (strategy, precision)
            for kind in ("full", "selective"):
                again = run(f"{strategy} {precision} {kind}", *chosen, "--parallel.activation_checkpointing", kind)
                assert worst(again) <= tolerance, (strategy, precision, kind)
            if strategy in ("fsdp", "fsdp2"):
                offloaded = run(f"{strategy} {precision} offloaded", *chosen, "--parallel.cpu_offload", "true")
                assert worst(offloaded) <= tolerance, (strategy, precision)
