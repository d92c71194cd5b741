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
FORMAT = 2  # of a checkpoint; 1 counted progress in steps, whatever their size
_KEYS = {
    *("step", "epoch", "samples", "samples_per_epoch"),
    *("best", "loss_scale", "settings", "command", "ranking"),
}


def state_of(path: Path) -> dict[str, Any]:
    """What `state.json` says.

    Raises:
        InputError: it is not there, not what a checkpoint has, or of another version.
    """
    state = read_json(path / STATE_FILE)
    strange = InputError(f"{path / STATE_FILE} is not the state of a checkpoint")
    if not isinstance(state.get("identity"), dict) or not isinstance(state.get("files"), dict):
        raise strange
    if state.get("format") != FORMAT:
        written, here = state.get("format", 1), FORMAT
        raise InputError(f"{path} was written by another version of this program (format {written}; this one reads {here})")
    if not state.keys() >= _KEYS:
        raise strange
    return state


def damage_of(path: Path, state: dict[str, Any], world: World) -> str:
    """What is missing or has changed since it was written, of the files that this process looks at; all look at all."""
    for name, digest in list(state["files"].items())[world.rank :: world.size]:
        file = path / Path(name).name
        if not file.is_file() or digest_of(file) != digest:
            return f"{file} is missing or damaged"
    return ""


def remove(path: Path) -> None:
    """Take the name away first: what is killed half-way through this must not look whole."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    path.rename(hidden)
    shutil.rmtree(hidden)


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    named = (path for path in directory.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))
    return sorted(path for path in named if is_checkpoint(path))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory whose checkpoint was written to its end."""
    return (path / STATE_FILE).is_file()
