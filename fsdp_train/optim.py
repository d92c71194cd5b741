"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) and the learning rate as a closed form of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fsdp_train.settings import option
from llama.errors import InputError


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    lr: float = option(2e-4, "peak learning rate")
    weight_decay: float = option(0.0, "decoupled weight decay, on every trained tensor")
    warmup_steps: int = option(0, "steps of linear warm-up to the peak")
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "after warm-up: falling to zero at the end, or constant"
    )
    grad_clip: float = option(1.0, "largest global gradient norm (0: do not clip)")

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "warmup_steps", "grad_clip"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name == "lr" and value == 0):
                raise InputError(f"--optim.{name} {value}: expected a {'positive' if name == 'lr' else 'non-negative'} number")


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """The rate of step 0 <= step < total."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (1 - progress if config.schedule == "linear" else 1.0)


def build_optimizer(model: nn.Module, config: OptimConfig, in_backward: bool = False) -> Optimizer:
    """AdamW over exactly the trainable parameters of the (already wrapped) model: fp32 masters, fp32 state, one kernel."""
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained, "nothing trains"
    assert all(p.dtype == torch.float32 for p in trained), "trained parameters are fp32 masters"
    if in_backward:
        return InBackward(model, config)
    return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)


class InBackward:
    """AdamW that updates each parameter as soon as its gradient is complete, and then frees that: the gradients of all weights
    never exist at once. Looks like one optimizer from outside; `step` has nothing left to do.

    Nothing can look at all gradients before the first update: no clipping, no accumulation, and a gradient that is not finite
    is seen too late (the loss is looked at before).
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self._of: dict[nn.Parameter, torch.optim.AdamW] = {}
        self.squares = torch.zeros(())  # of this process's parts of the step's gradients
        for parameter in model.parameters():
            if parameter.requires_grad:
                optimizer = torch.optim.AdamW([parameter], lr=config.lr, weight_decay=config.weight_decay, fused=True)
                optimizer.state = self.state
                self._of[parameter] = optimizer
                parameter.register_post_accumulate_grad_hook(self._update)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._of.values() for group in optimizer.param_groups]

    def _update(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        mine = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        self.squares = self.squares.to(mine.device) + mine.pow(2).sum()
        self._of[parameter].step()
        parameter.grad = None

    def step(self) -> None:
        self.squares = torch.zeros_like(self.squares)

    def zero_grad(self) -> None:
        """There are none."""


class LossScaler:
    """The factor by which fp16's loss is multiplied, so that small gradients do not vanish (Micikevicius et al. 2018, arXiv
    1710.03740), by the rule of `torch.amp.GradScaler`: halved when a gradient overflows, doubled after 2,000 good steps.

    Powers of two, so multiplying and dividing is exact. Whether a gradient overflowed is read off the norm over all processes,
    so all agree. Without fp16 it is one and stays so.
    """

    INTERVAL = 2000

    def __init__(self, on: bool) -> None:
        self.on, self.scale, self._good = on, 2.0**16 if on else 1.0, 0

    def update(self, finite: bool) -> None:
        """After each step."""
        if self.on:
            self._good = self._good + 1 if finite else 0
            if not finite:
                self.scale /= 2
            elif self._good == self.INTERVAL:
                self.scale, self._good = self.scale * 2, 0

    def state(self) -> list[float]:
        return [self.scale, self._good]

    def load(self, state: list[float]) -> None:
        if self.on:
            self.scale, self._good = float(state[0]), int(state[1])


Optimizer = torch.optim.AdamW | InBackward
