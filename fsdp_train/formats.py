"""Data files to records, with the place of each: instructions, texts, labels, tokens; JSON lists or JSON lines."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.errors import InputError, listing, nearest
from llama.files import without_repeated_keys

# format -> (required keys, optional keys); all values are strings but for labels and `tokens`
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpaca": (("instruction", "output"), ("input",)),
    "completion": (("prompt", "completion"), ()),
    "classification": (("text", "label"), ()),
    "text": (("text",), ()),
    "tokens": (("input_ids",), ("labels",)),
}
_KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false",
          type(None): "null"}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one half of a pair; UTF-8, and so the tokenizer, cannot


@dataclass(frozen=True)
class Record:
    """One record and where it stands, `file:line` for lines and `file[index]` for a list."""

    where: str
    fields: dict[str, Any]


def read_records(path: Path, format: str) -> tuple[str, list[Record]]:
    """The file's format (detected from its first record when "auto") and all its records, checked.

    Raises:
        InputError: missing, empty, not JSON (with line and column), a record that lacks a key or has a value of the wrong
            kind (with the nearest key that is there).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: byte {error.start}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    # A name that says JSON is believed: a malformed first line must not turn a file of records into prose.
    named_json = path.suffix.lower() in (".json", ".jsonl")
    if not named_json and (format == "text" or (format == "auto" and text.lstrip()[0] not in "[{")):
        return "text", [Record(str(path), {"text": text})]
    records = list(_json_list(path, text) if text.lstrip().startswith("[") else _json_lines(path, text))
    if not records:
        raise InputError(f"{path} holds an empty list")
    chosen = _detect(records[0]) if format == "auto" else format
    for record in records:
        _check(record, chosen)
    return chosen, records


def _json_list(path: Path, text: str) -> Iterator[Record]:
    for index, item in enumerate(_parse(path, 1, text)):
        yield _record(f"{path}[{index}]", item)


def _json_lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        yield _record(f"{path}:{number}", _parse(path, number, line))


def _parse(path: Path, first_line: int, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=without_repeated_keys)
    except json.JSONDecodeError as error:
        plain = "" if path.suffix.lower() in (".json", ".jsonl") else "; for plain text give --data.format text"
        raise InputError(f"{path}:{first_line + error.lineno - 1}:{error.colno}: not JSON: {error.msg}{plain}") from None
    except (RecursionError, ValueError) as error:  # nested too deep, a key twice, or a number of thousands of digits
        raise InputError(f"{path}:{first_line}: not JSON: {error}") from None


def _record(where: str, item: Any) -> Record:
    if not isinstance(item, dict):
        raise InputError(f"{where}: {_KINDS[type(item)]}; expected an object")
    return Record(where, item)


def _detect(record: Record) -> str:
    for format, (required, _) in FORMATS.items():
        if all(key in record.fields for key in required):
            return format
    shapes = "; ".join(f"{format}: {', '.join(required)}" for format, (required, _) in FORMATS.items())
    known = [key for required, _ in FORMATS.values() for key in required]
    absent = [key for key in known if key not in record.fields]
    hints = [nearest(key, absent) for key in record.fields if key not in known]
    found = f"keys {listing(record.fields)} fit" if record.fields else "no keys, which fits"
    raise InputError(f"{record.where}: {found} no format ({shapes}){next(filter(None, hints), '')}")


def _check(record: Record, format: str) -> None:
    required, optional = FORMATS[format]
    for key in required:
        if key not in record.fields:
            raise InputError(
                f"{record.where}: no {key!r} (format {format}); found {listing(record.fields) or 'no keys'}"
                f"{nearest(key, record.fields)}"
            )
    for key in (*required, *optional):
        value = record.fields.get(key)
        if key in optional and value is None:
            continue
        if format == "classification" and key == "label":
            _check_label(record.where, value)
        elif format == "tokens":
            if not (isinstance(value, list) and all(type(i) is int for i in value)):
                raise InputError(f"{record.where}: {key!r} is not a list of whole numbers")
        elif not isinstance(value, str):
            raise InputError(f"{record.where}: {key!r} is {_KINDS[type(value)]}; expected text")
        elif half := _SURROGATE.search(value):
            raise InputError(f"{record.where}: {key!r} holds half a character (\\u{ord(half[0]):x}), which is no text")


def _check_label(where: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: 'label' is {value}; expected a finite number")
    listed = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not all(isinstance(name, str) for name in value):
        raise InputError(f"{where}: 'label' is a list of more than texts; expected the names of labels")
    if not all(isinstance(name, str | int | float) for name in listed):
        raise InputError(f"{where}: 'label' is {_KINDS[type(value)]}; expected text, a number, or a list of texts")
    for name in listed:
        if isinstance(name, str) and (half := _SURROGATE.search(name)):
            raise InputError(f"{where}: 'label' holds half a character (\\u{ord(half[0]):x}), which is no text")
