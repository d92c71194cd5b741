"""Settings in a TOML file: read with an error for whatever no dataclass declares, and written to read back the same."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fsdp_train.settings import check_value, settings_of, values_of
from llama.errors import InputError, nearest


def read_toml(section: type, path: Path) -> dict[str, Any]:
    """A TOML file to values by dotted name.

    Raises:
        InputError: missing, not TOML (with the line), an unknown key (with the nearest known one) or a value of the wrong
            kind.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config {path}: not TOML: {error}") from None
    known = {setting.name: setting for setting in settings_of(section)}
    sections = {name.rpartition(".")[0] for name in known}
    values: dict[str, Any] = {}

    def walk(table: Mapping[str, Any], prefix: str) -> None:
        for key, value in table.items():
            name = prefix + key
            if isinstance(value, dict) and (name in sections or any(s.startswith(name + ".") for s in sections)):
                walk(value, name + ".")
            elif name in sections:
                raise InputError(f"{path}: {name} = {value!r}: expected a section [{name}]")
            elif name not in known:
                raise InputError(f"{path}: unknown setting {name}{nearest(name, [*known, *sections])}")
            else:
                try:
                    values[name] = check_value(known[name].kind, value)
                except ValueError as error:
                    raise InputError(f"{path}: {name} = {value!r}: {error}") from None

    walk(found, "")
    return values


def write_toml(
    config: Any,
    comment: str,
    leave_out: Collection[str] = (),
    remarks: Mapping[str, str] | None = None,
) -> str:
    """The settings of a configuration as TOML that `read_toml` reads back to the same values.

    Args:
        comment: stands at the top.
        leave_out: names of settings that are not written; one with a remark is, as a comment.
        remarks: by name, what stands in a comment beside a setting.
    """
    remarks = remarks or {}
    lines = [f"# {line}" for line in comment.splitlines()]
    section = None
    for name, value in values_of(config).items():
        if name in leave_out and name not in remarks:
            continue
        title, _, key = name.rpartition(".")
        if title != section:
            section = title
            lines += ["", f"[{title}]"]
        line = f"{key} = {_toml_value(value)}"
        if name in remarks:
            line += f"  # {_printable(remarks[name])}"
        lines.append(f"# {line}" if name in leave_out else line)
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(str(key))} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{_printable(escaped)}"'
    return repr(value)


def _printable(text: str) -> str:
    """The text in one line, with TOML's escapes for what cannot be printed."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
