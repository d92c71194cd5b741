"""The head of the model to be trained: the base's own, or a new one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from fsdp_train.classification import LabelSpace
from fsdp_train.settings import option
from llama import Llama, LlamaConfig, replace_head
from llama.errors import InputError, listing
from peft_impl import labels_on


@dataclass(frozen=True)
class HeadConfig:
    """What follows the final norm."""

    kind: Literal["lm", "classification"] = option("lm", "the next token, or a label for a text (data.format classification)")
    hidden: tuple[int, ...] = option((), "widths of extra fully connected layers in front of it, separated by commas")
    num_labels: int | None = option(None, "of a classification head (default: the labels in the data; 1: a regression)")
    feature_cache: str = option(
        "auto", "with method head: where a classifier's frozen features are kept, computed once (auto: the user's cache"
        " directory; none: compute them in each step)", "auto|none|DIR"
    )  # fmt: skip

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden):
            raise InputError(f"hidden {','.join(map(str, self.hidden))}: expected positive widths")
        if self.num_labels is not None and self.num_labels < 1:
            raise InputError(f"num_labels {self.num_labels}: expected at least 1")


def known_labels(base: LlamaConfig, head: HeadConfig) -> LabelSpace | None:
    """The labels of a base that is a classifier already; None where the data will say.

    Raises:
        InputError: it is one, and the settings say otherwise.
    """
    if not base.id2label:
        return None
    if head.kind != "classification":
        raise InputError("the base is a classifier; give --finetune.head.kind classification")
    if head.num_labels not in (None, len(base.id2label)):
        raise InputError(
            f"--finetune.head.num_labels {head.num_labels}, but the base has {len(base.id2label)} labels:"
            f" {listing(base.id2label, 10)}"
        )
    return LabelSpace(base.id2label, str(base.problem_type))


def labels_of_adapter(
    path: str, base: LlamaConfig, number: int | None
) -> tuple[LabelSpace | None, int | None, str]:  # fmt: skip
    """The labels of a classifier's adapter on this base; where neither names any, how many the data
    is to have; and a note for people.

    Raises:
        InputError: it is none, or has another number of labels than `number` or the base.
    """
    try:
        found = labels_on(base, path)
    except InputError as error:
        raise InputError(f"--finetune.from_adapter: {error}") from None
    if found is None:
        raise InputError(f"--finetune.from_adapter {path} is no classifier's adapter")
    names, problem, note = found
    if number not in (None, len(names)):
        raise InputError(f"--finetune.head.num_labels {number}, but {path} has {len(names)} labels: {listing(names, 10)}")
    return (None if problem is None else LabelSpace(names, problem)), len(names), note


def wanted(base: LlamaConfig, head: HeadConfig, space: LabelSpace | None, own_head: bool) -> LlamaConfig:
    """The configuration of the model to be trained; equal to `base` where head and labels stay.

    Args:
        own_head: the head trains by itself, and so needs a weight of its own where it shares the embedding's.

    Raises:
        InputError: extra layers other than those that the base has.
    """
    if base.head_hidden and head.hidden not in ((), base.head_hidden):
        raise InputError(
            f"--finetune.head.hidden {','.join(map(str, head.hidden))}, but the base's head has layers of {base.head_hidden}"
        )
    if base.id2label and head.hidden and not base.head_hidden:
        raise InputError("--finetune.head.hidden: the base is a classifier, whose head cannot be given further layers")
    if base.id2label:
        named = space or LabelSpace(base.id2label, str(base.problem_type))
        return dataclasses.replace(base, id2label=named.names, problem_type=named.problem_type)
    untied = own_head and base.ties_head and head.kind == "lm"
    new_layers = bool(head.hidden) and not base.head_hidden
    if not untied and not new_layers and space is None:
        return base
    with torch.device("meta"):
        labels, problem = (space.names, space.problem_type) if space is not None else ((), None)
        return replace_head(Llama(base), labels, problem, head.hidden).config


def new_parameters(base: LlamaConfig, target: LlamaConfig) -> list[str]:
    """Names of the parameters that `target` has and `base` has not: they are drawn anew, and so always train."""
    names = []
    for config in (base, target):
        with torch.device("meta"):
            names.append([name for name, _ in Llama(config).named_parameters()])
    return [name for name in names[1] if name not in names[0]]
