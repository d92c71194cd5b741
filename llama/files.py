"""Directories that appear complete or not at all, and readers whose errors name the place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llama.errors import InputError


@contextmanager
def reading() -> Iterator[None]:
    """A block, or a decorated function, in which a file that the system does not let us read is an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


@contextmanager
def new_directory(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write into; it takes the name `path` when the block ends well.

    When the block raises, the temporary directory is removed and `path` is what it was. With `replace`, an existing
    directory is set aside first and removed only after the new one has its name.

    Raises:
        InputError: `path` exists and is not an empty directory (unless `replace`), or writing fails (no permission, full disk).
    """
    path = Path(path).absolute()
    check_free(path, replace)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise InputError(cannot_write(path.parent, error)) from error
    try:
        yield temporary
        umask = _umask()
        for made in (temporary, *temporary.rglob("*")):  # temporary and safetensors files are private to begin with
            made.chmod((0o777 if made.is_dir() else 0o666) & ~umask)
        aside = None
        if path.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.rename(aside)
        try:
            temporary.rename(path)
        except BaseException:
            if aside is not None:
                aside.rename(path)
            raise
        if aside is not None:
            shutil.rmtree(aside)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # torch.save, writing to a Python file, ends in a RuntimeError about itself; what stopped it is the context.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, OSError | SafetensorError):
            raise InputError(cannot_write(path, reason)) from error
        raise


def cannot_write(path: str | os.PathLike[str], error: BaseException, needed: int | None = None) -> str:
    """One line for people on a file or directory that could not be written: its path, the reason,
    and of a full disk the bytes that were needed (where that is known) and what is free there."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    # Not by its number: what another process or a library has met arrives as text.
    if not any(os.strerror(code) in reason for code in (errno.ENOSPC, errno.EDQUOT)):
        return f"{path} cannot be written: {reason}"
    with suppress(OSError):
        existing = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
        free = f"{shutil.disk_usage(existing).free / 1e9:.2f} GB are free there"
        reason += f"; {free}" if needed is None else f"; {needed / 1e9:.2f} GB are needed, {free}"
    return f"{path} cannot be written: {reason}"


@reading()
def check_free(path: str | os.PathLike[str], replace: bool = False) -> None:
    """Raise InputError if `new_directory` would refuse the path: a program's check before a long piece of work."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} exists and is not a directory")
    if path.exists() and any(path.iterdir()) and not replace:
        raise InputError(f"{path} exists and is not empty; choose another path or remove it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InputError: the file is missing, is not JSON (with line and column), repeats a key, or holds something other than an
            object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=without_repeated_keys)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, a key twice, a number too long, nested too deeply
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; json itself would keep the last of two values and say nothing."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice in one object")
        found[key] = value
    return found
