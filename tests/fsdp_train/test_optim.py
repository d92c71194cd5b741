"""The learning rate against its closed form, AdamW against its formula, and what the optimizer holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import llama
from fsdp_train.optim import OptimConfig, build_optimizer, learning_rate
from llama.errors import InputError
from peft_impl import LoraConfig, add_adapter
from tests.oracle import SHAPES

FLOAT = 1e-15  # relative, float64: a handful of operations
ADAMW = 2e-6  # relative, fp32 against float64: 8 steps of about ten roundings of 6e-8 each


def rates(total: int, **settings: object) -> list[float]:
    config = OptimConfig(lr=0.5, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, total) for step in range(total)]


def test_constant() -> None:
    assert rates(5, schedule="constant") == [0.5] * 5
    assert rates(5, schedule="constant", warmup_steps=2) == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_linear() -> None:
    """Down in equal steps that would reach zero just after the last one: every step trains."""
    assert rates(4, schedule="linear") == pytest.approx([0.5, 0.375, 0.25, 0.125], rel=FLOAT)
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([0.25, 0.5, 0.5, 0.375, 0.25, 0.125], rel=FLOAT)


def test_cosine() -> None:
    half = math.sqrt(0.5) / 2
    assert rates(4) == pytest.approx([0.5, 0.25 + half / 2, 0.25, 0.25 - half / 2], rel=FLOAT)
    assert rates(7, warmup_steps=3) == pytest.approx([0.5 / 3, 1 / 3, 0.5, *rates(4)], rel=FLOAT)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 0), (50, 0), (50, 7), (50, 49)])
def test_after_warm_up_it_is_hugging_faces_schedule(schedule: str, total: int, warmup: int) -> None:
    """Their warm-up begins with a step of zero length; ours, one step ahead, wastes none."""
    get = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[schedule]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get(optimizer, warmup, total)
    theirs = []
    for _ in range(total):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = rates(total, schedule=schedule, warmup_steps=warmup)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    assert ours[: max(0, warmup - 1)] == pytest.approx(theirs[1:warmup], rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (10, 0), (10, 3), (10, 10), (10, 40)])
def test_every_step_trains_and_none_beyond_the_peak(schedule: str, total: int, warmup: int) -> None:
    """Also where the warm-up is longer than the run: it then just ends on the way up."""
    found = rates(total, schedule=schedule, warmup_steps=warmup)
    assert all(0 < rate <= 0.5 for rate in found)
    assert found[:warmup] == pytest.approx([0.5 * (step + 1) / warmup for step in range(min(warmup, total))], rel=FLOAT)
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert max(found) == pytest.approx(0.5 * min(1, total / max(1, warmup)), rel=FLOAT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("lr", value) for value in (0.0, -1e-4, math.nan, math.inf)],
        *[("weight_decay", value) for value in (-0.1, math.nan, math.inf)],
        *[("grad_clip", value) for value in (-1.0, math.nan, math.inf)],
        ("warmup_steps", -1),
    ],
)
def test_values_without_a_meaning_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"--optim\.{name} {value}: expected a (positive|non-negative) number"):
        OptimConfig(**{name: value})  # type: ignore[arg-type]


def test_zero_turns_things_off() -> None:
    OptimConfig(weight_decay=0.0, grad_clip=0.0, warmup_steps=0)


# --- the optimizer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_is_the_formula(decay: float) -> None:
    """p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), with torch's betas, in float64."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(7, 5, bias=False)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=decay))
    p, m, v = model.weight.detach().double().clone(), 0.0, 0.0
    for t in range(1, 9):
        lr = 1e-2 / t
        optimizer.param_groups[0]["lr"] = lr
        model.weight.grad = torch.randn(5, 7, generator=generator) * 10.0 ** (t % 3)
        gradient = model.weight.grad.double()
        optimizer.step()
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        p = p * (1 - lr * decay) - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    assert (model.weight - p).abs().max() < ADAMW * p.abs().max()


def test_it_holds_exactly_what_trains() -> None:
    model = llama.Llama(SHAPES["gqa"])
    add_adapter(model, LoraConfig(r=2, modules_to_save=("lm_head",)))
    held = [p for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]]
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert len(held) == len(trained) == 3 * 2 * 2 + 1
    assert {id(p) for p in held} == trained.keys()


def test_a_tied_weight_is_held_once() -> None:
    model = llama.Llama(SHAPES["tied"])
    held = [p for group in build_optimizer(model, OptimConfig()).param_groups for p in group["params"]]
    assert sum(p is model.lm_head.weight for p in held) == 1
    assert len(held) == len({id(p) for p in held})


def test_masters_are_fp32() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    with pytest.raises(AssertionError, match="fp32 masters"):
        build_optimizer(model, OptimConfig())
    with pytest.raises(AssertionError, match="nothing trains"):
        build_optimizer(model.requires_grad_(False), OptimConfig())
    frozen = nn.Sequential(nn.Linear(2, 2).to(torch.bfloat16).requires_grad_(False), nn.Linear(2, 2))
    optimizer = build_optimizer(frozen, OptimConfig())
    frozen[1](torch.ones(2)).sum().backward()
    optimizer.step()
    assert all(t.dtype == torch.float32 for state in optimizer.state.values() for t in state.values())
