"""Every way to train with another head, under FSDP and activation checkpointing: the gradients of the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llama
from fsdp_train.classification import MULTI, REGRESSION, SINGLE, ClassificationDataset, LabelSpace
from fsdp_train.data import Dataset, Sample
from fsdp_train.order import Plan
from fsdp_train.parallel import full_trainable_state, place_model
from fsdp_train.step import train_step
from fsdp_train.strategy import ParallelConfig
from fsdp_train.world import World, process_group
from llama import Llama, replace_head
from peft_impl import LoraConfig, add_adapter, select_parameters, train_only
from tests.fsdp_train.common import GRADIENT, samples
from tests.launch import spawn
from tests.oracle import SHAPES, randomise

COUNT = 7  # samples: two processes get different numbers of them
NAMES = ("a", "b", "c")
KINDS = {SINGLE: NAMES, MULTI: NAMES, REGRESSION: ("value",)}


def classifier(kind: str, shape: str, patterns: str, hidden: tuple[int, ...] = ()) -> Llama:
    model = llama.Llama(SHAPES[shape])
    replace_head(model, KINDS[kind], kind, hidden)
    randomise(model)
    train_only(model, select_parameters(model, patterns.split(",")))
    return model


def with_lora(kind: str, shape: str) -> Llama:
    model = classifier(kind, shape, "score")
    add_adapter(model, LoraConfig(r=4, modules_to_save=("score",)))
    generator = torch.Generator().manual_seed(5)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def language_model(shape: str, patterns: str, hidden: tuple[int, ...]) -> Llama:
    model = llama.Llama(SHAPES[shape])
    if hidden:
        replace_head(model, hidden=hidden)
    randomise(model)
    train_only(model, select_parameters(model, patterns.split(",")))
    return model


CASES: dict[str, tuple[str, Callable[[], Llama]]] = {  # the kind of data, and the model
    **{f"full {kind}": (kind, lambda kind=kind: classifier(kind, "gqa", "*")) for kind in KINDS},  # type: ignore[misc]
    **{f"lora {kind}": (kind, lambda kind=kind: with_lora(kind, "mqa")) for kind in KINDS},  # type: ignore[misc]
    "full tied": (SINGLE, lambda: classifier(SINGLE, "tied", "*")),
    "partial": (SINGLE, lambda: classifier(SINGLE, "gqa", "last:1,score")),
    "head": (SINGLE, lambda: classifier(SINGLE, "mha", "score")),
    "head with layers": (MULTI, lambda: classifier(MULTI, "mha", "score", (8, 6))),
    "full with layers": (SINGLE, lambda: classifier(SINGLE, "gqa", "*", (8,))),
    "lm full": ("lm", lambda: language_model("gqa", "*", ())),
    "lm full tied": ("lm", lambda: language_model("tied", "*", ())),
    "lm head": ("lm", lambda: language_model("mha", "lm_head", ())),
    "lm head with layers, untied": ("lm", lambda: language_model("tied", "lm_head", (8, 6))),
    "lm full with layers": ("lm", lambda: language_model("gqa", "*", (8,))),
}


def dataset(kind: str) -> Dataset:
    """Ragged samples, with targets of the kind."""
    made = samples(COUNT)
    if kind == "lm":
        return Dataset(Path("x"), "tokens", {}, made)
    rng = np.random.default_rng(1)
    targets = {
        SINGLE: lambda: rng.integers(0, 3, 1),
        MULTI: lambda: rng.integers(0, 2, 3).astype(np.float32),
        REGRESSION: lambda: rng.normal(size=1).astype(np.float32),
    }[kind]
    labelled = [Sample(s.where, s.ids, targets(), len(s.ids)) for s in made]
    return ClassificationDataset(Path("x"), "classification", {}, labelled, space=LabelSpace(KINDS[kind], kind))


def expected(case: str) -> dict[str, Tensor]:
    """The oracle: sample by sample, without padding, torch's own losses, their mean over all targets."""
    kind, build = CASES[case]
    model = build()
    total, targets = torch.zeros(()), 0
    for sample in dataset(kind).samples:
        logits, labels = model(torch.tensor(sample.ids)[None].long()), torch.tensor(sample.labels)
        if kind == "lm":
            total = total + F.cross_entropy(logits[0, :-1], labels[1:].long(), ignore_index=-100, reduction="sum")
            targets += int((labels[1:] != -100).sum())
            continue
        losses = {SINGLE: F.cross_entropy, MULTI: F.binary_cross_entropy_with_logits, REGRESSION: F.mse_loss}
        total = total + losses[kind](logits, labels if kind == SINGLE else labels[None], reduction="sum")
        targets += len(labels)
    (total / targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def found(world: World, case: str, checkpointing: str) -> dict[str, Tensor]:
    """What the program computes: the change that SGD with a rate of one makes."""
    kind, build = CASES[case]
    model, data = build(), dataset(kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    config = ParallelConfig(precision="fp32", activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    wrapped = place_model(model, config, world).train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    plan = Plan(COUNT, 4 // world.size, 2, world.size, world.rank, 0, shuffle=False)
    train_step(wrapped, optimizer, [data.batch(i, world.device) for i in plan.micro_batches(0)], world, 0.0, 0)
    after = full_trainable_state(wrapped, world)
    return {name: before[name] - after[name] for name in after}


def everything(rank: int, checkpointing: str) -> dict[str, dict[str, Tensor]]:
    with process_group(ParallelConfig()) as world:
        return {case: found(world, case, checkpointing) for case in CASES}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_one_process_and_two_give_the_plain_model_s_gradients(checkpointing: str, tmp_path: Path) -> None:
    two = spawn(2, everything, checkpointing, tmp_path=tmp_path)[0]
    one = everything(0, checkpointing)
    for case in CASES:
        wanted = expected(case)
        for gradients in (one[case], two[case]):
            assert gradients.keys() == wanted.keys(), case
            for name, gradient in wanted.items():
                assert gradient.any(), (case, name)
                scale = max(1.0, gradient.abs().max().item())
                assert (gradients[name] - gradient).abs().max().item() < GRADIENT * scale, (case, name)
