"""The training loop, and the loss on held-out data."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn

from fsdp_train.data import Dataset
from fsdp_train.host import undisturbed
from fsdp_train.log import Metrics, Progress, peak_memory
from fsdp_train.optim import LossScaler, Optimizer
from fsdp_train.order import Plan
from fsdp_train.settings import option
from fsdp_train.signals import Signals, Stopped
from fsdp_train.step import NonFiniteError, Pending, StepResult, begin_step
from fsdp_train.world import World
from llama.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and where to."""

    max_steps: int | None = option(None, "optimizer steps; the data is repeated as needed")
    epochs: int | None = option(None, "passes over the data instead of max_steps (default: 1)")
    batch_size: int = option(4, "samples per process and micro-batch")
    grad_accum: int = option(1, "micro-batches per optimizer step")
    seed: int = option(0, "of the adapter's start, the data's order and dropout")
    output_dir: str = option("", "where everything goes (default: a new directory below runs/)", "DIR")
    max_shard_gb: float = option(5.0, "largest weight file of the model that is saved, GB")
    eval_every: int = option(0, "steps between evaluations on held-out data (0: before and after only)")
    samples: int = option(2, "held-out prompts answered before and after, for you to read (0: none)")
    sample_tokens: int = option(48, "longest answer to them, tokens")
    exact_match: int = option(0, "held-out prompts answered before and after and compared with the reference (0: none)")

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise InputError("--train.max_steps and --train.epochs are given both; choose one")
        least = {"max_steps": 1, "epochs": 1, "batch_size": 1, "grad_accum": 1, "seed": 0, "sample_tokens": 1}
        for name, value in vars(self).items():
            if isinstance(value, int) and value < least.get(name, 0):
                raise InputError(f"--train.{name} {value}: expected at least {least.get(name, 0)}")
        if not 0 < self.max_shard_gb < math.inf:
            raise InputError(f"--train.max_shard_gb {self.max_shard_gb}: expected a positive number")


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, batch_size: int, world: World) -> float:
    """Mean loss per target over all samples. Every process makes the same number of calls, some on an empty batch.

    Raises:
        NonFiniteError: on every process alike.
    """
    was_training = model.training
    model.eval()
    plan = Plan(len(data), batch_size, 1, world.size, world.rank, 0, shuffle=False)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    targets = 0
    for step in range(plan.steps_per_epoch):
        batch = data.batch(plan.micro_batches(step)[0], world.device)
        loss += model(**batch.inputs, labels=batch.labels)
        targets += batch.targets
    model.train(was_training)
    total, count = world.sum(loss, targets)
    if not math.isfinite(total):
        raise NonFiniteError(f"the evaluation loss on {data.path} is {total / count}")
    return total / count


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of the random numbers (dropout) of one process in one step."""
    return ((seed * 1_000_003 + step) * 65_536 + rank) % 2**63


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    data: Dataset,
    plan: Plan,
    rate: Callable[[int], float],
    grad_clip: float,
    world: World,
    steps: range,
    metrics: Metrics,
    log_every: int,
    before_step: Callable[[int], None],
    after_step: Callable[[int, bool], None],
    looks: Callable[[int], bool],
    scaler: LossScaler,
    no_sync: bool,
    signals: Signals,
) -> None:
    """Train steps `steps.start` .. `steps.stop` - 1 of the run.

    Args:
        rate: the learning rate of a step.
        grad_clip: largest gradient norm, 0 for any.
        before_step: called with the step's number, on every process: what trains in it.
        after_step: called with the number of steps done and whether a checkpoint is asked for, on every process.
        looks: whether `after_step` has something to do after so many steps.
        no_sync: see `begin_step`.
        signals: what this process has been told meanwhile.

    Raises:
        NonFiniteError: as `Pending.result`.
        Stopped: a signal said so; `after_step` has been called.
    """
    model.train()
    progress = Progress(steps.stop, steps.start, log_every, world.rank == 0)
    busy, seen = 0.0, 0  # seconds of training and tokens since the last row; evaluation and saving do not count
    late: Pending | None = None  # the step before, while nobody has looked at what it came to

    def tell_of(pending: Pending) -> StepResult:
        nonlocal seen
        result = pending.result()
        seen += result.tokens
        progress.step(pending.step + 1, result.loss, rate(pending.step), seen / max(busy, 1e-9))
        return result

    with closing(progress), undisturbed(world.device):
        for step in steps:
            began = time.perf_counter()
            # Dropout is a pure function of (seed, step, rank), like the data's order: nothing of it needs to be saved.
            torch.manual_seed(step_seed(plan.seed, step, world.rank))
            lr = rate(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            before_step(step)
            batches = [data.batch(indices, world.device) for indices in plan.micro_batches(step)]
            pending = begin_step(model, optimizer, batches, world, grad_clip, step, scaler, no_sync, signals.take())
            (stop, save), done = pending.also, step + 1
            # The device has this step before anyone waits for the one before it.
            told = tell_of(late) if late is not None else None
            late = pending
            row = done % log_every == 0 or done == steps.stop or stop
            if row or save or looks(done):
                told, late = tell_of(pending), None
            busy += time.perf_counter() - began
            if row and told is not None:
                scaled = {"loss_scale": scaler.scale, "skipped": told.skipped} if scaler.on else {}
                metrics.write(
                    step=done,
                    loss=told.loss,
                    lr=lr,
                    grad_norm=told.grad_norm,
                    tokens=told.tokens,
                    tokens_per_second=round(seen / busy, 1),
                    peak_memory_bytes=peak_memory(world.device),
                    **scaled,
                )
                busy, seen = 0.0, 0
                gc.collect()
            after_step(done, bool(stop or save))
            if stop and done < steps.stop:
                raise Stopped(max(world.gather(signals.stop)), done)
