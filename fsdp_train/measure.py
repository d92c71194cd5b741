"""What a model is worth, before training, after it, and on the way: losses, counts, and answers for people to read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fsdp_train.classification import ClassificationDataset, evaluate_classifier
from fsdp_train.data import Dataset
from fsdp_train.inputs import Inputs
from fsdp_train.samples import answerable, answers, exact_match, reference
from fsdp_train.train import TrainConfig, evaluate
from fsdp_train.world import World


def held_out_metrics(model: nn.Module, held_out: Dataset | None, batch_size: int, world: World) -> dict[str, float]:
    """`eval_loss`, and a classifier's `accuracy` and `macro_f1`; nothing without held-out data. All processes must call it."""
    if held_out is None:
        return {}
    if isinstance(held_out, ClassificationDataset):
        return evaluate_classifier(model, held_out, batch_size, world)
    return {"eval_loss": evaluate(model, held_out, batch_size, world)}


def measure(
    model: nn.Module, inputs: Inputs, train: TrainConfig, world: World, moment: str, tell: Callable[[str], None]
) -> dict[str, float]:
    """The held-out metrics and `exact_match`; shows sample answers on the way. All processes must call it.

    Args:
        moment: "before" or "after", for people.
    """
    found = held_out_metrics(model, inputs.held_out, train.batch_size, world)
    data, context, fixed = inputs.asked, inputs.base.max_position_embeddings, world.size > 1
    if isinstance(data, ClassificationDataset):
        _show_labels(model, data, train.samples, world, moment, tell)
        return found
    if inputs.tokenizer is not None and train.samples:
        shown = answerable(data.samples, train.sample_tokens, context)[: train.samples]
        given = answers(model, inputs.tokenizer, shown, train.sample_tokens, fixed)
        for sample, answer in zip(shown, given, strict=True):
            expected = reference(inputs.tokenizer, sample)
            tell(f"{moment} training, {sample.where}\n  answer:    {answer[:200]!r}\n  reference: {expected[:200]!r}")
    if inputs.tokenizer is not None and train.exact_match:
        longest = max(len(s.ids) - s.prompt for s in data.samples)
        asked = answerable(data.samples, longest, context)[: train.exact_match]
        found["exact_match"] = exact_match(model, inputs.tokenizer, asked, fixed)
    return found


@torch.no_grad()
def _show_labels(
    model: nn.Module, data: ClassificationDataset, count: int, world: World, moment: str, tell: Callable[[str], None]
) -> None:
    indices = range(min(count, len(data.samples)))
    if not indices:
        return
    model.eval()
    given = data.named(model(**data.batch(indices, world.device).inputs))
    model.train()
    for index, answer in zip(indices, given, strict=True):
        tell(f"{moment} training, {data.samples[index].where}: {answer!r}, reference {data.reference(index)!r}")
