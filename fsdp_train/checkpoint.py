"""Saving and resuming at a step, with `torch.distributed.checkpoint`: written beside training, read by any number of processes.

A checkpoint is a directory `step_00000100`: safetensors files with what trains and its optimizer state, each process its own
part, and `state.json`, which is written last, under a temporary name of the directory: one that has its name is whole. What is
stored are the plain model's parameters, each laid out in a row of which every process holds a part (`pieces`), so any strategy
on any number of processes reads what any other wrote. The schedule, the data's order and dropout are functions of (seed, step),
so nothing of them needs to be stored but the step. Nothing is pickled (DCP's own metadata file would be).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fsdp_train.data import Dataset
from fsdp_train.optim import LossScaler, Optimizer
from fsdp_train.parallel import pieces
from fsdp_train.settings import option
from fsdp_train.world import World
from llama.errors import InputError, nearest
from llama.files import read_json, write_json

STATE_FILE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
MAY_CHANGE = ("data", "optim", "order", "batch", "precision")


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving on the way, to continue after an interruption."""

    every: int = option(500, "steps between checkpoints (0: none, unless a signal asks for one)")
    keep: int = option(2, "how many of the newest to keep; the one with the best evaluation loss stays too")
    resume: str = option(
        "auto", "auto: from the newest checkpoint in output_dir; none: start over; or a checkpoint directory", "auto|none|DIR"
    )
    accept_changes: tuple[str, ...] = option(
        (), f"resume although these differ: {', '.join(MAY_CHANGE)} (the rest must not)", "NAME,..."
    )

    def __post_init__(self) -> None:
        if self.every < 0:
            raise InputError(f"--checkpoint.every {self.every}: expected at least 0 steps")
        if self.keep < 1:
            raise InputError(f"--checkpoint.keep {self.keep}: expected at least 1")
        for name in self.accept_changes:
            if name not in MAY_CHANGE:
                raise InputError(
                    f"--checkpoint.accept_changes {name}: expected {', '.join(MAY_CHANGE)}{nearest(name, MAY_CHANGE)}"
                )


def data_fingerprint(data: Dataset) -> str:
    """A hash of all ids and labels in order."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in data.samples:
        digest.update(sample.ids.tobytes())
        digest.update(sample.labels.tobytes())
    return digest.hexdigest()


# --- parts of tensors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """`values` are elements `start` ... of a tensor of `size` elements, laid out in a row."""

    values: Tensor
    start: int
    size: int

    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), self.values.shape)


def _parts(model: nn.Module, optimizer: Optimizer) -> dict[str, Part]:
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


class _Writes(DefaultSavePlanner):
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


class _Reads(DefaultLoadPlanner):
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


# --- checkpoints of a run -----------------------------------------------------------------------------------------------


@dataclass
class Checkpoints:
    """Those of one run. All processes call the same methods in the same order.

    Attributes:
        identity: what must be the same for a resumed run to continue this one.
        tell: for people.
    """

    config: CheckpointConfig
    directory: Path
    world: World
    model: nn.Module
    optimizer: Optimizer
    scaler: LossScaler
    identity: Mapping[str, Any]
    tell: Callable[[str], None]
    _best: float | None = field(default=None, init=False)
    _writer: threading.Thread | None = field(default=None, init=False)
    _error: str | None = field(default=None, init=False)

    def save(self, step: int, eval_loss: float | None = None) -> None:
        """Copy the state to memory of its own and write it while training goes on; first wait for the one before.

        Raises:
            InputError: on every process, where any of them could not write the one before.
        """
        self.finish()
        copies = {
            key: Part(part.values.to("cpu", copy=True), part.start, part.size)
            for key, part in _parts(self.model, self.optimizer).items()
        }
        if self.is_best(eval_loss):
            self._best = eval_loss
        state = {
            "step": step,
            "eval_loss": eval_loss,
            "best": self._best,
            "world": self.world.size,
            "loss_scale": self.scaler.state(),
            "identity": dict(self.identity),
        }
        self._writer = threading.Thread(target=self._write, args=(copies, state), daemon=True)
        self._writer.start()

    def is_best(self, eval_loss: float | None) -> bool:
        """Whether it is below that of every checkpoint so far."""
        return eval_loss is not None and (self._best is None or eval_loss < self._best)

    def settle(self) -> None:
        """Give the one in flight a minute, whatever has happened to this process or others."""
        if self._writer is not None:
            self._writer.join(60)

    @property
    def failed(self) -> bool:
        """Whether this process knows that the one in flight cannot be written."""
        return self._error is not None

    def finish(self) -> None:
        """Wait until the one in flight is written.

        Raises:
            InputError: on every process, where any of them could not write it.
        """
        if self._writer is None:
            return
        self._writer.join()
        self._writer = None
        with self.world.together():
            if self._error is not None:
                raise InputError(self._error)

    def _write(self, parts: dict[str, Part], state: dict[str, Any]) -> None:
        """In a thread, over a group of its own: training's messages do not wait for these."""
        final = self.directory / f"step_{state['step']:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        try:
            if self.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            dcp.save(
                parts, storage_writer=writer, planner=_Writes(), process_group=self.world.quiet, no_dist=self.world.size == 1
            )
            mine = [p for p in temporary.glob("*.safetensors") if _rank_of(p) == self.world.rank]
            state["files"] = {
                name: digest
                for found in self.world.gather({p.name: _digest(p) for p in mine}, self.world.quiet)
                for name, digest in found.items()
            }
            if self.world.rank == 0:
                write_json(temporary / STATE_FILE, state)
                if final.exists():  # one that was damaged, or of a run that was resumed from before it
                    shutil.rmtree(final)
                temporary.rename(final)
                self._remove_old()
        except Exception as error:
            self._error = f"the checkpoint {final} could not be written: {_cause(error)}; those before it are whole"
            if self.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _remove_old(self) -> None:
        found = checkpoints(self.directory)
        scored = [(loss, path) for path in found if (loss := read_json(path / STATE_FILE).get("eval_loss")) is not None]
        best = min(scored)[1] if scored else None
        for path in found[: -self.config.keep]:
            if path != best:
                shutil.rmtree(path)

    def resume(self) -> int:
        """Put the state of the checkpoint that the settings mean in place; return the number of steps done.

        A damaged one is passed over, and said to be; where the settings name it, it is refused.

        Raises:
            InputError: it belongs to another run (naming what differs), or is damaged, and every one before it.
        """
        wanted = find_checkpoints(self.config.resume, self.directory)
        for path in wanted:
            state: dict[str, Any] = {}
            damage = ""
            try:
                state = _state_of(path)
                _verify(path, state, self.world)
            except (InputError, OSError) as error:
                damage = str(error)
            if damage := next((d for d in self.world.gather(damage) if d), ""):
                if path is wanted[-1]:
                    raise InputError(f"{damage}; no checkpoint before it is whole. --checkpoint.resume none starts over")
                self.tell(f"{damage}; falling back to the one before")
                continue
            with self.world.together():
                self._check_identity(path, state)
            self._load(path)
            self.scaler.load(state["loss_scale"])
            self._best = state["best"]
            self.tell(f"resumed from {path}: {state['step']:,} steps done")
            return int(state["step"])
        return 0

    def _check_identity(self, path: Path, state: dict[str, Any]) -> None:
        saved = state["identity"]
        different = [key for key in {**saved, **self.identity} if saved.get(key) != self.identity.get(key)]
        refused = [key for key in different if key not in self.config.accept_changes]
        if refused:
            changes = "; ".join(f"{key} was {saved.get(key)!r}, is {self.identity.get(key)!r}" for key in refused)
            may = [key for key in refused if key in MAY_CHANGE]
            accept = f"; --checkpoint.accept_changes {','.join(may)} takes the change on" if may == refused else ""
            raise InputError(f"{path} belongs to another run: {changes}. --checkpoint.resume none starts over{accept}")
        for key in different:
            self.tell(f"accepted: {key} was {saved.get(key)!r}, is {self.identity.get(key)!r}")

    def _load(self, path: Path) -> None:
        """Read straight into the parameters, and into optimizer state that is made for what has some in the files."""
        reader = HuggingFaceStorageReader(str(path))
        stored = reader.read_metadata().state_dict_metadata
        known = {p for group in self.optimizer.param_groups for p in group["params"]}
        own = [piece for piece in pieces(self.model) if piece.held in known]
        for piece in own:
            if f"exp_avg/{piece.name}" in stored and piece.held not in self.optimizer.state:
                zeros = {key: torch.zeros_like(piece.held) for key in MOMENTS}
                self.optimizer.state[piece.held] = {"step": torch.zeros((), device=zeros["exp_avg"].device), **zeros}
        parts = _parts(self.model, self.optimizer)
        for piece in own:  # a parameter that began on another process has its count of steps here too
            if piece.held in self.optimizer.state:
                parts[f"step/{piece.name}"] = Part(self.optimizer.state[piece.held]["step"].view(1), 0, 1)
        with self.world.together():
            for key, part in parts.items():
                found: Any = stored.get(key)
                if found is None or sum(chunk.sizes[0] for chunk in found.chunks) != part.size:
                    raise InputError(f"{path} does not fit this model: {key} is missing, incomplete or of another size")
        dcp.load(parts, storage_reader=reader, planner=_Reads(), process_group=self.world.quiet, no_dist=self.world.size == 1)


def _state_of(path: Path) -> dict[str, Any]:
    state = read_json(path / STATE_FILE)
    if not {"step", "identity", "files", "loss_scale"} <= state.keys() or not isinstance(state["identity"], dict):
        raise InputError(f"{path / STATE_FILE} is not the state of a checkpoint")
    return state


def _verify(path: Path, state: dict[str, Any], world: World) -> None:
    """Compare the files with what was written, each process some of them.

    Raises:
        InputError: one is missing, or has changed.
    """
    for name, digest in list(state["files"].items())[world.rank :: world.size]:
        file = path / Path(name).name
        if not file.is_file() or _digest(file) != digest:
            raise InputError(f"{file} is missing or damaged")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _rank_of(path: Path) -> int:
    """Which process wrote a file of `HuggingFaceStorageWriter`."""
    found = re.match(r"shard-(\d+)-", path.name)
    assert found is not None, path
    return int(found[1]) - 1


def _cause(error: BaseException) -> str:
    """The innermost reason: DCP wraps what went wrong on each process."""
    failures = getattr(error, "failures", None)
    inner = next(iter(failures.values()))[0] if failures else error.__cause__
    return _cause(inner) if inner is not None else str(error)


def room_for(config: CheckpointConfig, directory: Path, trained: int, total_steps: int) -> int:
    """Bytes that the checkpoints still to come take at once: for each trained number itself and two moments, in fp32. The best
    one is kept beside the newest, and the next is written before the oldest goes."""
    due = 0 if not config.every else -(-total_steps // config.every)
    return 12 * trained * max(0, min(due, config.keep + 2) - len(checkpoints(directory)))


def drop_later(directory: Path, step: int) -> list[Path]:
    """Remove the checkpoints beyond `step`, where a run starts anew: they belong to the one that it replaces. And what a killed
    process left unfinished."""
    for unfinished in directory.glob(".step_*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    later = [path for path in checkpoints(directory) if int(path.name.removeprefix("step_")) > step]
    for path in later:
        shutil.rmtree(path)
    return later


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    return sorted(p for p in directory.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name) and (p / STATE_FILE).is_file())


def find_checkpoints(resume: str, directory: Path) -> list[Path]:
    """The checkpoints that `--checkpoint.resume` means, the first choice first; none to start from the beginning.

    Raises:
        InputError: a directory that is not a checkpoint.
    """
    if resume == "none":
        return []
    if resume == "auto":
        return checkpoints(directory)[::-1]
    if not (Path(resume) / STATE_FILE).is_file():
        raise InputError(
            f"--checkpoint.resume {resume}: not a checkpoint (no {STATE_FILE}); expected auto, none or step_NNNNNNNN"
        )
    return [Path(resume)]
