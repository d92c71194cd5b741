"""What the tests of loss curves share: data, the plain loop, and runs of the program with the same settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup

from fsdp_train.config import parse_config
from fsdp_train.main import complete, main
from fsdp_train.run import Run
from fsdp_train.strategy import ParallelConfig
from fsdp_train.world import process_group
from tests.launch import spawn

STEPS, GLOBAL_BATCH = 50, 8
CURVE = 1e-5  # per step, fp32: different kernels and orders of summation


def tokens_file(path: Path, vocab: int) -> list[tuple[list[int], list[int]]]:
    """Ragged samples with masked prompts, in our `tokens` format: two alternating ids, so there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for _ in range(100):  # not a multiple of the batch: an epoch's last step has what is left
        length = int(torch.randint(4, 40, (), generator=generator))
        ids = (torch.randint(3, vocab, (2,), generator=generator).repeat(length)[:length]).tolist()
        masked = int(torch.randint(1, length - 1, (), generator=generator))
        samples.append((ids, [-100] * masked + ids[masked:]))
    path.write_text("".join(json.dumps({"input_ids": i, "labels": l}) + "\n" for i, l in samples))
    return samples


def hf_curve(model: Any, samples: list[tuple[list[int], list[int]]], lr: float) -> list[float]:
    """The plain loop: one padded batch per step, mean loss over its targets."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    losses, epoch_steps = [], -(-len(samples) // GLOBAL_BATCH)
    for step in range(STEPS):
        start = step % epoch_steps * GLOBAL_BATCH
        batch = samples[start : start + GLOBAL_BATCH]
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [0] * (length - len(i)) for i, _ in batch])
        labels = torch.tensor([l + [-100] * (length - len(l)) for _, l in batch])
        mask = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i, _ in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_all(rank: int, runs: list[list[str]]) -> None:
    """Several runs of the program in one group of processes."""
    with process_group(ParallelConfig()) as world:
        for flags in runs:
            complete(Run(parse_config(flags), world))


def run_on(processes: int, runs: list[list[str]], tmp_path: Path) -> None:
    """Several runs of the program: here, or in one group of processes, which share an import of everything."""
    if processes > 1:
        tmp_path.mkdir(exist_ok=True)
        spawn(processes, run_all, runs, tmp_path=tmp_path)
        return
    for flags in runs:
        main(flags)


def flags_of(out: Path, processes: int, lr: float, *more: object) -> list[str]:
    """Settings under which the program does what the plain loop does."""
    common = [
        *("--data.shuffle", "false", "--optim.lr", lr, "--optim.weight_decay", 0.01, "--train.max_steps", STEPS),
        *("--train.batch_size", 4 // processes, "--train.grad_accum", 2, "--parallel.precision", "fp32"),
        *("--train.output_dir", out, "--log.every", 1, "--train.samples", 0, "--checkpoint.every", 0),
    ]
    return [str(word) for word in (*common, *more)]


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
