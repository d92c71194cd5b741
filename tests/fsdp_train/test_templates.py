"""Records to prompts and ids: the Alpaca text, and the seam of prompt and response, in training and generation alike."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

import llama
from fsdp_train.data import load_dataset
from fsdp_train.templates import alpaca_prompt, encode_prompt
from tests.fsdp_train.conftest import dataset
from tests.oracle import LLAMA2_TOKENIZER, needs_data
from tools import generate

BOS, EOS, IGNORE = 1, 2, -100


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> llama.Tokenizer:
    return llama.Tokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def pieces(tokenizer_dir: Path) -> SentencePieceProcessor:
    """The oracle: sentencepiece itself."""
    return SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))


WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
1, 2

### Response:"""
WITHOUT_INPUT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Add.

### Response:"""


def test_the_alpaca_text_is_stanfords() -> None:
    assert alpaca_prompt("Add.", "1, 2") == WITH_INPUT
    assert alpaca_prompt("Add.") == alpaca_prompt("Add.", "") == WITHOUT_INPUT


@pytest.mark.parametrize("instruction", ["Write {input}", "{instruction}", "{", "{0} {}", "}} {{", "%s $x \\1"])
@pytest.mark.parametrize("input", ["", "{input}", "{instruction}", "{"])
def test_braces_in_a_record_stay_as_they_are(instruction: str, input: str) -> None:
    """A record about format strings is not filled in a second time."""
    expected = WITH_INPUT if input else WITHOUT_INPUT
    head, tail = expected.split("Add.")
    assert alpaca_prompt(instruction, input) == head + instruction + tail.replace("1, 2", input)


SEAMS = [
    ("]", "{"), ("[1, 2]", '{"a": 1}'), ("Say", "ing"), ("a", "a"), ("one ", " one"), ("one ", "one"), ("one\n", "\none"),
    ("ends with :", "Sure"), ("", "only a response"), ("only a prompt", ""), ("<s>", "</s>"), ("</s><unk>", "<s>x"),
    ("\u2581", "\u2581"), ("🦙", "🦙漢"), ("e", "\u0301"), ("[INST] x [/INST]", "<0x41>"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "response"), SEAMS)
def test_ids_are_bos_prompt_response_eos(
    prompt: str, response: str, tokenizer: llama.Tokenizer, pieces: SentencePieceProcessor, tmp_path: Path
) -> None:
    """Encoded apart, joined as ids, labels by position; what a text looks like never makes a control token."""
    (sample,) = dataset(tmp_path, [{"prompt": prompt, "completion": response}], tokenizer).samples
    before, after = [BOS, *pieces.encode(prompt)], [*pieces.encode(response), EOS]
    assert sample.ids.tolist() == before + after
    assert sample.labels.tolist() == [IGNORE] * len(before) + after
    assert sample.prompt == len(before)
    assert (sample.ids == BOS).sum() == (sample.ids == EOS).sum() == 1
    assert encode_prompt(tokenizer, prompt) == before


def test_the_seams_matter(pieces: SentencePieceProcessor) -> None:
    """Encoded as one text most of them come out otherwise: the test above can fail."""
    joined = [pieces.encode(a + b) != pieces.encode(a) + pieces.encode(b) for a, b in SEAMS]
    assert sum(joined) > len(SEAMS) // 2
    assert joined[0]


@pytest.mark.parametrize("input", ["", "one]"])
def test_training_masks_what_generation_presents(input: str, tokenizer: llama.Tokenizer, tmp_path: Path) -> None:
    record = {"instruction": "Repeat [1,", "input": input, "output": "{one"}
    (sample,) = dataset(tmp_path, [record], tokenizer).samples
    options = argparse.Namespace(template="alpaca", input=input, system=None)
    presented = generate.encode(tokenizer, options, record["instruction"])
    assert sample.ids[: sample.prompt].tolist() == presented
    assert tokenizer.decode(presented).endswith("### Response:")
    assert tokenizer.decode(sample.ids[sample.prompt :].tolist()) == "{one"
    (sample,) = dataset(tmp_path, [{"prompt": "Repeat [1,", "completion": "{one"}], tokenizer).samples
    options = argparse.Namespace(template="none", input="", system=None)
    assert sample.ids[: sample.prompt].tolist() == generate.encode(tokenizer, options, "Repeat [1,")


@needs_data
@pytest.mark.parametrize(("prompt", "response"), SEAMS)
def test_ids_of_the_real_tokenizer(prompt: str, response: str, tmp_path: Path) -> None:
    pieces = SentencePieceProcessor(model_file=str(LLAMA2_TOKENIZER / "tokenizer.model"))
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": prompt, "completion": response}))
    (sample,) = load_dataset(str(tmp_path / "data.jsonl"), "auto", llama.Tokenizer(LLAMA2_TOKENIZER), 32000, 4096).samples
    assert sample.ids.tolist() == [BOS, *pieces.encode(prompt), *pieces.encode(response), EOS]


def test_a_null_input_is_none(tokenizer: llama.Tokenizer, tmp_path: Path) -> None:
    a, b, c = ({"instruction": "Add.", "output": "3", **extra} for extra in ({}, {"input": ""}, {"input": None}))
    first, second, third = dataset(tmp_path, [a, b, c], tokenizer).samples
    assert first.ids.tolist() == second.ids.tolist() == third.ids.tolist()
