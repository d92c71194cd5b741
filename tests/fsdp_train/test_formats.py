"""Data files to records: every shape of file, the format it is taken for, and what is said about a file that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fsdp_train.formats import read_records
from llama.errors import InputError

PAIR = {"prompt": "a", "completion": "b\n☃"}
PAIRS = [PAIR, {"prompt": "", "completion": ""}, {"prompt": "x", "completion": "y", "id": 3}]
LINES = [json.dumps(pair) for pair in PAIRS]

# file's contents, expected places (after the file's name)
FILES: dict[str, tuple[str, list[str]]] = {
    "list": (json.dumps(PAIRS), ["[0]", "[1]", "[2]"]),
    "indented list": (json.dumps(PAIRS, indent=2), ["[0]", "[1]", "[2]"]),
    "list after spaces": ("\n  " + json.dumps(PAIRS) + "\n\n", ["[0]", "[1]", "[2]"]),
    "list, not escaped": (json.dumps(PAIRS, ensure_ascii=False), ["[0]", "[1]", "[2]"]),
    "lines": ("\n".join(LINES) + "\n", [":1", ":2", ":3"]),
    "lines, the last without its end": ("\n".join(LINES), [":1", ":2", ":3"]),
    "blank lines": ("\n \n" + "\n\n\t\n".join(LINES) + "\n\n", [":3", ":6", ":9"]),
    "windows": ("\r\n".join(LINES) + "\r\n", [":1", ":2", ":3"]),
    "spaces around lines": ("\n".join(f"  {line} " for line in LINES), [":1", ":2", ":3"]),
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("name", FILES)
def test_lists_and_lines_are_the_same_records(name: str, mark: bytes, tmp_path: Path) -> None:
    text, places = FILES[name]
    path = tmp_path / "data.json"
    path.write_bytes(mark + text.encode())
    format, records = read_records(path, "auto")
    assert format == "completion"
    assert [record.fields for record in records] == PAIRS
    assert [record.where for record in records] == [f"{path}{place}" for place in places]


DETECTED = [
    ('{"instruction": "a", "output": "b"}', "alpaca"),
    ('{"instruction": "a", "input": "", "output": "b", "text": "the whole prompt"}', "alpaca"),  # as in Stanford's copies
    ('{"prompt": "a", "completion": "b"}', "completion"),
    ('{"text": "a"}', "text"),
    ('{"input_ids": [1, 2]}', "tokens"),
    ('{"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}', "tokens"),
    ("Call me Ishmael.", "text"),
    ("42\n", "text"),
]


@pytest.mark.parametrize(("text", "format"), DETECTED)
def test_the_first_record_tells_the_format(text: str, format: str, tmp_path: Path) -> None:
    """Whatever the file is called, but for prose in a file that says it is JSON."""
    for name in ("data", "data.jsonl") if text.startswith("{") else ("data", "data.txt"):
        (tmp_path / name).write_text(text)
        assert read_records(tmp_path / name, "auto")[0] == format
        if format != "text":
            assert read_records(tmp_path / name, "auto") == read_records(tmp_path / name, format)
    assert read_records(tmp_path / name, "auto") == read_records(tmp_path / name, format)


def test_a_file_that_says_json_is_never_prose(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b"}\n')
    for format in ("auto", "text", "alpaca"):
        with pytest.raises(InputError, match=r"data\.jsonl:1:14: not JSON: Extra data$"):
            read_records(tmp_path / "data.jsonl", format)


def test_prose_may_begin_with_a_bracket(tmp_path: Path) -> None:
    (tmp_path / "song.txt").write_text("[Verse 1]\nLa la la\n")
    assert read_records(tmp_path / "song.txt", "text")[1][0].fields == {"text": "[Verse 1]\nLa la la\n"}
    with pytest.raises(InputError, match=r"song\.txt:1:2: not JSON: .*; for plain text give --data\.format text"):
        read_records(tmp_path / "song.txt", "auto")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
    with pytest.raises(InputError, match=r"data\.jsonl:2: not JSON: the key 'text' appears twice"):
        read_records(tmp_path / "data.jsonl", "auto")


def test_hints_never_name_a_key_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    with pytest.raises(InputError, match="fit no format") as refused:
        read_records(tmp_path / "data.jsonl", "auto")
    assert "did you mean 'instruction'" not in str(refused.value)


def test_plain_text_is_one_record_as_it_stands(tmp_path: Path) -> None:
    text = "  Once upon a time.\n\nThe end?\n"
    (tmp_path / "story.txt").write_text(text)
    _, (record,) = read_records(tmp_path / "story.txt", "auto")
    assert (record.where, record.fields) == (str(tmp_path / "story.txt"), {"text": text})


def test_a_named_format_wins_over_what_else_is_there(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "output": "b", "text": "c", "prompt": "d", "completion": "e"}')
    for format in ("alpaca", "text", "completion"):
        assert read_records(tmp_path / "data.jsonl", format)[0] == format


def test_an_optional_value_may_be_null(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"instruction": "a", "output": "b", "input": null}\n')
    assert read_records(tmp_path / "data.jsonl", "auto")[0] == "alpaca"
    (tmp_path / "data.jsonl").write_text('{"input_ids": [1], "labels": null}\n')
    assert read_records(tmp_path / "data.jsonl", "auto")[0] == "tokens"


GOOD = '{"instruction": "a", "output": "b"}\n'
WRONG: list[tuple[str | bytes, str, str]] = [  # contents, --data.format, what is said after the file's name
    ("", "auto", " is empty"),
    (b"\xef\xbb\xbf", "auto", " is empty"),
    (" \n\t\n", "text", " is empty"),
    ("[]", "auto", " holds an empty list"),
    (b'{"text": "\xff"}', "auto", " is not UTF-8: byte 10"),
    (GOOD + GOOD + '{"instruction": "a", \n', "auto", ":3:22: not JSON: Expecting property name enclosed in double quotes"),
    (GOOD + "\r\n" + '{"instruction": "a"', "auto", ":3:20: not JSON: Expecting ',' delimiter"),
    (GOOD.strip() + GOOD, "auto", ":1:36: not JSON: Extra data"),
    (GOOD + "instruction,output\n", "auto", ":2:1: not JSON: Expecting value"),
    ('[\n {"prompt": "a",\n  "completion" "b"}\n]', "auto", ":3:16: not JSON: Expecting ':' delimiter"),
    ('[{"prompt": "a", "completion": "b"},', "auto", ":1:37: not JSON: Expecting value"),
    ('["a", "b"]', "auto", "[0]: text; expected an object"),
    ('[{"prompt": "a", "completion": "b"}, [1]]', "auto", "[1]: a list; expected an object"),
    (GOOD + "3\n", "auto", ":2: a number; expected an object"),
    (GOOD + "null\n", "auto", ":2: null; expected an object"),
    ("plain words\n", "alpaca", ":1:1: not JSON: Expecting value"),
    ("{}", "auto", ":1: no keys, which fits no format (alpaca: instruction, output; completion: prompt, completion; "),
    ('{"instuction": "a", "output": "b"}', "auto", " - did you mean 'instruction'?"),
    ('{"from": "a", "value": "b"}', "auto", ":1: keys from, value fit no format (alpaca: instruction, output; "),
    (GOOD + '{"instruction": "a", "ouput": "b"}', "auto", ":2: no 'output' (format alpaca); found instruction, ouput - did"),
    (GOOD, "completion", ":1: no 'prompt' (format completion); found instruction, output"),
    (GOOD + "{}", "auto", ":2: no 'instruction' (format alpaca); found no keys"),
    (GOOD + '{"instruction": "a", "output": 3}', "auto", ":2: 'output' is a number; expected text"),
    (GOOD + '{"instruction": null, "output": "b"}', "auto", ":2: 'instruction' is null; expected text"),
    (GOOD + '{"instruction": "a", "input": ["x"], "output": "b"}', "auto", ":2: 'input' is a list; expected text"),
    ('{"prompt": "a", "completion": true}', "auto", ":1: 'completion' is true or false; expected text"),
    ('{"text": NaN}', "auto", ":1: 'text' is a number; expected text"),
    ('{"prompt": "a", "completion": "\\ud83e"}', "auto", ":1: 'completion' holds half a character (\\ud83e)"),
    ('{"input_ids": null}', "auto", ":1: 'input_ids' is not a list of whole numbers"),
    ('{"input_ids": "1 2"}', "auto", ":1: 'input_ids' is not a list of whole numbers"),
    ('{"input_ids": [1, 2.0]}', "auto", ":1: 'input_ids' is not a list of whole numbers"),
    ('{"input_ids": [1, true]}', "auto", ":1: 'input_ids' is not a list of whole numbers"),
    ('{"input_ids": [[1, 2]]}', "auto", ":1: 'input_ids' is not a list of whole numbers"),
    ('{"input_ids": [1, 2], "labels": {}}', "auto", ":1: 'labels' is not a list of whole numbers"),
    ("[" * 100_000, "auto", ":1: not JSON: "),  # deeper than the parser goes
    ('{"text": "a"}\n{"text": ' + "1" * 5000 + "}", "auto", ":2: not JSON: "),  # longer than the parser reads
]


@pytest.mark.parametrize(("contents", "format", "message"), WRONG, ids=[f"{i}{row[2][:30]}" for i, row in enumerate(WRONG)])
def test_a_wrong_file_is_refused_with_its_place(contents: str | bytes, format: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(InputError) as error:
        read_records(path, format)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nothing", "does not exist"), (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(InputError, match=message):
            read_records(path, "auto")
