"""What processes send each other in a step is what the arithmetic says, byte for byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_train.build import wrap_model
from fsdp_train.data import collate
from fsdp_train.optim import OptimConfig
from fsdp_train.step import train_step
from fsdp_train.strategy import ParallelConfig
from fsdp_train.units import shares
from fsdp_train.world import World, process_group
from tests.fsdp_train.common import build, samples
from tests.launch import spawn

METHODS = ("full", "lora", "prefix")
SETTINGS: dict[str, dict[str, Any]] = {
    "fsdp": {"strategy": "fsdp"},
    "fsdp grad": {"strategy": "fsdp", "sharding": "shard_grad_op"},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2 compiled units": {"strategy": "fsdp2", "compile": True},
}


class Traffic(TorchDispatchMode):
    """Bytes of whole tensors that were gathered, and of whole gradients that were summed and scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, whole in (("_allgather_base_", 0), ("_reduce_scatter_base_", 1)):
            if f"c10d.{name}." in str(function):
                self.bytes[name] += args[whole].numel() * args[whole].itemsize
        if "c10d.allgather_." in str(function):  # a list of parts, on CPUs
            self.bytes["_allgather_base_"] += sum(t.numel() * t.itemsize for parts in args[0] for t in parts)
        return function(*args, **(kwargs or {}))


def expected(model: nn.Module, world: World, config: ParallelConfig) -> dict[str, int]:
    """A unit is gathered for forward, and, where it was spread again, for backward; the gradients of what trains are scattered
    once. A frozen embedding has no backward: FSDP gathers it once, or, where only backward spreads units again, never again;
    `fully_shard` fetches it ahead all the same. The root stays as it is."""
    rows = shares(model, world.size, config.strategy == "fsdp2", 0, config.compile)
    trains = any(row.trainable == row.parameters for row in rows if row.name == "model.embed_tokens")
    gathered = 0
    for row in rows:
        stays, below = (
            config.sharding != "full_shard",
            row.name == "model.embed_tokens" and not trains and config.strategy == "fsdp",
        )
        times = 2 - (row.name == "(what is left)" or stays) - below
        gathered += row.count * row.parameter_bytes * times
    scattered = sum(row.count * row.gradient_bytes for row in rows)
    return {"_allgather_base_": gathered * world.size, "_reduce_scatter_base_": scattered * world.size}


def as_it_is(module: nn.Module, **options: object) -> None:
    """A compiler that changes nothing."""
    module._compiled_call_impl = module._call_impl  # type: ignore[assignment]


def measured(rank: int) -> dict[str, Any]:
    plain = nn.Module.compile
    nn.Module.compile = as_it_is  # type: ignore[method-assign]  # the units are what counts here
    found: dict[str, Any] = {}
    with process_group(ParallelConfig(strategy="fsdp")) as world:
        for name, settings in SETTINGS.items():
            config = ParallelConfig(precision="fp32", **settings)
            for method in METHODS:
                model = build(method)
                wanted = expected(model, world, config)
                placed, optimizer = wrap_model(model, config, OptimConfig(), world)
                batches = [collate(samples(4)[rank::2], world.device)]
                train_step(placed, optimizer, batches, world, 1.0, 0)  # the first one also sets up
                with Traffic() as traffic:
                    train_step(placed, optimizer, batches, world, 1.0, 1)
                found[f"{name}, {method}"] = [dict(traffic.bytes), wanted]
    nn.Module.compile = plain  # type: ignore[method-assign]
    return found


def test_bytes_per_step_are_those_of_the_formula(tmp_path: Path) -> None:
    for name, (counted, wanted) in spawn(2, measured, tmp_path=tmp_path)[0].items():
        assert counted == wanted, name
