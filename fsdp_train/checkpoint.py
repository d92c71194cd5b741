"""Saving and resuming at a step: what trains, its optimizer state, and one integer for the data's position.

A checkpoint is a directory `step_00000100` with one safetensors file per process (its shards) and `state.json`. It is written
under a temporary name and renamed when complete, so a directory of that name is whole. Randomness needs no saving: the data's
order and dropout are functions of (seed, step). Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fsdp_train.data import Dataset
from fsdp_train.parallel import World
from fsdp_train.settings import option
from llama.errors import InputError, listing
from llama.files import read_json, write_json

STATE_FILE = "state.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving on the way, to continue after an interruption."""

    every: int = option(500, "steps between checkpoints (0: none)")
    keep: int = option(2, "how many of the newest to keep")
    resume: str = option(
        "auto", "auto: from the newest checkpoint in output_dir; none: start over; or a checkpoint directory", "auto|none|DIR"
    )

    def __post_init__(self) -> None:
        if self.every < 0:
            raise InputError(f"--checkpoint.every {self.every}: expected at least 0 steps")
        if self.keep < 1:
            raise InputError(f"--checkpoint.keep {self.keep}: expected at least 1")


def data_fingerprint(data: Dataset) -> str:
    """A hash of all ids and labels in order."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in data.samples:
        digest.update(sample.ids.tobytes())
        digest.update(sample.labels.tobytes())
    return digest.hexdigest()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """This process's shard of each trained parameter and of its optimizer state, by name. There is no state yet for what
    gradual unfreezing has not reached."""
    for name, parameter in _optimised(model, optimizer):
        yield f"parameter/{name}", parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}/{name}", value


def _optimised(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    known = {p for group in optimizer.param_groups for p in group["params"]}
    return [(name, p) for name, p in model.named_parameters() if p in known]


def save_checkpoint(
    directory: Path,
    step: int,
    keep: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    identity: Mapping[str, Any],
) -> None:
    """Write `directory/step_...`, then remove all but the newest `keep`. All processes must call it.

    Args:
        identity: what must be the same for a resumed run to continue this one.

    Raises:
        InputError: on every process, where any of them could not write.
    """
    final = directory / f"step_{step:08d}"
    temporary = directory / f".{final.name}.tmp"
    try:
        with world.together(), _written(final):
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with world.together(), _written(final):
            save_file({name: t.cpu().contiguous() for name, t in _tensors(model, optimizer)}, temporary / _file(world.rank))
        with world.together(), _written(final):
            if world.rank == 0:
                write_json(temporary / STATE_FILE, {"step": step, "world": world.size, "identity": dict(identity)})
                temporary.rename(final)
                for old in checkpoints(directory)[:-keep]:
                    shutil.rmtree(old)
    except InputError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Name the checkpoint and the cause where it cannot be written: a full disk, say."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(f"the checkpoint {path} could not be written: {error}; those before it are whole") from error


def room_for(config: CheckpointConfig, directory: Path, trained: int, total_steps: int) -> int:
    """Bytes that the checkpoints still to come take at once: for each trained number itself and two moments, in fp32."""
    due = 0 if not config.every else (total_steps - 1) // config.every
    return 12 * trained * max(0, min(due, config.keep + 1) - len(checkpoints(directory)))


def drop_later(directory: Path, step: int) -> list[Path]:
    """Remove the checkpoints beyond `step`, where a run starts anew: they belong to the one that it replaces."""
    later = [path for path in checkpoints(directory) if int(path.name.removeprefix("step_")) > step]
    for path in later:
        shutil.rmtree(path)
    return later


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    return sorted(p for p in directory.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name) and (p / STATE_FILE).is_file())


def find_checkpoint(resume: str, directory: Path) -> Path | None:
    """The checkpoint that `--checkpoint.resume` means; None to start from the beginning.

    Raises:
        InputError: a directory that is not a checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return next(reversed(checkpoints(directory)), None)
    if not (Path(resume) / STATE_FILE).is_file():
        raise InputError(
            f"--checkpoint.resume {resume}: not a checkpoint (no {STATE_FILE}); expected auto, none or step_NNNNNNNN"
        )
    return Path(resume)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, identity: Mapping[str, Any]
) -> int:
    """Put the saved state in place; return the number of steps done.

    Raises:
        InputError: the run is another one (naming what differs), the number of processes changed, or the file is damaged.
    """
    state = read_json(path / STATE_FILE)
    if not (isinstance(state.get("identity"), dict) and {"step", "world"} <= state.keys()):
        raise InputError(f"{path / STATE_FILE} is not the state of a checkpoint")
    saved = state["identity"]
    if different := [key for key in {**saved, **identity} if saved.get(key) != identity.get(key)]:
        changes = "; ".join(f"{key} was {saved.get(key)!r}, is {identity.get(key)!r}" for key in different)
        raise InputError(f"{path} belongs to another run: {changes}. --checkpoint.resume none starts over")
    if state["world"] != world.size:
        raise InputError(f"{path} was written by {state['world']} processes, this run has {world.size}; start as many")
    try:
        tensors = load_file(path / _file(world.rank))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path / _file(world.rank)} is missing or damaged: {error}") from None
    with torch.no_grad():
        for name, parameter in _optimised(model, optimizer):
            shapes = {"parameter": parameter.shape, **_state_shapes(parameter)}
            own = {key: tensors.pop(f"{key}/{name}") for key in shapes if f"{key}/{name}" in tensors}
            if {key: tensor.shape for key, tensor in own.items()} not in (shapes, {"parameter": parameter.shape}):
                raise InputError(f"{path / _file(world.rank)} does not fit this model: {name} or its optimizer state differs")
            parameter.copy_(own.pop("parameter"))
            if own:
                optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in own.items()}
    if tensors:
        raise InputError(f"{path / _file(world.rank)} does not fit this model: {listing(tensors)} have no place in it")
    return int(state["step"])


def _state_shapes(parameter: Tensor) -> dict[str, torch.Size]:
    """Of AdamW's state for a parameter."""
    return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}


def _file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
