"""Texts with labels: which labels there are, samples and batches of them, and how well a classifier does.

A record is `{"text": ..., "label": ...}`. The label's kind decides the problem, as in Hugging Face: text, whole numbers, true
or false are one class each; a list of texts is any number of classes; numbers of which one has a fraction, or any when there is
to be one label only, are a regression's targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fsdp_train.data import Batch, Dataset, Sample, on_device
from fsdp_train.formats import Record, read_records
from fsdp_train.order import Plan
from fsdp_train.step import NonFiniteError
from fsdp_train.templates import encode_prompt
from fsdp_train.world import World
from llama import Tokenizer
from llama.errors import InputError, listing, nearest
from llama.heads import classification_loss
from llama.loss import IGNORE

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@dataclass(frozen=True)
class LabelSpace:
    """The labels' names, by id, and the kind of problem."""

    names: tuple[str, ...]
    problem_type: str

    def encode(self, record: Record) -> np.ndarray:
        """A record's target: (1,) label id; (K,) zeros and ones; (1,) number.

        Raises:
            InputError: a label for another kind of problem, or none of the names (with the nearest).
        """
        label, where = record.fields["label"], record.where
        if (kind := _problem(label, self.problem_type == REGRESSION)) != self.problem_type:
            raise InputError(f"{where}: label {label!r} is for {kind}; expected one for {self.problem_type}")
        if type(label) is int and kind == SINGLE and self.names[0] == "LABEL_0":  # HF's names for labels without any
            label = f"LABEL_{label}"
        if kind == REGRESSION:
            return self._number(label, where)
        ids = []
        for name in _names(label):
            if name not in self.names:
                raise InputError(f"{where}: label {name!r} is none of {listing(self.names, 10)}{nearest(name, self.names)}")
            ids.append(self.names.index(name))
        if kind == SINGLE:
            return np.array(ids, dtype=np.int64)
        target = np.zeros(len(self.names), dtype=np.float32)
        target[ids] = 1
        return target

    def _number(self, label: float, where: str) -> np.ndarray:
        if len(self.names) > 1:
            raise InputError(f"{where}: label {label!r} is one number, but the base is a regression of {len(self.names)}")
        if abs(label) > (most := float(np.finfo(np.float32).max)):
            raise InputError(f"{where}: label {str(label)[:20]} is beyond the numbers of 32 bits, at most {most:.2g}")
        return np.array([label], dtype=np.float32)


def _names(label: Any) -> list[str]:
    """The label, or the labels of a list, as they are called."""
    if isinstance(label, list):
        return label
    return [label if isinstance(label, str) else str(label).lower()]


def _is_number(label: Any) -> bool:
    return isinstance(label, int | float) and not isinstance(label, bool)


def _problem(label: Any, numbers_are_targets: bool) -> str:
    """What a label is for. A whole number is a class, unless numbers are to be a regression's targets; a fraction never is."""
    if isinstance(label, list):
        return MULTI
    return REGRESSION if isinstance(label, float) or (_is_number(label) and numbers_are_targets) else SINGLE


def labels_of(records: Sequence[Record], number: int | None) -> LabelSpace:
    """The labels that occur, sorted; whole numbers below `number` (`--finetune.head.num_labels`) where that is given.

    Raises:
        InputError: another number of labels than `number`, or fewer than two.
    """
    labels = [record.fields["label"] for record in records]
    fractions = all(map(_is_number, labels)) and any(isinstance(label, float) for label in labels)
    problem = _problem(labels[0], number == 1 or fractions)
    if problem == REGRESSION:
        if number not in (None, 1):
            label, where = records[0].fields["label"], records[0].where
            raise InputError(
                f"--finetune.head.num_labels {number}, but {where} has the label {label!r} of a regression; expected 1"
            )
        return LabelSpace(("LABEL_0",), REGRESSION)
    if number is not None and all(type(label) is int for label in labels):
        return LabelSpace(tuple(map(str, range(number))), problem)
    found = {name for label in labels for name in _names(label)}
    names = tuple(sorted(found, key=lambda name: (int(name) if name.isdecimal() else -1, name)))
    if number not in (None, len(names)):
        raise InputError(
            f"--finetune.head.num_labels {number}, but the training data has {len(names)} labels: {listing(names, 10)}"
        )
    if len(names) < 2:
        few = f"one label only, {names[0]!r}" if names else "no labels, only empty lists"
        raise InputError(f"the training data has {few}; expected at least two")
    return LabelSpace(names, problem)


@dataclass
class ClassificationDataset(Dataset):
    """Samples whose `labels` are a `LabelSpace`'s target."""

    space: LabelSpace = field(default_factory=lambda: LabelSpace((), ""))

    def report(self) -> str:
        """Counts, lengths and labels, for people."""
        return f"{super().report()}\n  {self.space.problem_type}: {self._distribution()}"

    def _targets(self, sample: Sample) -> int:
        return len(sample.labels)

    def _distribution(self) -> str:
        targets = np.stack([sample.labels for sample in self.samples])
        if self.space.problem_type == REGRESSION:
            return f"mean {targets.mean():.4g}, standard deviation {targets.std():.4g}"
        ids = targets[:, 0] if self.space.problem_type == SINGLE else np.nonzero(targets)[1]
        counts = Counter(ids.tolist())
        return listing((f"{name} {counts[i]:,}" for i, name in enumerate(self.space.names)), 12)

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """As `Dataset.batch`; a row's last token is where the classifier looks. An empty one has a row without a target."""
        samples = [self.samples[i] for i in indices]
        ids = np.zeros((max(1, len(samples)), max((len(s.ids) for s in samples), default=1)), dtype=np.int64)
        for row, sample in enumerate(samples):
            ids[row, : len(sample.ids)] = sample.ids
        last = torch.tensor([len(s.ids) - 1 for s in samples] or [0])
        inputs = {"input_ids": on_device(torch.from_numpy(ids), device), "last": on_device(last, device)}
        return Batch(inputs, *self._labelled(samples, device))

    def _labelled(self, samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, int, int, list[str]]:
        """What a batch has beside its inputs."""
        single = self.space.problem_type == SINGLE
        nothing = np.array([IGNORE]) if single else np.full(len(self.space.names), np.nan, dtype=np.float32)
        labels = torch.from_numpy(np.stack([s.labels for s in samples] or [nothing]))
        labels = on_device(labels, device)
        targets = sum(len(s.labels) for s in samples)
        return labels[:, 0] if single else labels, sum(len(s.ids) for s in samples), targets, [s.where for s in samples]

    def named(self, scores: Tensor) -> list[str]:
        """What each row of scores (B, K) says, for people."""
        if self.space.problem_type == REGRESSION:
            return [f"{score:.4g}" for score in scores[:, 0].tolist()]
        return [", ".join(self.space.names[i] for i in row.nonzero()[:, 0]) or "none" for row in decided(scores, self.space)]

    def reference(self, index: int) -> str:
        """What the data says of a sample, for people."""
        labels = self.samples[index].labels
        if self.space.problem_type == SINGLE:
            return self.space.names[labels[0]]
        return self.named(torch.from_numpy(labels)[None])[0]


def load_classification(
    path: str, tokenizer: Tokenizer | None, max_length: int, space: LabelSpace | None, number: int | None
) -> ClassificationDataset:
    """Read, tokenise and check a file of texts and labels. A text becomes BOS and its tokens, and is cut at `max_length`.

    Args:
        space: of the training data, or of a base that is a classifier; None takes the labels that occur (`labels_of`).

    Raises:
        InputError: as `read_records`, `labels_of` and `LabelSpace.encode`; or there is no tokenizer.
    """
    _, records = read_records(Path(path), "classification")
    if tokenizer is None:
        raise InputError(f"{path} is text, and the model directory has no tokenizer.model; give --model.tokenizer")
    space = space or labels_of(records, number)
    dataset = ClassificationDataset(Path(path), "classification", records[0].fields, space=space)
    for record in records:
        ids = np.array(encode_prompt(tokenizer, record.fields["text"]), dtype=np.int32)
        if len(ids) > max_length:
            dataset.truncated.append(record.where)
        dataset.samples.append(Sample(record.where, ids[:max_length], space.encode(record), min(len(ids), max_length)))
    return dataset


def decided(scores: Tensor, space: LabelSpace) -> Tensor:
    """Scores (B, K) to bool (B, K): the highest one, or in a multi-label problem those with a probability above one half."""
    if space.problem_type == MULTI:
        return scores > 0
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(1, keepdim=True), True)


@torch.no_grad()
def evaluate_classifier(model: nn.Module, data: ClassificationDataset, batch_size: int, world: World) -> dict[str, float]:
    """Over all samples: `eval_loss`, the mean loss; and but for a regression `accuracy`, the part of the samples with exactly
    the right labels, and `macro_f1`, the mean over labels of 2 TP / (2 TP + FP + FN), labels that neither occur nor are ever
    predicted left out, 0 if that is all (scikit-learn's `accuracy_score`, and `f1_score` with average="macro" and
    zero_division=np.nan).

    Raises:
        NonFiniteError: on every process alike.
    """
    was_training = model.training
    model.eval()
    plan = Plan(len(data.samples), batch_size, 1, world.size, world.rank, 0, shuffle=False)
    labels = len(data.space.names)
    sums = torch.zeros(3 + 3 * labels, dtype=torch.float64, device=world.device)  # loss, targets, right; TP, FP, FN by label
    for step in range(plan.steps_per_epoch):
        indices = plan.micro_batches(step)[0]
        batch = data.batch(indices, world.device)
        scores = model(**batch.inputs)
        sums[0] += classification_loss(scores, batch.labels, data.space.problem_type)
        sums[1] += batch.targets
        if indices and data.space.problem_type != REGRESSION:
            given = decided(scores, data.space)
            right = torch.zeros_like(given)
            if data.space.problem_type == SINGLE:
                right.scatter_(1, batch.labels[:, None], True)
            else:
                right = batch.labels > 0
            sums[2] += (given == right).all(1).sum()
            sums[3:] += torch.cat(((given & right).sum(0), (given & ~right).sum(0), (~given & right).sum(0)))
    model.train(was_training)
    total = torch.tensor(world.sum(*sums), dtype=torch.float64)
    if not total[0].isfinite():
        raise NonFiniteError(f"the evaluation loss on {data.path} is {(total[0] / total[1]).item()}")
    found = {"eval_loss": (total[0] / total[1]).item()}
    if data.space.problem_type != REGRESSION:
        hit, wrong, missed = total[3:].view(3, labels)
        f1 = (2 * hit / (2 * hit + wrong + missed))[(hit + wrong + missed) > 0]
        found |= {"accuracy": total[2].item() / len(data.samples), "macro_f1": f1.mean().item() if len(f1) else 0.0}
    return found
