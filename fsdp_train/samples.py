"""Held-out prompts answered by the model, before and after training: for people to read, and counted.

Every process makes the same calls on the same prompts with a fixed number of steps: under FSDP each call is a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from fsdp_train.data import Sample
from llama import Llama, Tokenizer, generate

GENERATION_BATCH = 64  # prompts answered at once


def answerable(samples: Sequence[Sample], max_tokens: int, context: int) -> list[Sample]:
    """The samples that have a prompt of their own and leave room for an answer in the model's context."""
    return [s for s in samples if s.prompt < len(s.ids) and s.prompt + max_tokens <= context]


def answers(model: nn.Module, tokenizer: Tokenizer, samples: Sequence[Sample], max_tokens: int, fixed_steps: bool) -> list[str]:
    """Greedy answers to the samples' prompts."""
    texts = []
    for start in range(0, len(samples), GENERATION_BATCH):
        prompts = [s.ids[: s.prompt].tolist() for s in samples[start : start + GENERATION_BATCH]]
        rows = generate(cast(Llama, model), prompts, max_tokens, eos_id=tokenizer.eos_id, fixed_steps=fixed_steps)
        texts += [tokenizer.show(row).strip() for row in rows]
    return texts


def reference(tokenizer: Tokenizer, sample: Sample) -> str:
    """What the data says after the prompt."""
    return tokenizer.show(sample.ids[sample.prompt :].tolist()).strip()


def exact_match(model: nn.Module, tokenizer: Tokenizer, samples: Sequence[Sample], fixed_steps: bool) -> float:
    """The part of the samples whose greedy answer equals the reference."""
    longest = max(len(s.ids) - s.prompt for s in samples)
    given = answers(model, tokenizer, samples, longest, fixed_steps)
    return sum(a == reference(tokenizer, s) for a, s in zip(given, samples, strict=True)) / len(samples)
