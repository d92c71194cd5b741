"""Where a run goes: a directory that can be written, and that holds nothing which nobody said to replace."""

from __future__ import annotations

import os
from pathlib import Path

from fsdp_train.build import ADAPTER_METHODS
from fsdp_train.config import RunConfig
from llama.errors import InputError


def output_directory(config: RunConfig) -> Path:
    """The directory of this run, which can be created and written. Without a name a new one below runs/.

    Raises:
        InputError: it cannot be written, or holds a finished run that nobody said to replace.
    """
    if config.train.output_dir:
        path = Path(config.train.output_dir)
    else:
        parent = Path("runs")
        taken = [int(p.name.rpartition("-")[2]) for p in parent.glob("*-[0-9]*") if p.name.rpartition("-")[2].isdigit()]
        path = parent / f"{config.finetune.method}-{max(taken, default=0) + 1:03d}"
    own, other = ("adapter", "model") if config.finetune.method in ADAPTER_METHODS else ("model", "adapter")
    if (path / other).exists():
        raise InputError(f"{path} holds the result of another method ({path / other}); choose another --train.output_dir")
    if (path / own).exists() and config.checkpoint.resume == "auto":
        raise InputError(
            f"{path} holds a finished run ({path / own}); choose another --train.output_dir,"
            " or replace it with --checkpoint.resume none"
        )
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"--train.output_dir {path}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--train.output_dir {path}: {existing} cannot be written")
    return path
