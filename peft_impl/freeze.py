"""What trains: counting it, and showing it."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a tied weight counts once."""
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(n for trains, n in sizes if trains), sum(n for _, n in sizes)


def trainable_table(model: nn.Module) -> str:
    """The trainable tensors, one line per kind (layer numbers folded to *), with counts: for people to check."""
    tensors: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            tensors[kind] += 1
            numbers[kind] += parameter.numel()
    width = max((len(kind) for kind in numbers), default=0)
    return "\n".join(f"  {kind:<{width}}  {tensors[kind]:>4} x  {numbers[kind]:>13,} parameters" for kind in numbers)
