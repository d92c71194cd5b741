"""The training loop: one loss formula, whatever the number of processes and micro-batches.

    loss of a step = sum of cross-entropies / number of targets, both over all micro-batches of all processes

Gradients are averaged over processes by FSDP, so each micro-batch's sum is multiplied by world size / targets.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from fsdp_train.data import Batch, Dataset, Plan
from fsdp_train.host import undisturbed
from fsdp_train.log import Metrics, Progress, peak_memory
from fsdp_train.optim import InBackward, LossScaler, OptimConfig, Optimizer, learning_rate
from fsdp_train.parallel import clip_gradients, gradients_stay, sum_over_model
from fsdp_train.settings import option
from fsdp_train.signals import Signals, Stopped
from fsdp_train.world import World
from llama.errors import InputError, listing


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


class NonFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite; the message says where. No step was taken."""


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, over all processes: mean loss per target, gradient norm, real tokens, whether fp16 left the update
    out, and the sums of what else was to be summed."""

    loss: float
    grad_norm: float
    tokens: int
    skipped: bool
    also: list[float]


def train_step(
    model: nn.Module,
    optimizer: Optimizer | torch.optim.Optimizer,
    batches: Sequence[Batch],
    world: World,
    grad_clip: float,
    step: int,
    scaler: LossScaler | None = None,
    no_sync: bool = False,
    also: Sequence[float] = (),
) -> StepResult:
    """Forward, backward and update on this process's micro-batches of one step.

    Args:
        no_sync: add gradients up over processes after the last micro-batch only.
        also: numbers to be summed over processes on the way.

    Raises:
        NonFiniteError: on every process alike, before the update.
    """
    targets, tokens, *sums = world.sum(sum(b.targets for b in batches), sum(b.tokens for b in batches), *also)
    scale = scaler.scale if scaler is not None else 1.0
    losses = []
    for index, batch in enumerate(batches):
        with gradients_stay(model) if no_sync and index < len(batches) - 1 else nullcontext():
            loss = model(**batch.inputs, labels=batch.labels)
            losses.append(loss.detach())
            if isinstance(optimizer, InBackward):  # of one micro-batch: after this call it is too late
                _check_loss(losses, batches, world, step)
            (loss * (world.size / targets * scale)).backward()
    total = world.sum(torch.stack(losses).sum())[0]
    if isinstance(optimizer, InBackward):
        norm = math.sqrt(sum_over_model(optimizer.squares, model, world))
        if not math.isfinite(norm):
            raise NonFiniteError(f"step {step + 1}: the gradient norm is {norm}; weights were updated already: resume")
    else:
        if missing := [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]:
            raise RuntimeError(f"no gradient reaches {listing(missing)}: the forward pass does not use them")
        if scale != 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / scale)
        norm = float(clip_gradients(model, grad_clip or math.inf))
    finite = math.isfinite(norm)
    if scaler is not None:
        scaler.update(finite)
    overflowed = scale > 1 and not finite  # fp16's way of finding the largest scale that it can bear
    if not (math.isfinite(total) and (finite or overflowed)):
        optimizer.zero_grad()
        raise NonFiniteError(_blame(losses, batches, total, norm, world, step))
    if not overflowed:
        optimizer.step()
    optimizer.zero_grad()
    return StepResult(total / targets, norm, int(tokens), overflowed, sums)


def _check_loss(losses: list[torch.Tensor], batches: Sequence[Batch], world: World, step: int) -> None:
    total = world.sum(torch.stack(losses).sum())[0]
    if not math.isfinite(total):
        raise NonFiniteError(_blame(losses, batches, total, math.nan, world, step))


def _blame(losses: list[torch.Tensor], batches: Sequence[Batch], total: float, norm: float, world: World, step: int) -> str:
    """Which processes and samples a non-finite loss came from. All processes must call it."""
    mine = [where for loss, batch in zip(losses, batches, strict=True) if not torch.isfinite(loss) for where in batch.where]
    found = [f"rank {rank}: {listing(places)}" for rank, places in enumerate(world.gather(mine)) if places]
    if found:
        return f"step {step + 1}: the loss is {total}, from the samples of {'; '.join(found)}"
    everything = [where for places in world.gather([w for b in batches for w in b.where]) for where in places]
    return f"step {step + 1}: the loss is finite, its gradient norm is {norm}; samples: {listing(everything)}"


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
    optim: OptimConfig,
    world: World,
    steps: range,
    metrics: Metrics,
    log_every: int,
    before_step: Callable[[int], None],
    after_step: Callable[[int, bool], None],
    scaler: LossScaler,
    no_sync: bool,
    signals: Signals,
) -> None:
    """Train steps `steps.start` .. `steps.stop` - 1 of the run.

    Args:
        before_step: called with the step's number, on every process: what trains in it.
        after_step: called with the number of steps done and whether a checkpoint is asked for, on every process.
        no_sync: see `train_step`.
        signals: what this process has been told meanwhile.

    Raises:
        NonFiniteError: as `train_step`.
        Stopped: a signal said so; `after_step` has been called.
    """
    model.train()
    progress = Progress(steps.stop, steps.start, log_every, world.rank == 0)
    busy, seen = 0.0, 0  # seconds of training and tokens since the last row; evaluation and saving do not count
    with closing(progress), undisturbed(world.device):
        for step in steps:
            began = time.perf_counter()
            # Dropout is a pure function of (seed, step, rank), like the data's order: nothing of it needs to be saved.
            torch.manual_seed(step_seed(plan.seed, step, world.rank))
            lr = learning_rate(optim, step, steps.stop)
            for group in optimizer.param_groups:
                group["lr"] = lr
            before_step(step)
            batches = [data.batch(indices, world.device) for indices in plan.micro_batches(step)]
            result = train_step(model, optimizer, batches, world, optim.grad_clip, step, scaler, no_sync, signals.take())
            stop, save = result.also
            seen += result.tokens
            busy += time.perf_counter() - began
            done, speed = step + 1, seen / busy
            progress.step(done, result.loss, lr, speed)
            if done % log_every == 0 or done == steps.stop or stop:
                scaled = {"loss_scale": scaler.scale, "skipped": result.skipped} if scaler.on else {}
                metrics.write(
                    step=done,
                    loss=result.loss,
                    lr=lr,
                    grad_norm=result.grad_norm,
                    tokens=result.tokens,
                    tokens_per_second=round(speed, 1),
                    peak_memory_bytes=peak_memory(world.device),
                    **scaled,
                )
                busy, seen = 0.0, 0
                gc.collect()
            after_step(done, bool(stop or save))
            if stop and done < steps.stop:
                raise Stopped(max(world.gather(signals.stop)), done)
