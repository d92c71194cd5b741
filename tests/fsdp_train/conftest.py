"""A tokenizer, a model that fits it and an instruction file, all tiny, made once for the whole run of the tests."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer

import llama
from fsdp_train.data import Dataset, load_dataset
from fsdp_train.templates import alpaca_prompt
from tests.oracle import SHAPES, randomise

VOCAB = 300  # 3 control pieces, 256 bytes, the rest letters and a few merges
CONTEXT = 512  # the Alpaca template alone takes about 150 tokens of so small a vocabulary
WORDS = "one two three four five six seven eight nine ten".split()


def alpaca_records() -> list[dict[str, str]]:
    """20 records with a simple rule, half of them with an input."""
    again = [{"instruction": f"Say {word} again.", "output": f"{word} {word}"} for word in WORDS]
    named = [{"instruction": "Repeat the word.", "input": word, "output": word} for word in WORDS]
    return [record for pair in zip(again, named, strict=True) for record in pair]


def dataset(
    directory: Path, records: Sequence[dict[str, Any]] | str, tokenizer: Any = None, length: int = CONTEXT, format: str = "auto"
) -> Dataset:
    """A dataset of these records as JSON lines, or of this text."""
    path = directory / ("data.txt" if isinstance(records, str) else "data.jsonl")
    path.write_text(records if isinstance(records, str) else "\n".join(map(json.dumps, records)), encoding="utf-8")
    return load_dataset(str(path), format, tokenizer, VOCAB, length)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with only a `tokenizer.model`: 300 pieces, trained with Llama 2's own settings."""
    path, model = tmp_path_factory.mktemp("tokenizer"), io.BytesIO()
    texts = [alpaca_prompt(r["instruction"], r.get("input", "")) + " " + r["output"] for r in alpaca_records()]
    SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")), model_writer=model,
        model_type="bpe", vocab_size=VOCAB, byte_fallback=True, character_coverage=0.99, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def model_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped-query attention as a Hugging Face directory, with the tokenizer beside it."""
    return saved_model("gqa", tokenizer_dir, tmp_path_factory.mktemp("model") / "tiny")


def saved_model(shape: str, tokenizer_dir: Path, path: Path) -> Path:
    """A random Llama of this shape with the tokenizer's vocabulary."""
    model = llama.Llama(dataclasses.replace(SHAPES[shape], vocab_size=VOCAB, max_position_embeddings=CONTEXT))
    randomise(model)
    llama.save(model, path, tokenizer_from=tokenizer_dir)
    return path


@pytest.fixture(scope="session")
def alpaca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 20 records as a JSON list."""
    path = tmp_path_factory.mktemp("data") / "alpaca.json"
    path.write_text(json.dumps(alpaca_records(), indent=1), encoding="utf-8")
    return path
