"""Saving and resuming at a step, with `torch.distributed.checkpoint`: written beside training, read by any number of processes.

A checkpoint is a directory `step_00000100`: safetensors files with what trains and its optimizer state, each process its own
part, and `state.json`, which is written last, under a temporary name of the directory: one that has its name is whole. What is
stored are the plain model's parameters, each laid out in a row of which every process holds a part (`pieces`), so any strategy
on any number of processes reads what any other wrote. The schedule and dropout are functions of (seed, step), and the data's
order is one of (seed, epoch, index), so nothing of them is stored but the steps done and the samples consumed. Nothing is
pickled (DCP's own metadata file would be).
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from fsdp_train.checkpoint_files import FORMAT, STATE_FILE, checkpoints, damage_of, remove, state_of
from fsdp_train.identity import MAY_CHANGE, changes
from fsdp_train.optim import LossScaler, Optimizer
from fsdp_train.order import Position
from fsdp_train.parts import MOMENTS, Part, Reads, Writes, cause_of, digest_of, parts_of, pieces, rank_of
from fsdp_train.settings import option
from fsdp_train.step import NonFiniteError
from fsdp_train.world import World
from llama.errors import InputError, listing, nearest
from llama.files import cannot_write, read_json, write_json


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving on the way, to continue after an interruption."""

    every: int = option(500, "steps between checkpoints (0: none, unless a signal asks for one)")
    keep: int = option(2, "how many of the newest to keep; the one with the best evaluation loss stays too")
    resume: str = option(
        "auto",
        "where to begin if output_dir holds no checkpoint: auto, none: at the base; or at this checkpoint. One that"
        " output_dir holds goes on (none refuses that, unless the same command made it)",
        "auto|none|DIR",
    )
    overwrite: bool = option(
        False, "start over in an output_dir with checkpoints or a result, which move to replaced-TIME/ in it"
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


# --- checkpoints of a run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """How far a run has come: optimizer steps done, and where in the data the next one begins."""

    step: int
    position: Position


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint said.

    Attributes:
        path: of the checkpoint.
        progress: of the run that wrote it.
        samples: of an epoch, in the data of that run.
        damaged: checkpoints that were passed over to get to it.
    """

    path: Path
    progress: Progress
    samples: int
    damaged: list[Path]


@dataclass
class Checkpoints:
    """Those of one run. All processes call the same methods in the same order.

    Attributes:
        may_write: raises InputError where this run has lost the right to write here; called on rank 0.
        identity: what must be the same for a resumed run to continue this one (`identity_of`).
        facts: what else is kept in `state.json`, for whoever resumes.
        settings: all settings of the run as text, by dotted name; kept too.
        tell: for people.
    """

    config: CheckpointConfig
    directory: Path
    world: World
    model: nn.Module
    optimizer: Optimizer
    scaler: LossScaler
    may_write: Callable[[], None]
    identity: Mapping[str, str]
    facts: Mapping[str, Any]
    settings: Mapping[str, str]
    tell: Callable[[str], None]
    _best: float | None = field(default=None, init=False)
    _writer: threading.Thread | None = field(default=None, init=False)
    _error: str | None = field(default=None, init=False)

    def save(self, progress: Progress, samples: int, eval_loss: float | None = None) -> None:
        """Copy the state to memory of its own and write it while training goes on; first wait for the one before.

        Args:
            progress: what is done.
            samples: of an epoch.
            eval_loss: on held-out data, if it was measured at this step.

        Raises:
            InputError: on every process, where any of them could not write the one before.
            NonFiniteError: on every process; what is not finite is never written.
        """
        self.finish()
        self.check_finite(progress.step)
        copies = {
            key: Part(part.values.to("cpu", copy=True), part.start, part.size)
            for key, part in parts_of(self.model, self.optimizer).items()
        }
        if self.is_best(eval_loss):
            self._best = eval_loss
        state = {
            "format": FORMAT,
            "step": progress.step,
            "epoch": progress.position.epoch,
            "samples": progress.position.samples,
            "samples_per_epoch": samples,
            "eval_loss": eval_loss,
            "best": self._best,
            "world": self.world.size,
            "loss_scale": self.scaler.state(),
            "identity": dict(self.identity),
            "settings": dict(self.settings),
            **self.facts,
        }
        self._writer = threading.Thread(target=self._write, args=(copies, state), daemon=True)
        self._writer.start()

    def check_finite(self, step: int) -> None:
        """Raise NonFiniteError, on every process, if what trains or its optimizer state is not finite after `step` steps.

        An update that is too large (its gradient was finite, or it would not have been made) shows in the loss one step later
        only, and in a weight that no sample of that step reads perhaps never.
        """
        if names := self.not_finite():
            raise NonFiniteError(f"step {step}: its update left values that are not finite in {listing(names, 3)}")

    def not_finite(self) -> list[str]:
        """Names of the trained tensors that are not finite, or have such optimizer state; the same on every process."""
        parts = parts_of(self.model, self.optimizer)
        flags = [part.values.isfinite().all() for part in parts.values()]
        finite = torch.stack(flags).tolist() if flags else []  # one wait for the device
        mine = {key.partition("/")[2] for key, good in zip(parts, finite, strict=True) if not good}
        return sorted({name for names in self.world.gather(sorted(mine)) for name in names})

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
                    self.may_write()
                    temporary.rename(final)
                    self.remove_old()
        except BaseException as error:  # DCP's own errors are not Exceptions
            size = sum(part.values.nbytes for part in parts.values())
            why = cannot_write(final, cause_of(error), size)
            self._error = f"the checkpoint {why}; those before it are whole"
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What one process cannot write, all of them know."""
        with self.world.together(self.world.quiet):
            try:
                yield
            except OSError as error:
                raise InputError(error.strerror or str(error)) from None

    def remove_old(self) -> None:
        """Remove all but the newest `keep` and the one with the best evaluation loss. For rank 0."""
        found = checkpoints(self.directory)
        surplus = found[: -self.config.keep]
        if not surplus:
            return
        scored = []
        for path in found:
            with suppress(InputError):  # damaged: it has no loss that could be the best
                loss = read_json(path / STATE_FILE).get("eval_loss")
                if loss is not None:
                    scored.append((loss, path))
        best = min(scored)[1] if scored else None
        for path in surplus:
            if path != best:
                remove(path)

    def resume(self, candidates: Sequence[Path]) -> Resumed | None:
        """Put the state of the first of these checkpoints that is whole in place; None if there are none.

        A damaged one is passed over, and said to be.

        Raises:
            InputError: it belongs to another run (naming what differs), or all of them are damaged.
        """
        damaged: list[Path] = []
        damage = ""
        for path in candidates:
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
            if damage:
                damaged.append(path)
                others = "; falling back to the one before" if path is not candidates[-1] else ""
                self.tell(f"{damage}{others}")
                continue
            self._load(path)
            self.scaler.load(state["loss_scale"])
            if path.parent == self.directory:
                self._best = state["best"]
            position = Position(state["epoch"], state["samples"])
            return Resumed(path, Progress(state["step"], position), state["samples_per_epoch"], damaged)
        if damaged:
            raise InputError(f"{damage}; no checkpoint before it is whole. --checkpoint.overwrite true starts over")
        if self.config.accept_changes:
            self.tell("note: --checkpoint.accept_changes has no effect: there is no checkpoint to go on from")
        return None

    def _first(self, text: str) -> str:
        """The first text that is not empty, of all processes."""
        return next((one for one in self.world.gather(text) if one), "")

    def _check_identity(self, path: Path, state: dict[str, Any]) -> None:
        found = changes(state["identity"], self.identity, state["settings"], self.settings)
        refused = [change for change in found if change.group not in self.config.accept_changes]
        if refused:
            groups = list(dict.fromkeys(change.group for change in refused))
            accept = f"; --checkpoint.accept_changes {','.join(groups)} takes the change on" if all(groups) else ""
            raise InputError(
                f"{path} belongs to another run: {'; '.join(change.text for change in refused)}."
                f" Another --train.output_dir, or --checkpoint.overwrite true, starts over{accept}"
            )
        for change in found:
            self.tell(f"accepted: {change.text}")
        for group in self.config.accept_changes:
            if group not in {change.group for change in found}:
                self.tell(f"note: --checkpoint.accept_changes {group} has no effect: nothing of it differs")

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


def room_for(config: CheckpointConfig, present: int, trained: int, total_steps: int, evaluations: int) -> int:
    """Bytes that the checkpoints still to come take at once: for each trained number itself and two moments, in fp32. The best
    one stays beside the newest, and the next is written before the oldest goes; `present` are there already."""
    due = -(-total_steps // config.every) + evaluations if config.every else 0
    return 12 * trained * max(0, min(due, config.keep + 1 + (evaluations > 0)) - present)
