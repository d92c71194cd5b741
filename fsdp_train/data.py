"""Records to samples, samples to batches.

A sample is a list of token ids and a label for each: the id itself where it is to be learned, -100 where it is not.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fsdp_train.formats import Record, read_records
from fsdp_train.order import epoch_order
from fsdp_train.settings import option
from fsdp_train.templates import alpaca_prompt, encode_pair
from llama import Tokenizer
from llama.errors import InputError, listing
from llama.heads import learned_positions
from llama.loss import IGNORE


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    path: str = option("", "training data: .json, .jsonl or text", "FILE")
    format: Literal["auto", "alpaca", "completion", "text", "tokens", "classification"] = option(
        "auto", "how to read it; auto says what it chose"
    )
    eval_path: str = option("", "held-out data, same format", "FILE")
    eval_fraction: float = option(0.0, "hold out this part of the training data instead")
    max_length: int | None = option(None, "cut samples to this many tokens (default: the model's context)")
    shuffle: bool = option(True, "a new order in each epoch, samples of like length together; false: as in the file")
    packing: bool = option(False, "several samples in each row of max_length tokens, none of which sees another")

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise InputError(f"--data.eval_fraction {self.eval_fraction}: expected a part in [0, 1)")
        if self.eval_fraction and self.eval_path:
            raise InputError("--data.eval_fraction and --data.eval_path are given both; choose one")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"--data.max_length {self.max_length}: expected at least 2 tokens")


@dataclass(frozen=True)
class Sample:
    """Token ids (T,) and labels (T,), int32; the first `prompt` ids are what generation would be given.

    A classifier's labels are of another shape: see `LabelSpace.encode`.
    """

    where: str
    ids: np.ndarray
    labels: np.ndarray
    prompt: int


@dataclass
class Dataset:
    """Samples, and what happened to the records on the way."""

    path: Path
    format: str
    example: dict[str, Any]  # the first record as it stands in the file
    samples: list[Sample] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)  # places whose end was cut off
    dropped: list[str] = field(default_factory=list)  # places with nothing left to learn

    def report(self) -> str:
        """Counts and lengths, for people."""
        lengths = np.array([len(s.ids) for s in self.samples])
        targets = sum(map(self._targets, self.samples))
        low, middle, high = np.percentile(lengths, (5, 50, 95)).astype(int)
        lines = [
            f"{self.path}: format {self.format}, {len(self.samples):,} samples,"
            f" {lengths.sum():,} tokens, {targets:,} of them learned",
            f"  tokens per sample: 5 % {low}, median {middle}, 95 % {high}, longest {lengths.max()}",
        ]
        if self.truncated:
            lines.append(f"  {len(self.truncated):,} samples were cut at --data.max_length: {self._places(self.truncated)}")
        if self.dropped:
            lines.append(f"  {len(self.dropped):,} samples left out, nothing to learn in them: {self._places(self.dropped)}")
        return "\n".join(lines)

    def __len__(self) -> int:
        """How many indices there are to ask batches for."""
        return len(self.samples)

    def lengths(self) -> list[int]:
        """Tokens by index."""
        return [len(sample.ids) for sample in self.samples]

    def _targets(self, sample: Sample) -> int:
        return int((sample.labels[1:] != IGNORE).sum())

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """The samples of these indices as one batch."""
        return collate([self.samples[i] for i in indices], device)

    def _places(self, where: list[str]) -> str:
        return listing((place.removeprefix(str(self.path)) for place in where), 3)

    def without(self, count: int, seed: int) -> tuple[Dataset, Dataset]:
        """(the rest, `count` samples held out), chosen by `seed`, each in the file's order."""
        chosen = set(epoch_order(len(self.samples), seed, 0, shuffle=True)[:count].tolist())
        rest = [s for i, s in enumerate(self.samples) if i not in chosen]
        held = [s for i, s in enumerate(self.samples) if i in chosen]
        return replace(self, samples=rest), replace(self, samples=held)


def load_dataset(path: str, format: str, tokenizer: Tokenizer | None, vocab_size: int, max_length: int) -> Dataset:
    """Read, tokenise and check a data file.

    Args:
        tokenizer: None is enough for the format `tokens`.
        vocab_size: of the model; every id must be below it.
        max_length: longer samples are cut (and counted); plain text is cut into windows instead, nothing lost.

    Raises:
        InputError: as `read_records`; no tokenizer where one is needed; an id outside the vocabulary; or nothing to learn in
            the whole file.
    """
    chosen, records = read_records(Path(path), format)
    if chosen == "classification":
        raise InputError(
            f"{path} has labels (format classification), which --finetune.head.kind classification learns;"
            " --data.format text learns the text itself"
        )
    if chosen != "tokens" and tokenizer is None:
        raise InputError(
            f"{path} is text (format {chosen}), and the model directory has no tokenizer.model; give --model.tokenizer"
        )
    dataset = Dataset(Path(path), chosen, records[0].fields)
    for record in records:
        for sample in _samples(record, chosen, tokenizer, max_length):
            if len(sample.ids) > max_length:
                dataset.truncated.append(sample.where)
                sample = Sample(sample.where, sample.ids[:max_length], sample.labels[:max_length], sample.prompt)
            if (sample.labels[1:] == IGNORE).all():
                dataset.dropped.append(sample.where)
            else:
                _check_ids(sample, vocab_size)
                dataset.samples.append(sample)
    if len(dataset.dropped) > len(dataset.samples) > 0:
        warnings.warn(
            f"{path}: {len(dataset.dropped):,} of {len(records):,} records leave nothing to learn within {max_length} tokens",
            stacklevel=2,
        )
    if not dataset.samples:
        cut = (
            f" {len(dataset.truncated)} were cut at {max_length} tokens, before their response began;"
            if dataset.truncated
            else ""
        )
        raise InputError(
            f"{path}: none of its {len(dataset.dropped)} samples has anything to learn;{cut} every label is masked"
        )
    return dataset


def _samples(record: Record, format: str, tokenizer: Tokenizer | None, max_length: int) -> list[Sample]:
    fields = record.fields
    if format == "tokens":
        ids = fields["input_ids"]
        labels = ids if fields.get("labels") is None else fields["labels"]
        if len(ids) != len(labels):
            raise InputError(f"{record.where}: {len(ids)} input_ids but {len(labels)} labels")
        learned = [i for i, label in enumerate(labels) if label != IGNORE and i > 0]
        return [_sample(record.where, ids, labels, learned[0] if learned else len(ids))]
    assert tokenizer is not None
    if format == "text":
        ids = tokenizer.encode(fields["text"], bos=True, eos=True)
        # Windows share one token, so that each token but the very first is predicted exactly once.
        starts = range(0, max(1, len(ids) - 1), max(1, max_length - 1))
        windows = [(start, ids[start : start + max_length]) for start in starts]
        return [_sample(f"{record.where}[token {start}]", window, window, 1) for start, window in windows]
    if format == "alpaca":
        prompt, response = alpaca_prompt(fields["instruction"], fields.get("input") or ""), fields["output"]
    else:
        prompt, response = fields["prompt"], fields["completion"]
    ids, length = encode_pair(tokenizer, prompt, response)
    return [_sample(record.where, ids, [IGNORE] * length + ids[length:], length)]


def _sample(where: str, ids: list[int], labels: list[int], prompt: int) -> Sample:
    try:
        return Sample(where, np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), prompt)
    except OverflowError:
        raise InputError(f"{where}: a token id does not fit 32 bits") from None


def _check_ids(sample: Sample, vocab_size: int) -> None:
    wrong = sample.ids[(sample.ids < 0) | (sample.ids >= vocab_size)]
    labels = sample.labels[sample.labels != IGNORE]
    wrong = np.concatenate((wrong, labels[(labels < 0) | (labels >= vocab_size)]))
    if len(wrong):
        raise InputError(f"{sample.where}: token id {wrong[0]} is outside the model's vocabulary 0..{vocab_size - 1}")


# --- batches ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of the model: `inputs` by name (ids (B, T) int64, padded on the right), and `labels`.

    `tokens` counts real ids, `targets` the labels that are learned: the step's loss is the mean over them.
    """

    inputs: dict[str, Any]
    labels: Tensor
    tokens: int
    targets: int
    where: list[str]


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def collate(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Samples to a batch. No mask: padding stands on the right, where no earlier token sees it, and has no label.

    An empty list gives one masked row, so that a process without samples still takes part in every collective.
    """
    length = max((len(s.ids) for s in samples), default=2)
    ids = np.zeros((max(1, len(samples)), length), dtype=np.int64)
    labels = np.full_like(ids, IGNORE)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = sample.ids
        labels[row, : len(sample.ids)] = sample.labels
    learned = learned_positions(torch.from_numpy(labels))
    return Batch(
        {"input_ids": on_device(torch.from_numpy(ids), device), "learned": on_device(learned, device)},
        on_device(torch.from_numpy(labels), device),
        sum(len(s.ids) for s in samples),
        len(learned),
        [s.where for s in samples],
    )
