"""Activation checkpointing: the same gradients, fewer stored tensors, and exactly the extra work that each kind says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fsdp_train.build import wrap_model
from fsdp_train.data import collate
from fsdp_train.optim import OptimConfig
from fsdp_train.parallel import full_trainable_state, held_bytes, plain_name
from fsdp_train.recompute import checkpoint_activations, wrappers
from fsdp_train.step import train_step
from fsdp_train.strategy import ParallelConfig
from fsdp_train.units import shares, total_bytes
from fsdp_train.world import World, process_group
from peft_impl import select_parameters, train_only
from tests.fsdp_train.common import ADAPTERS, build, samples
from tests.launch import spawn
from tests.oracle import largest

IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))
GRADIENT = 1e-6


class Made(TorchDispatchMode):
    """Notes every tensor that an operation makes, without keeping it alive, and which decoder layer was at work."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, StorageWeakRef]] = []
        self.layer = -1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.made.append((self.layer, StorageWeakRef(tensor.untyped_storage())))
        return result


def stored_per_layer(method: str, kind: str) -> list[int]:
    """Tensors that are alive after the forward pass because of each decoder layer; parameters left out."""
    model = build(method)
    if kind != "none":
        checkpoint_activations(model, kind)
    parameters, made = {p.untyped_storage()._cdata for p in model.parameters()}, Made()
    for index, module in enumerate([*model.model.layers, model.model.norm]):
        module.register_forward_pre_hook(lambda *_, index=index: setattr(made, "layer", index))
    with made:
        loss = model(IDS, IDS)
    alive: dict[int, int] = {}
    for layer, storage in made.made:
        if not storage.expired() and storage.cdata not in parameters:
            alive.setdefault(storage.cdata, layer)
    assert loss.requires_grad
    return [list(alive.values()).count(layer) for layer in range(len(model.model.layers))]


def test_how_many_tensors_a_layer_stores() -> None:
    """Checkpointed, its output alone (the next one's input); selectively, also seven products, attention and its normaliser."""
    assert stored_per_layer("full", "full") == [1, 1, 1]
    assert stored_per_layer("full", "selective") == [1 + 7 + 2] * 3
    assert stored_per_layer("full", "none") == [18] * 3
    assert stored_per_layer("lora", "full") == [1, 1, 1]
    assert stored_per_layer("lora", "selective") == [1 + 3 * 7 + 2] * 3


def measured(method: str, kind: str) -> tuple[int, list[int], int, dict[str, Tensor]]:
    """FLOPs of the forward pass, of the decoder layers in it, and of the backward pass; the gradients."""
    model = build(method)
    if kind != "none":
        checkpoint_activations(model, kind)
    with FlopCounterMode(display=False) as forward:
        loss = model(IDS, IDS)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counts = forward.get_flop_counts()
    layers = [sum(counts[f"Llama.model.layers.{index}"].values()) for index in range(len(model.model.layers))]
    gradients = {plain_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return forward.get_total_flops(), layers, backward.get_total_flops(), gradients


@pytest.mark.parametrize("method", ["full", *ADAPTERS])
def test_the_same_gradients_for_the_work_that_is_said(method: str) -> None:
    forward, counted, backward, gradients = measured(method, "none")
    full, selective = measured(method, "full"), measured(method, "selective")
    # Each layer once more, but its last product, whose result no gradient needs; and not where nothing trains in it or below.
    last = 2 * IDS.numel() * 64 * (4 if method == "lora" else 172)
    first = counted[0] - last if method == "llama_adapter" else 0
    assert (full[0], full[2]) == (forward, backward + sum(counted) - first - 3 * last)
    assert (selective[0], selective[2]) == (forward, backward)  # nothing that counts
    for found in (full[3], selective[3]):
        assert found.keys() == gradients.keys()
        assert max((found[name] - gradients[name]).abs().max().item() for name in gradients) <= GRADIENT


def test_nothing_is_checkpointed_where_nothing_is_differentiated() -> None:
    model, calls = build("lora"), []
    checkpoint_activations(model, "full")
    for wrapper in wrappers(model).values():
        checkpoint: Any = wrapper.checkpoint_fn
        wrapper.checkpoint_fn = lambda *given, checkpoint=checkpoint: calls.append(1) or checkpoint(*given)  # type: ignore
    with torch.no_grad():
        expected = model(IDS)
    assert not calls
    assert torch.equal(model(IDS), expected)
    assert len(calls) == 3


# --- whole layers that train in a frozen model, sharded -----------------------------------------------------------------

# First and last; those that data would choose; the model that they are chosen on; a tied weight; parts of layers.
PATTERNS = ("last:1", "first:1", "layers.1", "layers.*", "embeddings", "norms")


def after_a_step(world: World, pattern: str, **parallel: Any) -> dict[str, Tensor]:
    """What trains, one SGD step on; each process holds what the arithmetic says."""
    model = build("full", "tied" if pattern == "embeddings" else "gqa")
    train_only(model, select_parameters(model, (pattern,)))
    config = ParallelConfig(precision="fp32", **parallel)
    rows = shares(model, world.size, config.strategy == "fsdp2", world.rank)
    wrapped, _ = wrap_model(model, config, OptimConfig(), world)
    assert held_bytes(wrapped) == total_bytes(rows)[0]
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.2)
    train_step(wrapped, optimizer, [collate(samples(4)[world.rank :: world.size], world.device)], world, 0.0, 0)
    return full_trainable_state(wrapped, world)


def checkpointed_and_sharded(rank: int) -> dict[str, dict[str, Tensor]]:
    with process_group(ParallelConfig(strategy="fsdp2")) as world:
        return {
            f"{pattern} {strategy} {kind}": after_a_step(world, pattern, strategy=strategy, activation_checkpointing=kind)
            for pattern in PATTERNS
            for strategy in ("fsdp", "fsdp2")
            for kind in ("full", "selective")
        }


@pytest.mark.parametrize("processes", [1, 2])
def test_whole_layers_that_train_are_checkpointed_and_sharded(processes: int, tmp_path: Path) -> None:
    found = spawn(processes, checkpointed_and_sharded, tmp_path=tmp_path)[0]
    expected = {p: after_a_step(World(0, 1, 0, 1, torch.device("cpu")), p, strategy="none") for p in PATTERNS}
    for name, tensors in found.items():
        plain = expected[name.split()[0]]
        assert tensors.keys() == plain.keys()
        assert max(largest(tensors[key], plain[key]) for key in plain) < GRADIENT, name
