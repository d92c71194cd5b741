"""What follows the final norm: a language model's head, or a classifier's, each with extra fully connected layers if wished.

    classifier = replace_head(llama.load("Llama-2-7b-hf"), labels=("bad", "good"))
    logits = classifier(ids, last=lengths - 1)                               # (B, 2)

Sources: pooling at the last token, Radford et al. 2018 (GPT), as in Hugging Face's `LlamaForSequenceClassification`; fully
connected layers with ReLU on top of a language model, Howard & Ruder 2018 (arXiv 1801.06146), section 3.3.

Legend: B batch, T tokens, C hidden width, V vocabulary, K labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.config import LlamaConfig
from llama.errors import InputError, listing
from llama.linear import Linear
from llama.loss import IGNORE, linear_cross_entropy

if TYPE_CHECKING:
    from llama.model import Llama


class FullyConnected(nn.Linear):
    """relu(W x + b), computed in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))


def fully_connected(width: int, hidden: Sequence[int]) -> nn.Sequential:
    """Layers of the widths `hidden`, one after the other, on inputs of `width`."""
    sizes = [width, *hidden]
    return nn.Sequential(*(FullyConnected(a, b) for a, b in pairwise(sizes)))


class LanguageModelHead(Linear):
    """Hidden states to logits; with labels, to the summed cross-entropy of the next token (logits never stored).

    Extra layers stand beside a residual connection, hidden + back(extra(hidden)), with `back` zero at the start: the head
    begins as the one without them, so that what it knows of the vocabulary is kept.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        if config.head_hidden:
            self.extra = fully_connected(config.hidden_size, config.head_hidden)
            self.back = Linear(config.head_hidden[-1], config.hidden_size)
            nn.init.zeros_(self.back.weight)
        self.is_deep = bool(config.head_hidden)

    def forward(self, hidden: Tensor, labels: Tensor | None = None, learned: Tensor | None = None) -> Tensor:
        """hidden (B, T, C) -> logits (B, T, V); with labels (B, T), -> the loss of `Llama.forward`, as `learned` there."""
        if labels is None:
            return super().forward(self._deepened(hidden))
        if learned is None:
            learned = learned_positions(labels)
        predicting = hidden.flatten(0, 1)[learned - 1]  # position t predicts the label of t + 1
        return linear_cross_entropy(self._deepened(predicting), self.weight, labels.flatten()[learned])

    def _deepened(self, hidden: Tensor) -> Tensor:
        return hidden + self.back(self.extra(hidden)) if self.is_deep else hidden


def learned_positions(labels: Tensor) -> Tensor:
    """(N,) where the flattened labels (B, T) are a target: not -100, nor in the first column, which nothing predicts.

    On a GPU this waits for the device, as their number depends on the labels.
    """
    chosen = labels != IGNORE
    chosen[:, 0] = False
    return chosen.flatten().nonzero()[:, 0]


class ClassificationHead(Linear):
    """The hidden state of a row's last token, through the extra layers if there are any, to a score for each label."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__((config.hidden_size, *config.head_hidden)[-1], len(config.id2label))
        if config.head_hidden:
            self.extra = fully_connected(config.hidden_size, config.head_hidden)
        self.is_deep = bool(config.head_hidden)
        self.problem_type = config.problem_type

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden (B, T, C), of which the last column counts -> scores (B, K); with labels, -> `classification_loss`."""
        pooled = hidden[:, -1]
        scores = super().forward(self.extra(pooled) if self.is_deep else pooled)
        return scores if labels is None else classification_loss(scores, labels, self.problem_type)


def classification_loss(scores: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The *sum* of the losses, in fp32 at least (HF stays in the scores' dtype): divide by the number of targets for HF's mean.

    Args:
        scores: (B, K).
        labels: single-label classification: (B,) label ids, -100 where there is no target; cross-entropy. Multi-label
            classification: (B, K) zeros and ones; binary cross-entropy with logits. Regression: (B, K) numbers; squared
            error. NaN is no target in the latter two.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if problem_type == "single_label_classification":
        return F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum")
    none, targets = labels.isnan(), labels.nan_to_num().to(scores.dtype)
    multi = problem_type == "multi_label_classification"
    losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none") if multi else (scores - targets).pow(2)
    return losses.masked_fill(none, 0).sum()


def replace_head(
    model: Llama, labels: Sequence[str] = (), problem_type: str | None = None, hidden: Sequence[int] = (), seed: int = 0
) -> Llama:
    """Give the model another head, in place, with its own weight even where the old head shared the embedding's.

    Args:
        labels: their names make a classifier, whose head is drawn from `seed`; without any it is a language model's head,
            which keeps the weight it has. HF's classifiers find a row's last token by a padding id: the configuration gets 0
            (<unk>, which no text becomes) where it has none.
        problem_type: see `classification_loss`; None for HF's rule (regression for one label, single-label for more).
        hidden: widths of extra fully connected layers.

    Returns:
        The same model.

    Raises:
        InputError: sizes or a problem type that cannot be, or a language model's head for a classifier.
    """
    pad = 0 if labels and model.config.pad_token_id is None else model.config.pad_token_id
    config = dataclasses.replace(
        model.config,
        tie_word_embeddings=False,
        pad_token_id=pad,
        id2label=tuple(labels),
        problem_type=problem_type,
        head_hidden=tuple(hidden),
    )
    old, like = model.head, model.model.embed_tokens.weight
    if not labels and isinstance(old, ClassificationHead):
        raise InputError("this model is a classifier, which has no language model's head to go on from")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        head = ClassificationHead(config) if labels else LanguageModelHead(config)
    model.config = model.model.config = config
    for name in ("lm_head", "score"):
        if hasattr(model, name):
            delattr(model, name)
    head.to(device="cpu" if like.is_meta else like.device, dtype=like.dtype)
    if not labels:
        head.weight = nn.Parameter(old.weight.detach().clone())
    setattr(model, "score" if labels else "lm_head", head)
    return model


def relabel(model: Llama, labels: Sequence[str], problem_type: str | None = None) -> None:
    """Give a classifier's labels other names, and its scores the meaning of another problem, in place; no weight changes.

    Raises:
        InputError: no classifier, another number of labels, or a problem type that cannot be.
    """
    old = model.config.id2label
    if len(labels) != len(old):
        raise InputError(f"{len(labels)} labels ({listing(labels, 10)}) for a head of {len(old)} ({listing(old, 10)})")
    config = dataclasses.replace(model.config, id2label=tuple(labels), problem_type=problem_type)
    model.config = model.model.config = config
    model.head.problem_type = config.problem_type
