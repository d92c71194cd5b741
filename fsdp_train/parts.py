"""What a process holds of a run's state, as `torch.distributed.checkpoint` stores it and reads it into other parts again.

A tensor is stored laid out in a row, in whatever parts the processes had. DCP's planners are its place for such a thing: they
say what is written, and what must be read from where.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from fsdp_train.optim import Optimizer
from fsdp_train.parallel import local_part, plain_name, spread_again

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """What this process holds of one parameter of the plain model: `count` of its `size` elements, laid out in a row, from
    `start`. They stand at `offset` in the local, flattened part of `held`, which is the parameter that the optimizer knows."""

    name: str
    size: int
    start: int
    count: int
    held: nn.Parameter
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of a tensor that is laid out like `held`: itself, its gradient, its optimizer state. A view."""
        return local_part(tensor).view(-1)[self.offset : self.offset + self.count]


def pieces(model: nn.Module) -> Iterator[Piece]:
    """Of every parameter, in the model's order, whatever the strategy; without those of which nothing is here."""
    spread_again(model)
    for name, parameter in model.named_parameters():
        if "_flat_param" in name:
            flat = cast(Any, parameter)
            for fqn, size, part in zip(flat._fqns, flat._numels, flat._shard_param_infos, strict=True):
                if part.in_shard:
                    whole = plain_name(name.removesuffix("_flat_param") + fqn)
                    yield Piece(whole, size, part.intra_param_start_idx, part.numel_in_shard, parameter, part.offset_in_shard)
            continue
        start, count = 0, local_part(parameter).numel()
        if isinstance(parameter, DTensor):
            shape, mesh = parameter.shape, parameter.device_mesh
            start = -(-shape[0] // mesh.size(-1)) * mesh.get_local_rank(mesh.ndim - 1) * (parameter.numel() // shape[0])
        if count:
            yield Piece(plain_name(name), parameter.numel(), start, count, parameter)


@dataclass(frozen=True)
class Part:
    """`values` are elements `start` ... of a tensor of `size` elements, laid out in a row."""

    values: Tensor
    start: int
    size: int

    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), self.values.shape)


def parts_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Part]:
    """This process's part of all that trains and its optimizer state, as views. There is no state yet for what gradual
    unfreezing has not reached, and before the first step."""
    known = {p for group in optimizer.param_groups for p in group["params"]}
    found = {}
    for piece in pieces(model):
        if piece.held not in known:
            continue
        state = optimizer.state.get(piece.held, {})
        for kind, tensor in (("parameter", piece.held.detach()), *((key, state[key]) for key in MOMENTS if key in state)):
            found[f"{kind}/{piece.name}"] = Part(piece.of(tensor), piece.start, piece.size)
        if piece.start == 0 and "step" in state:
            found[f"step/{piece.name}"] = Part(state["step"].view(1), 0, 1)
    return found


class Writes(DefaultSavePlanner):
    """Plans to write `Part`s. What several processes hold alike is written by one of them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(key, part) for key, part in self.state_dict.items()])
        return self.plan

    @staticmethod
    def _item(key: str, part: Part) -> WriteItem:
        data = TensorWriteData(part.chunk(), TensorProperties.create_from_tensor(part.values), torch.Size([part.size]))
        return WriteItem(MetadataIndex(key, data.chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        found: Part = self.state_dict[index.fqn]
        return found.values


class Reads(DefaultLoadPlanner):
    """Plans to read `Part`s, each out of whatever parts were written."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored: Any = self.metadata.state_dict_metadata
        return LoadPlan(
            [
                item
                for key, part in self.state_dict.items()
                for item in create_read_items_for_chunk_list(key, stored[key], [part.chunk()])
            ]
        )

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found: Part = self.state_dict[index.fqn]
        return found.values


def digest_of(path: Path) -> str:
    """A hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def rank_of(path: Path) -> int:
    """Which process wrote a file of `HuggingFaceStorageWriter`."""
    found = re.match(r"shard-(\d+)-", path.name)
    assert found is not None, path
    return int(found[1]) - 1


def cause_of(error: BaseException) -> BaseException:
    """The innermost reason: DCP wraps what went wrong on each process."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error.__cause__
    return cause_of(inner) if inner is not None else error
