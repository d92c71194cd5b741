"""The wrap policy: which modules are sharded as units of their own, and the arithmetic of what each process then holds.

Nothing here wraps anything. One policy drives `FullyShardedDataParallel` and `fully_shard` alike (fsdp_train/parallel.py).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from llama.model import DecoderLayer

MOMENTS = 2  # AdamW's, in the masters' dtype


def sharding_units(model: nn.Module, whole_layers: bool = False) -> list[nn.Module]:
    """The modules that are sharded as units of their own; the root has what is left (final norm, head, a tied embedding).

    A unit is each decoder layer, the embedding, and each maximal module whose parameters all train inside a frozen parent (an
    adapter's leaf, a projection), or are all frozen inside a parent that trains (the norm beside a tied weight): trained and
    frozen parameters of one unit would share a flat parameter, whose gradient is as large as all of it.
    `ModuleList` and `ModuleDict` are never units: a unit gathers when its forward runs, and theirs never does. A weight that
    two modules share stays in the root, which is gathered for both.

    Args:
        whole_layers: nothing within a decoder layer is a unit: a compiled layer must not be interrupted to gather.
    """
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    shared = {p for p, modules in owners.items() if modules > 1}
    units = []

    def visit(parent: nn.Module, unit_trains: bool) -> None:
        for child in parent.children():
            if isinstance(child, CheckpointWrapper):  # never a unit: it is its layer, called in another way
                child = child._checkpoint_wrapped_module
            called = not isinstance(child, nn.ModuleList | nn.ModuleDict)
            required = {p.requires_grad for p in child.parameters()}
            differs = called and required == {not unit_trains}
            always = isinstance(child, DecoderLayer | nn.Embedding)
            is_unit = (always or differs) and shared.isdisjoint(child.parameters())
            if is_unit:
                units.append(child)
            if not (whole_layers and isinstance(child, DecoderLayer)):
                visit(child, required == {True} if is_unit else unit_trains)

    visit(model, any(p.requires_grad for p in shared) or all(p.requires_grad for p in model.parameters()))
    return units


@dataclass(frozen=True)
class Share:
    """What one process holds of a unit, or of several alike (`name` with numbers replaced by *): elements of the whole unit,
    bytes of this process's part."""

    name: str
    count: int
    parameters: int
    trainable: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def shares(model: nn.Module, shards: int, by_row: bool, rank: int = 0, whole_layers: bool = False) -> list[Share]:
    """The arithmetic, from shapes alone: the model before it is wrapped.

    A flat parameter of n elements gives each of W processes ceil(n / W), padded; `fully_shard` spreads the rows of each
    parameter, ceil(rows / W) to a process while there are any. A gradient is as large as its master, AdamW's state twice.

    Args:
        shards: processes that a unit is spread over, 1 for none.
        by_row: `fully_shard`'s way.
        rank: of the process among them; the first has the largest share.
        whole_layers: as in `sharding_units`.
    """
    names = {module: name for name, module in model.named_modules()}
    units = [*sharding_units(model, whole_layers), model] if shards > 1 else [model]
    inner, rows = set(units), []
    for unit in units:
        own = _own_parameters(unit, inner)
        if not own:
            continue
        elements = sum(p.numel() for p in own)
        if by_row or shards == 1:
            parts = [(p, _rows(p, shards, rank) * (p.numel() // p.shape[0])) for p in own]
        else:
            flat = -(-elements // shards)
            parts = [(own[0], flat)]
        held = sum(part * p.itemsize for p, part in parts)
        trained = sum(part * p.itemsize for p, part in parts if p.requires_grad)
        name = re.sub(r"\d+", "*", names[unit]) or "(what is left)"
        trainable = sum(p.numel() for p in own if p.requires_grad)
        rows.append(Share(name, 1, elements, trainable, held, trained, MOMENTS * trained))
    merged: dict[Share, int] = Counter(rows)
    return [replace(share, count=count) for share, count in merged.items()]


def _own_parameters(unit: nn.Module, units: set[nn.Module]) -> list[Tensor]:
    """The parameters of a unit without those of units within it, each once."""
    found: dict[Tensor, None] = {}

    def visit(module: nn.Module) -> None:
        found.update(dict.fromkeys(module.parameters(recurse=False)))
        for child in module.children():
            if child not in units:
                visit(child)

    visit(unit)
    return list(found)


def _rows(parameter: Tensor, shards: int, rank: int) -> int:
    """Rows of a parameter on process `rank` of `shards`."""
    rows = parameter.shape[0]
    each = -(-rows // shards)
    return max(0, min(each, rows - rank * each))


def table(rows: list[Share]) -> str:
    """For people."""
    lines = [f"  {'unit':<52} {'parameters':>16} {'trainable':>14}   bytes here: parameters, gradients, optimizer"]
    total = [0] * 5
    for row in rows:
        numbers = [row.parameters, row.trainable, row.parameter_bytes, row.gradient_bytes, row.optimizer_bytes]
        total = [t + row.count * n for t, n in zip(total, numbers, strict=True)]
        name = f"{row.count} x {row.name}" if row.count > 1 else row.name
        lines.append(_line(name, [row.count * n for n in numbers]))
    return "\n".join([*lines, _line("all", total)])


def _line(name: str, numbers: list[int]) -> str:
    parameters, trainable, *held = numbers
    return f"  {name:<52} {parameters:>16,} {trainable:>14,}   " + " ".join(f"{n:>15,}" for n in held)


def total_bytes(rows: list[Share]) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer state on this process."""
    return (
        sum(r.count * r.parameter_bytes for r in rows),
        sum(r.count * r.gradient_bytes for r in rows),
        sum(r.count * r.optimizer_bytes for r in rows),
    )
