"""Saving and resuming at a step, with `torch.distributed.checkpoint`: written beside training, read by any number of processes.

A checkpoint is a directory `step_00000100`: safetensors files with what trains and its optimizer state, each process its own
part, and `state.json`, which is written last, under a temporary name of the directory: one that has its name is whole. What is
stored are the plain model's parameters, each laid out in a row of which every process holds a part (`pieces`), so any strategy
on any number of processes reads what any other wrote. The schedule, the data's order and dropout are functions of (seed, step),
so nothing of them needs to be stored but the step. Nothing is pickled (DCP's own metadata file would be).
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from fsdp_train.checkpoint_files import STATE_FILE, checkpoints, damage_of, find_checkpoints, remove, state_of
from fsdp_train.data import Dataset
from fsdp_train.optim import LossScaler, Optimizer
from fsdp_train.parts import MOMENTS, Part, Reads, Writes, cause_of, digest_of, parts_of, pieces, rank_of
from fsdp_train.settings import option
from fsdp_train.world import World
from llama.errors import InputError, nearest
from llama.files import read_json, write_json

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
            for key, part in parts_of(self.model, self.optimizer).items()
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
        world, writer = self.world, HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        try:
            with self._together():
                if world.rank == 0:
                    shutil.rmtree(temporary, ignore_errors=True)
                    temporary.mkdir(parents=True)
            dcp.save(parts, storage_writer=writer, planner=Writes(), process_group=world.quiet, no_dist=world.size == 1)
            mine: dict[str, str] = {}
            with self._together():
                mine = {p.name: digest_of(p) for p in temporary.glob("*.safetensors") if rank_of(p) == world.rank}
            state["files"] = {name: d for found in world.gather(mine, world.quiet) for name, d in found.items()}
            with self._together():
                if world.rank == 0:
                    write_json(temporary / STATE_FILE, state)
                    if final.exists():  # one that was damaged, or of a run that was resumed from before it
                        remove(final)
                    temporary.rename(final)
                    self._remove_old()
        except BaseException as error:  # DCP's own errors are not Exceptions
            self._error = f"the checkpoint {final} could not be written: {cause_of(error)}; those before it are whole"
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What one process cannot write, all of them know."""
        with self.world.together(self.world.quiet):
            try:
                yield
            except OSError as error:
                raise InputError(str(error)) from None

    def _remove_old(self) -> None:
        found = checkpoints(self.directory)
        scored = [(loss, path) for path in found if (loss := read_json(path / STATE_FILE).get("eval_loss")) is not None]
        best = min(scored)[1] if scored else None
        for path in found[: -self.config.keep]:
            if path != best:
                remove(path)

    def resume(self) -> int:
        """Put the state of the checkpoint that the settings mean in place; return the number of steps done.

        A damaged one is passed over, and said to be; where the settings name it, it is refused.

        Raises:
            InputError: it belongs to another run (naming what differs), or is damaged, and every one before it.
        """
        wanted = self.world.gather(find_checkpoints(self.config.resume, self.directory))[0]  # as rank 0 sees the directory
        for path in wanted:
            state: dict[str, Any] = {}
            damage = ""
            try:
                state = state_of(path)
            except InputError as error:
                damage = str(error)
            damage = self._first(damage)
            if not damage:
                with self.world.together():
                    self._check_identity(path, state)
                damage = self._first(damage_of(path, state, self.world))
            if not damage:
                self._load(path)
                self.scaler.load(state["loss_scale"])
                self._best = state["best"]
                self.tell(f"resumed from {path}: {state['step']:,} steps done")
                return int(state["step"])
            if path is wanted[-1]:
                raise InputError(f"{damage}; no checkpoint before it is whole. --checkpoint.resume none starts over")
            self.tell(f"{damage}; falling back to the one before")
        return 0

    def _first(self, text: str) -> str:
        """The first text that is not empty, of all processes."""
        return next((one for one in self.world.gather(text) if one), "")

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
        parts = parts_of(self.model, self.optimizer)
        for piece in own:  # a parameter that began on another process has its count of steps here too
            if piece.held in self.optimizer.state:
                parts[f"step/{piece.name}"] = Part(self.optimizer.state[piece.held]["step"].view(1), 0, 1)
        with self.world.together():
            for key, part in parts.items():
                found: Any = stored.get(key)
                if found is None or sum(chunk.sizes[0] for chunk in found.chunks) != part.size:
                    raise InputError(f"{path} does not fit this model: {key} is missing, incomplete or of another size")
        dcp.load(parts, storage_reader=reader, planner=Reads(), process_group=self.world.quiet, no_dist=self.world.size == 1)


def room_for(config: CheckpointConfig, directory: Path, trained: int, total_steps: int, evaluations: int) -> int:
    """Bytes that the checkpoints still to come take at once: for each trained number itself and two moments, in fp32. The best
    one stays beside the newest, and the next is written before the oldest goes."""
    due = -(-total_steps // config.every) + evaluations if config.every else 0
    return 12 * trained * max(0, min(due, config.keep + 1 + (evaluations > 0)) - len(checkpoints(directory)))
