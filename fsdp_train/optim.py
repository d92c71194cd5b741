"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) and the learning rate as a closed form of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

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


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over exactly the trainable parameters of the (already wrapped) model: fp32 masters, fp32 state, one kernel."""
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained, "nothing trains"
    assert all(p.dtype == torch.float32 for p in trained), "trained parameters are fp32 masters"
    return torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)
