"""Settings from dataclasses: one declaration becomes a flag `--section.field`, a TOML key, a default and a line of help.

A section is a frozen dataclass whose fields carry `metadata={"help": ...}`; sections nest. Precedence: flags, then the file
given by `--config`, then defaults. A name that no dataclass declares is an error. What `beside_settings` makes is no setting.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

from llama.errors import InputError, nearest

T = TypeVar("T")


def option(default: Any, help: str, metavar: str = "") -> Any:
    """A dataclass field with its line of help; units belong into the line. `metavar`: what stands for its value there."""
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar})


def beside_settings(default: Any) -> Any:
    """A dataclass field that no flag and no file sets, and that makes no two configurations differ."""
    return dataclasses.field(default=default, compare=False, metadata={"setting": False})


def _fields(section: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass, or of an instance of one, that are settings or sections."""
    return [field for field in dataclasses.fields(section) if field.metadata.get("setting", True)]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the tree of dataclasses: its dotted name, type, default, line of help and what stands for its value."""

    name: str
    kind: Any
    default: Any
    help: str
    metavar: str


def settings_of(section: type, prefix: str = "") -> Iterator[Setting]:
    """All settings below a dataclass, in order of declaration."""
    kinds = typing.get_type_hints(section)
    for field in _fields(section):
        kind, name = kinds[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from settings_of(kind, name + ".")
            continue
        metavar = field.metadata.get("metavar") or describe(kind)
        yield Setting(name, kind, getattr(section(), field.name), field.metadata["help"], metavar)


def build(section: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """The dataclass with `values` by dotted name, defaults elsewhere. Its own checks name the section.

    Raises:
        InputError: a value that the dataclass refuses.
    """
    kinds = typing.get_type_hints(section)
    arguments = {}
    for field in _fields(section):
        name = prefix + field.name
        if dataclasses.is_dataclass(kinds[field.name]):
            arguments[field.name] = build(kinds[field.name], values, name + ".")
        elif name in values:
            arguments[field.name] = values[name]
    try:
        return section(**arguments)
    except InputError as error:
        raise InputError(f"--{prefix.rstrip('.')}: {error}" if prefix and "--" not in str(error) else str(error)) from None


def values_of(section: Any, prefix: str = "") -> dict[str, Any]:
    """The inverse of `build`: every setting by its dotted name."""
    values = {}
    for field in _fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            values.update(values_of(value, f"{prefix}{field.name}."))
        else:
            values[prefix + field.name] = value
    return values


def changed(section: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of an instance that say something else than their defaults, by dotted name."""
    defaults = {setting.name: setting.default for setting in settings_of(type(section), prefix)}
    values = values_of(section, prefix)
    return {name: value for name, value in values.items() if value != defaults[name]}


# --- one value: from text (flags), from TOML, to text -------------------------------------------------------------------


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}  # in errors


def parse_text(kind: Any, text: str) -> Any:
    """A flag's text as a value of type `kind`; raises ValueError with what was expected."""
    options = _options(kind)
    if options is not None:
        if text == "none" and type(None) in typing.get_args(kind):
            return None
        if options == (tuple[str, ...], str):  # a list of names, or one expression: anything but name characters makes it one
            plain = all(c.isalnum() or c in "_.,-" for c in text) and text != "all-linear"
            return parse_text(tuple[str, ...], text) if plain else text
        return parse_text(options[0], text)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if text not in inner:
            raise ValueError(f"expected {' or '.join(inner)}{nearest(text, inner)}")
        return text
    if origin in (tuple, dict) and text == "none":
        return origin()
    if origin is tuple:
        return tuple(parse_text(inner[0], part.strip()) for part in text.split(",") if part.strip())
    if origin is dict:
        pairs = [part.rpartition("=") for part in text.split(",") if part.strip()]
        if not all(separator for _, separator, _ in pairs):
            raise ValueError("expected name=value pairs, separated by commas")
        return {key.strip(): parse_text(inner[1], value.strip()) for key, _, value in pairs}
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"expected {_WORDS[bool]}")
        return text == "true"
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {_WORDS[kind]}") from None


def check_value(kind: Any, value: Any) -> Any:
    """A TOML value as a value of type `kind`; raises ValueError with what was expected."""
    options = _options(kind)
    if options is not None:
        if value == "none" and type(None) in typing.get_args(kind):
            return None
        if isinstance(value, str) and str in options:
            return value
        return check_value(options[0], value)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(check_value(inner[0], item) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: check_value(inner[1], item) for key, item in value.items()}
    if origin is Literal and isinstance(value, str):
        return parse_text(kind, value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise ValueError(f"expected {_WORDS.get(kind) or describe(kind)}")


def describe(kind: Any) -> str:
    """What a value of `kind` looks like, for help and errors."""
    options = _options(kind)
    if options is not None:
        return describe(options[0])
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "|".join(inner)
    if origin is tuple:
        return f"{describe(inner[0])},..."
    if origin is dict:
        return f"NAME={describe(inner[1])},..."
    return {bool: "true|false", int: "N", float: "X", str: "TEXT"}[kind]


def _options(kind: Any) -> tuple[Any, ...] | None:
    """The members of a union besides None; None when `kind` is no union."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return None
    return tuple(member for member in typing.get_args(kind) if member is not type(None))


def as_text(value: Any) -> str:
    """A value as one would type it after its flag."""
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return str(value)


# --- flags ------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse_flags(section: type, arguments: Sequence[str], description: str) -> tuple[dict[str, Any], str | None]:
    """Flags to values by dotted name, and the path after `--config`. `--help` prints all settings and exits.

    Raises:
        InputError: an unknown flag (with the nearest known one) or a value that does not parse.
    """
    parser = _Parser(
        prog="torchrun -m fsdp_train.main",
        usage="%(prog)s [--config FILE] [--section.name VALUE ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=38, width=120),
    )
    parser.add_argument("--config", metavar="FILE", help="a TOML file with the settings below; flags win over it")
    known = {}
    groups: dict[str, Any] = {}
    for setting in settings_of(section):
        title = setting.name.rpartition(".")[0]
        if title not in groups:
            groups[title] = parser.add_argument_group(f"[{title}]")
        known[f"--{setting.name}"] = setting
        default = "" if setting.default == "" or "(default: " in setting.help else f" (default: {as_text(setting.default)})"
        groups[title].add_argument(
            f"--{setting.name}",
            metavar=setting.metavar,
            default=argparse.SUPPRESS,
            help=(setting.help + default).replace("%", "%%"),
        )
    given, rest = parser.parse_known_args(list(arguments))
    if rest:
        flag = rest[0].partition("=")[0]
        raise InputError(f"unknown argument {rest[0]!r}{nearest(flag, [*known, '--config'])}; --help lists all")
    values = {}
    for name, text in vars(given).items():
        if name == "config":
            continue
        try:
            values[name] = parse_text(known[f"--{name}"].kind, text)
        except ValueError as error:
            raise InputError(f"--{name} {text}: {error}") from None
    return values, given.config


def fail(error: BaseException | str, code: int = 2) -> NoReturn:
    """Leave with a non-zero exit code and one readable line, also handed to `torchrun` for its report. An error of all
    processes is printed by rank 0, one that began on some process by that one, which its attribute `prints` says."""
    if getattr(error, "prints", os.environ.get("RANK", "0") == "0"):
        print(f"error: {error}", file=sys.stderr, flush=True)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        Path(report).write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}), encoding="utf-8")
    sys.exit(code)
