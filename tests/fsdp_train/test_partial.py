"""Partial fine-tuning: what it costs, what it leaves alone, and the plain model's gradients however it is sharded."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.utils.flop_counter import FlopCounterMode

from fsdp_train.build import wrap_model
from fsdp_train.data import collate
from fsdp_train.optim import OptimConfig
from fsdp_train.order import Plan
from fsdp_train.parallel import full_trainable_state
from fsdp_train.recompute import checkpoint_activations
from fsdp_train.step import train_step
from fsdp_train.strategy import ParallelConfig
from fsdp_train.units import sharding_units
from fsdp_train.world import World, process_group
from llama import Llama, LlamaConfig
from peft_impl import select_parameters, train_only
from tests.fsdp_train.common import build, compare, samples, whole_batch_gradients
from tests.launch import spawn
from tests.oracle import randomise

# Patterns, and what the names that they mean have in them, written as a regular expression of its own.
PATTERNS = {
    "last:1": r"\.layers\.2\.",
    "norms": r"norm\.weight",
    "attention,-layers.0": r"\.[12]\.self_attn\.",
    "layers.*.q_proj": r"q_proj",
    "embeddings": r"embed_tokens",
    "lm_head": r"lm_head",
    "*": r"",
}
GRID = [(patterns, shape) for shape in ("gqa", "tied") for patterns in PATTERNS if (patterns, shape) != ("lm_head", "tied")]
STEPS = 3
IDS = torch.randint(97, (2, 64), generator=torch.Generator().manual_seed(0))


def partial(patterns: str, shape: str) -> Llama:
    model = build("full", shape)
    train_only(model, select_parameters(model, patterns.split(",")))
    return model


def means(patterns: str, name: str) -> bool:
    return re.search(PATTERNS[patterns], name) is not None


# --- what it costs ------------------------------------------------------------------------------------------------------

WIDE = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip


def wide(patterns: str) -> Llama:
    model = Llama(WIDE)
    randomise(model)
    train_only(model, select_parameters(model, patterns.split(",")))
    return model


@pytest.mark.parametrize(("patterns", "layers", "head"), [
    ("last:1", 1, False), ("last:2", 2, False), ("last:2,lm_head", 2, True), ("layers.*", 4, False), ("*", 4, True),
    ("lm_head", 0, True), ("layers.1,norms,-layers.0", 3, False),
])  # fmt: skip
def test_backward_stops_at_the_cut(patterns: str, layers: int, head: bool) -> None:
    """Counted in matrix products, per token, N parameters in all projections and the head, A those above the cut:

        2 N forward, 2 A for the gradients of what goes in (which a head alone does not need), 2 for each that trains.

    That is 2 N + 4 A where all above the cut trains; a frozen head above it counts 2, not 4. Exact, for the head sees one
    position less per row than the layers, and attention's own products, which have no parameters, are left out.
    """
    model = wide(patterns)
    rows, length = IDS.shape

    def products() -> int:
        with FlopCounterMode(display=False) as counted:
            model(IDS, IDS).backward()
        return sum(n for op, n in counted.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))

    projections = [(name, p) for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    of_layer = sum(p.numel() for name, p in projections if ".layers.0." in name)
    assert sum(p.numel() for _, p in projections) == 4 * of_layer
    trained = sum(p.numel() for _, p in projections if p.requires_grad)
    of_head = model.lm_head.weight.numel()
    body = 2 * 4 * of_layer + 2 * layers * of_layer + 2 * trained
    top = 2 * of_head + 2 * of_head * (layers > 0) + 2 * of_head * head
    once = rows * (length * body + (length - 1) * top)
    assert products() == once
    # Recomputed is what lies above the cut and no more (torch leaves out a layer's last product, which nothing needs).
    checkpoint_activations(model, "full")
    again = rows * length * 2 * layers * (of_layer - model.model.layers[0].mlp.down_proj.weight.numel())
    assert products() == once + again


def stored(model: Llama) -> list[int]:
    """Bytes that a forward pass with a loss keeps for backward: by the embedding, each layer, and all after them."""
    kept: list[tuple[int, weakref.ref[Any]]] = []
    place = 0

    class Kept:  # lives as long as autograd's node does
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Kept:
        made = Kept(tensor)
        kept.append((place, weakref.ref(made)))
        return made

    def enter(index: int) -> Any:
        def hook(*_: object) -> None:
            nonlocal place
            place = index

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(enter(1 + index))
        layer.register_forward_hook(enter(-1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda made: made.tensor):
        loss = model(IDS, IDS)
    held = [(index, made) for index, ref in kept if (made := ref()) is not None]
    loss.backward()
    return [sum(made.tensor.nbytes for where, made in held if where == index) for index in (0, 1, 2, 3, 4, -1)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("patterns", "cut"), [("last:1", 3), ("last:2", 2), ("layers.1.self_attn.q_proj", 1), ("lm_head", 4), ("*", 0)]
)
def test_nothing_is_stored_below_the_cut(patterns: str, cut: int, checkpointing: bool) -> None:
    model = wide(patterns)
    if checkpointing:
        checkpoint_activations(model, "full")
    embedding, *layers, top = stored(model)
    assert (embedding > 0) == (patterns == "*")
    assert [held > 0 for held in layers] == [index >= cut for index in range(4)]
    assert top > 0
    if cut < 4:
        inputs = IDS.numel() * WIDE.hidden_size * 4
        assert (layers[-1] < 3 * inputs) == checkpointing  # a layer's input, and rotary tables; or everything in it


# --- what it computes, holds and leaves alone, on one process and on two ------------------------------------------------


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, by plain name, sharded or not. All processes must call it."""
    if not isinstance(model, FSDP):
        return {_plain(name): p.detach().clone() for name, p in model.named_parameters()}
    with FSDP.summon_full_params(model, writeback=False):
        return {_plain(name): p.detach().clone() for name, p in model.named_parameters()}


def _plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def train_some(world: World, patterns: str, shape: str, checkpointing: str) -> dict[str, Any]:
    """A step of SGD with a rate of one, whose change is the gradient; then steps as in the program, and who holds what."""
    config = ParallelConfig(precision="fp32", activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    model, adam = wrap_model(partial(patterns, shape), config, OptimConfig(lr=1e-3, weight_decay=0.1), world)
    flat = [p for p in model.parameters() if p.requires_grad]
    held: dict[str, Any] = {"parameters": [p.numel() for p in flat], "trainable": 0, "gradients": []}
    if isinstance(model, FSDP):
        units = [m for m in model.modules() if isinstance(m, FSDP)]
        held["trainable"] = sum(p._unpadded_unsharded_size.numel() for u in units for p in u.params if p.requires_grad)

    def look(*_: object) -> None:
        held["gradients"] = [p.grad.numel() for p in flat if p.grad is not None]
        held["frozen"] = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]

    adam.register_step_pre_hook(look)
    data = samples(8)
    plan = Plan(7, 4 // world.size, 2, world.size, world.rank, 0, shuffle=False)
    batches = [collate([data[i] for i in indices], world.device) for indices in plan.micro_batches(0)]
    start = whole(model)
    result = train_step(model.train(), torch.optim.SGD(flat, lr=1.0), batches, world, 0.0, 0)
    moved = whole(model)
    for step in range(1, STEPS):
        train_step(model, adam, batches, world, 1.0, step)
    end, state = whole(model), full_trainable_state(model, world)
    assert world.rank or all(torch.equal(state[name], end[name]) for name in state)
    return {
        **held,
        "moments": [adam.state[p][key].numel() for key in ("exp_avg", "exp_avg_sq") for p in flat if p in adam.state],
        "states": len(adam.state),
        "step": {"norm": torch.tensor(result.grad_norm), **{name: start[name] - moved[name] for name in state}},
        "changed": [name for name in start if not torch.equal(start[name], end[name])],
        "names": list(state),
    }


def check(found: dict[str, Any], patterns: str, shape: str) -> None:
    """What holds on every process."""
    model = partial(patterns, shape)
    expected = [name for name, _ in model.named_parameters() if means(patterns, name)]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == expected
    assert sorted(found["changed"]) == sorted(expected)  # all of it, and of the rest not a bit
    assert found["frozen"] == []
    assert found["gradients"] == found["parameters"]
    assert found["moments"] == 2 * found["parameters"]
    assert found["states"] == len(found["parameters"])


@pytest.fixture(scope="module")
def gradients() -> dict[str, dict[str, Tensor]]:
    """The oracle's, of all parameters, by shape."""
    return {shape: whole_batch_gradients("full", samples(7), shape) for shape in ("gqa", "tied")}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(("patterns", "shape"), GRID)
def test_one_process_trains_what_is_named(
    patterns: str, shape: str, checkpointing: str, gradients: dict[str, dict[str, Tensor]]
) -> None:
    with process_group(ParallelConfig()) as world:
        found = train_some(world, patterns, shape, checkpointing)
    check(found, patterns, shape)
    assert sorted(found["names"]) == sorted(found["changed"])
    compare(found["step"], {name: g for name, g in gradients[shape].items() if means(patterns, name)})


def grid(rank: int, checkpointing: str) -> list[dict[str, Any]]:
    with process_group(ParallelConfig()) as world:
        return [train_some(world, patterns, shape, checkpointing) for patterns, shape in GRID]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_two_processes_do_the_same_each_with_half(
    checkpointing: str, gradients: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    ranks = spawn(2, grid, checkpointing, tmp_path=tmp_path)
    for (patterns, shape), first, second in zip(GRID, *ranks, strict=True):
        for found in (first, second):
            check(found, patterns, shape)
        assert (sorted(first["names"]), second["names"]) == (sorted(first["changed"]), [])  # gathered on rank 0
        compare(first["step"], {name: g for name, g in gradients[shape].items() if means(patterns, name)})
        size = sum(g.numel() for name, g in gradients[shape].items() if means(patterns, name))
        assert first["trainable"] == second["trainable"] == size
        assert first["parameters"] == second["parameters"]
        assert 0 <= 2 * sum(first["parameters"]) - size <= len(first["parameters"])  # a unit of odd size is rounded up


@pytest.mark.parametrize(("patterns", "shape"), GRID)
def test_no_unit_mixes_what_trains_and_what_does_not(patterns: str, shape: str) -> None:
    model = partial(patterns, shape)
    names, units = {module: name for name, module in model.named_modules()}, sharding_units(model)
    owned: dict[str, set[nn.Parameter]] = {}
    for unit in sorted([model, *units], key=lambda unit: -len(list(unit.modules()))):  # outer ones first
        mine = set(unit.parameters())
        for other in owned:
            owned[other] -= mine
        owned[names[unit]] = mine
    assert all(len({p.requires_grad for p in mine}) <= 1 for mine in owned.values())
    assert set().union(*owned.values()) == set(model.parameters())
    assert {f"model.layers.{index}" for index in range(3)} <= owned.keys()
    embedding = model.model.embed_tokens.weight
    assert embedding in owned["" if shape == "tied" else "model.embed_tokens"]
    assert ("model.embed_tokens" in owned) == (shape != "tied")
    assert not any(isinstance(unit, nn.ModuleList | nn.ModuleDict) for unit in units)
