"""What the tests of sharding share: ragged samples, models ready to train, and gradients two ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import llama
from fsdp_train.build import wrap_model
from fsdp_train.data import Sample, collate
from fsdp_train.optim import OptimConfig
from fsdp_train.order import Plan
from fsdp_train.parallel import full_trainable_state
from fsdp_train.step import train_step
from fsdp_train.strategy import ParallelConfig
from fsdp_train.world import World
from peft_impl import LlamaAdapterConfig, LoraConfig, PrefixTuningConfig, add_adapter
from tests.oracle import SHAPES, randomise

GRADIENT = 1e-6  # fp32: other orders of summation
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", modules_to_save=("lm_head",)),
    "dora": LoraConfig(r=4, use_dora=True),
    "llama_adapter": LlamaAdapterConfig(adapter_len=4, adapter_layers=2),
    "heads": LlamaAdapterConfig(4, 3, "head", "tanh"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5),
    "projected": PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12),
}
SMALL = {"lora q,v": LoraConfig(r=4)}  # fewer leaves, where many processes gather each of them


def samples(count: int, seed: int = 0) -> list[Sample]:
    """Ragged, with masked prompts of ragged lengths."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        ids = rng.integers(3, 97, rng.integers(4, 30)).astype(np.int32)
        prompt = int(rng.integers(1, len(ids) - 1))
        made.append(Sample(str(index), ids, np.where(np.arange(len(ids)) < prompt, -100, ids).astype(np.int32), prompt))
    return made


def build(method: str, shape: str = "gqa", dtype: torch.dtype = torch.float32) -> llama.Llama:
    """A random model ready to train; an adapter's parameters are random too, so that every one has a gradient."""
    model = llama.Llama(SHAPES[shape])
    randomise(model)
    if method in ADAPTERS | SMALL:
        model.to(dtype)
        add_adapter(model, (ADAPTERS | SMALL)[method])
        generator = torch.Generator().manual_seed(5)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def whole_batch_gradients(method: str, data: list[Sample], shape: str = "gqa") -> dict[str, Tensor]:
    """The oracle: one forward and backward over everything, plain mean over targets, no program code but the model."""
    model = build(method, shape)
    loss, targets = torch.zeros(()), 0
    for sample in data:
        ids, labels = torch.tensor(sample.ids)[None].long(), torch.tensor(sample.labels)[None].long()
        logits = model(ids)[0, :-1]
        loss = loss + nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        targets += int((labels[0, 1:] != -100).sum())
    (loss / targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step_gradients(
    world: World, method: str, batch: int, accum: int, checkpointing: str, count: int, shape: str = "gqa", **parallel: Any
) -> dict[str, Tensor]:
    """What the program computes: the change that SGD with a rate of one makes, and the norm it reports."""
    model = build(method, shape)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    config = ParallelConfig(precision="fp32", activation_checkpointing=checkpointing, **parallel)  # type: ignore[arg-type]
    wrapped, _ = wrap_model(model, config, OptimConfig(), world)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    data = samples(count)
    plan = Plan(count, batch, accum, world.size, world.rank, 0, shuffle=False)
    batches = [collate([data[i] for i in indices], world.device) for indices in plan.micro_batches(0)]
    result = train_step(wrapped.train(), optimizer, batches, world, 0.0, 0)
    after = full_trainable_state(wrapped, world)
    if world.rank:
        return {}
    return {"norm": torch.tensor(result.grad_norm), **{name: before[name] - after[name] for name in before}}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == {"norm", *expected}
    norm = torch.stack([g.double().pow(2).sum() for g in expected.values()]).sum().sqrt()
    assert abs(found["norm"] - norm) < 1e-5 * norm
    worst = max((found[name] - expected[name]).abs().max().item() for name in expected)
    assert worst < GRADIENT
    assert all(gradient.any() for gradient in expected.values())


def toml_line(name: str, value: object) -> str:
    """A setting as a line of TOML, from Python's own spelling of the value."""
    if value is None:
        return f'{name} = "none"'
    if isinstance(value, bool):
        return f"{name} = {str(value).lower()}"
    return f"{name} = {list(value) if isinstance(value, tuple) else value!r}"
