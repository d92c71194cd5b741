"""One optimizer step: one loss formula, whatever the number of processes and micro-batches.

    loss of a step = sum of cross-entropies / number of targets, both over all micro-batches of all processes

Gradients are averaged over processes by FSDP, so each micro-batch's sum is multiplied by world size / targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fsdp_train.data import Batch
from fsdp_train.optim import InBackward, LossScaler, Optimizer
from fsdp_train.parallel import clip_gradients, gradients_stay, sum_over_model
from fsdp_train.world import World
from llama.errors import listing


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


@dataclass
class Pending:
    """An optimizer step that has been given to the device and may not be done yet. `result` waits for it."""

    optimizer: Optimizer | torch.optim.Optimizer
    batches: Sequence[Batch]
    losses: list[torch.Tensor]
    summary: torch.Tensor  # (2,): sum of losses over all processes, gradient norm
    world: World
    step: int
    targets: float
    tokens: int
    may_overflow: bool
    also: list[float]

    def result(self) -> StepResult:
        """What the step came to.

        Raises:
            NonFiniteError: on every process alike. Neither this step nor one that was begun after it changed a weight.
        """
        total, norm = self.summary.tolist()
        finite = math.isfinite(norm)
        overflowed = self.may_overflow and not finite
        if not (math.isfinite(total) and (finite or overflowed)):
            if not isinstance(self.optimizer, InBackward):
                setattr(self.optimizer, "found_inf", None)  # noqa: B010
            raise NonFiniteError(_blame(self.losses, self.batches, total, norm, self.world, self.step))
        return StepResult(total / self.targets, norm, self.tokens, overflowed, self.also)


def train_step(*arguments: Any, **options: Any) -> StepResult:
    """`begin_step`, and wait for its result."""
    return begin_step(*arguments, **options).result()


def begin_step(
    model: nn.Module,
    optimizer: Optimizer | torch.optim.Optimizer,
    batches: Sequence[Batch],
    world: World,
    grad_clip: float,
    step: int,
    scaler: LossScaler | None = None,
    no_sync: bool = False,
    also: Sequence[float] = (),
) -> Pending:
    """Forward, backward and update on this process's micro-batches of one step.

    With fused AdamW nothing in it waits for the device: whether loss and gradient are finite is decided there, and an update
    that would spoil the weights, and all after it, are left out by the kernel (`found_inf`).

    Args:
        no_sync: add gradients up over processes after the last micro-batch only.
        also: numbers to be summed over processes on the way.

    Raises:
        NonFiniteError: on every process alike, before the update, where the optimizer has no such kernel.
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
    total = torch.stack(losses).sum(dtype=torch.float64)
    world.add(total)

    def pending(norm: torch.Tensor | float) -> Pending:
        summary = torch.stack((total, torch.as_tensor(norm, dtype=torch.float64, device=total.device)))
        return Pending(optimizer, batches, losses, summary, world, step, targets, int(tokens), scale > 1, sums)

    if isinstance(optimizer, InBackward):
        norm = math.sqrt(sum_over_model(optimizer.squares, model, world))
        if not math.isfinite(norm):
            raise NonFiniteError(f"step {step + 1}: the gradient norm is {norm}; weights were updated already: resume")
        optimizer.step()
        return pending(norm)
    if missing := [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]:
        raise RuntimeError(f"no gradient reaches {listing(missing)}: the forward pass does not use them")
    if scale != 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(1 / scale)
    done = pending(clip_gradients(model, grad_clip or math.inf))
    if optimizer.defaults.get("fused") and not (scaler is not None and scaler.on):
        spoilt = (~done.summary.isfinite().all()).float()
        before = getattr(optimizer, "found_inf", None)
        setattr(optimizer, "found_inf", spoilt if before is None else torch.maximum(before, spoilt))  # noqa: B010
        optimizer.step()
    else:
        try:
            overflowed = done.result().skipped
        except NonFiniteError:
            optimizer.zero_grad()
            raise
        if scaler is not None:
            scaler.update(not overflowed)
        if not overflowed:
            optimizer.step()
    optimizer.zero_grad()
    return done


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
