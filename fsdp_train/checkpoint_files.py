"""Checkpoints as directories: which there are, whether they are whole, and removing them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from fsdp_train.parts import digest_of
from fsdp_train.world import World
from llama.errors import InputError
from llama.files import read_json

STATE_FILE = "state.json"  # written last


def state_of(path: Path) -> dict[str, Any]:
    """What `state.json` says.

    Raises:
        InputError: it is not there, or not what a checkpoint has.
    """
    state = read_json(path / STATE_FILE)
    if not {"step", "best", "identity", "files", "loss_scale"} <= state.keys() or not isinstance(state["identity"], dict):
        raise InputError(f"{path / STATE_FILE} is not the state of a checkpoint")
    return state


def damage_of(path: Path, state: dict[str, Any], world: World) -> str:
    """What is missing or has changed since it was written, of the files that this process looks at; all look at all."""
    for name, digest in list(state["files"].items())[world.rank :: world.size]:
        file = path / Path(name).name
        if not file.is_file() or digest_of(file) != digest:
            return f"{file} is missing or damaged"
    return ""


def drop_later(directory: Path, step: int) -> list[Path]:
    """Remove the checkpoints beyond `step`, where a run starts anew: they belong to the one that it replaces. And what a killed
    process left unfinished."""
    for unfinished in directory.glob(".step_*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    later = [path for path in checkpoints(directory) if int(path.name.removeprefix("step_")) > step]
    for path in later:
        remove(path)
    return later


def remove(path: Path) -> None:
    """Take the name away first: what is killed half-way through this must not look whole."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    path.rename(hidden)
    shutil.rmtree(hidden)


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
