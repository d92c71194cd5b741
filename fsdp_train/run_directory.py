"""The directory of one run: a name that is taken by creating it, and what it may hold.

`mkdir` is what only one of several runs can do, so the name of a new directory is taken by it. One
in which a run writes is locked (fsdp_train/run_lock.py).

Nothing in a directory is ever removed for a new run. `--checkpoint.overwrite true` moves what is
there to `replaced-<time>/`; what a killed run left half-written under a temporary name is litter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fsdp_train.build import ADAPTER_METHODS
from fsdp_train.checkpoint_files import STATE_FILE, checkpoints, is_checkpoint, state_of
from fsdp_train.config import RunConfig
from fsdp_train.run_lock import RunLock
from fsdp_train.settings import values_of
from llama.errors import InputError, listing
from llama.files import cannot_write

RESULTS = ("adapter", "model")  # what a finished run leaves
FILES = ("config.toml", "metrics.jsonl", "layer_ranking.csv", "layer_ranking.png")
CHECKPOINTS = "checkpoints"


# --- the name -----------------------------------------------------------------------------------


class RunDirectory:
    """A run's directory, created and locked by this process until `close`.

    Attributes:
        path: of the directory.
        lock: held; ask it before writing.
    """

    def __init__(self, config: RunConfig, wait: float, tell: Callable[[str], None]) -> None:
        """Create the directory that the settings name (or a new one below `runs/`) and lock it.

        Args:
            config: the run's settings.
            wait: seconds to wait for a run that holds the lock.
            tell: for people.

        Raises:
            InputError: it cannot be written, or another run is writing in it.
        """
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        if not config.train.output_dir and restarts:
            raise InputError("torchrun --max-restarts: give --train.output_dir, where a restarted run finds its checkpoints")
        self._made: list[Path] = []  # directories that did not exist before, outermost first
        try:
            if config.train.output_dir:
                self.path = Path(config.train.output_dir)
                self._make(self.path)
            else:
                self.path = self._take_new_name(Path("runs"), config.finetune.method)
            self.lock = RunLock(self.path, wait, tell)
        except OSError as error:
            self._remove_if_empty()
            path = config.train.output_dir or "runs"
            raise InputError(f"--train.output_dir {cannot_write(path, error)}") from None
        except BaseException:
            self._remove_if_empty()
            raise

    def close(self) -> None:
        """Release the lock. A directory that was made for nothing is removed."""
        self.lock.release()
        self._remove_if_empty()

    def _make(self, path: Path) -> None:
        """`mkdir -p`, remembering what was made."""
        existing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise InputError(f"--train.output_dir {path}: {existing} is not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(f"--train.output_dir {path}: {existing} cannot be written")
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for one in reversed(missing):
            with suppress(FileExistsError):  # another run makes the same parent
                one.mkdir()
                self._made.append(one)

    def _take_new_name(self, parent: Path, method: str) -> Path:
        """`parent`/`method`-NNN, the first number that nobody has: whoever creates it has it."""
        self._make(parent)
        numbers = [p.name.rpartition("-")[2] for p in parent.glob("*-[0-9]*")]
        number = max((int(n) for n in numbers if n.isdigit()), default=0)
        while True:
            number += 1
            path = parent / f"{method}-{number:03d}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            self._made.append(path)
            return path

    def _remove_if_empty(self) -> None:
        with suppress(OSError):  # not empty: somebody keeps something there
            for path in reversed(self._made):
                path.rmdir()


# --- what it holds ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beginning:
    """Where a run begins, as what its directory holds and its settings say.

    Attributes:
        candidates: checkpoints to go on from, first choice first; none to start from the base.
        own: whether the first of them is the run's own.
        replaces: what the directory holds is moved aside before the first step.
    """

    candidates: list[Path]
    own: bool = False
    replaces: bool = False


def beginning_of(config: RunConfig, path: Path, command: str) -> Beginning:
    """What to do with what is in the run's directory `path`.

    The newest checkpoint of the directory wins over `--checkpoint.resume DIR`, which is where a run
    begins that has none of its own: so the same command, given again, goes on. `none` and
    `--checkpoint.overwrite` start over, unless it was this very command (`command_of`) that made
    the checkpoints: then it is a restart, and goes on too.

    Raises:
        InputError: the directory holds a finished run, or checkpoints that `none` would not use;
            nothing is replaced unless the settings say so.
    """
    resume, overwrite = config.checkpoint.resume, config.checkpoint.overwrite
    own = checkpoints(path / CHECKPOINTS)[::-1]
    finished = [path / name for name in RESULTS if (path / name).exists()]
    # A run that torchrun started again may have come as far as its result; what is missing is done.
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    is_restart = _command_in(own) == command and (restarted or not finished)
    elsewhere = [] if resume in ("auto", "none") else [Path(resume)]
    if overwrite and not is_restart:
        return Beginning(_checked(elsewhere), replaces=bool(own or finished))
    kept = "adapter" if config.finetune.method in ADAPTER_METHODS else "model"
    if other := [result for result in finished if result.name != kept]:
        raise InputError(f"{path} holds the result of another method ({other[0]}); choose another --train.output_dir")
    if finished and not restarted:
        raise InputError(
            f"{path} holds a finished run ({finished[0]}); choose another --train.output_dir, or"
            " --checkpoint.overwrite true, which moves it aside"
        )
    if resume == "none" and own and not is_restart:
        raise InputError(
            f"--checkpoint.resume none: {path} holds checkpoints (the newest: {own[0].name}); leave"
            " it out to go on from there, or add --checkpoint.overwrite true, which moves them aside"
        )
    if own:
        return Beginning([*own, *elsewhere], own=True)
    return Beginning(_checked(elsewhere))


def command_of(config: RunConfig) -> str:
    """A hash of all settings of a run, by which it knows that it was this command that began it."""
    settings = {name: str(value) for name, value in values_of(config).items()}
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _command_in(own: Sequence[Path]) -> str | None:
    """The `command_of` the run that wrote the newest of these checkpoints that can be read."""
    for path in own:
        with suppress(InputError):
            return str(state_of(path)["command"])
    return None


def _checked(elsewhere: list[Path]) -> list[Path]:
    for path in elsewhere:
        if not is_checkpoint(path):
            raise InputError(
                f"--checkpoint.resume {path}: not a checkpoint (no {STATE_FILE}); expected auto, none or step_NNNNNNNN"
            )
    return elsewhere


def set_aside(path: Path, things: Iterable[Path]) -> Path:
    """Move things out of the run's directory `path` into a new `replaced-<time>/` in it."""
    stamp = time.strftime("replaced-%Y%m%d-%H%M%S")
    place = path / stamp
    number = 1
    while place.exists():
        number += 1
        place = path / f"{stamp}-{number}"
    for thing in things:
        target = place / thing.relative_to(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        thing.rename(target)
    return place


def belongings(path: Path) -> list[Path]:
    """What a run leaves in its directory, as far as it is there."""
    names = (*RESULTS, CHECKPOINTS, *FILES)
    return [path / name for name in names if (path / name).exists()]


_LITTER = re.compile(
    r"\.?\.rehearsal(\..*\.(tmp|old))?"
    r"|\.(adapter|model|step_\d{8}|config\.toml|layer_ranking\.csv)(\..*)?\.(tmp|old)"
)


def remove_litter(path: Path) -> str:
    """Remove what killed runs left under temporary names in the run's directory.

    A result that was being replaced when its run was killed, and whose successor never got its
    name, gets its own name back.

    Returns:
        A line for people, empty where there was none.
    """
    found = []
    for place in (path, path / CHECKPOINTS):
        if place.is_dir():
            found += [p for p in place.iterdir() if _LITTER.fullmatch(p.name)]
    lines = []
    for old in [p for p in found if p.suffix == ".old"]:
        result = path / old.name.split(".")[1]
        if result.name in RESULTS and not result.exists():
            old.rename(result)
            found.remove(old)
            lines.append(f"gave {result} its name back: a killed run was about to replace it")
    freed = sum(_size(p) for p in found)
    for one in found:
        if one.is_dir():
            shutil.rmtree(one)
        else:
            one.unlink()
    if found:
        names = listing(p.name for p in found)
        lines.append(f"removed what a killed run left half-written: {names} ({freed / 1e6:.2f} MB)")
    return "\n".join(lines)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
