"""What trains: choosing parameters by name, kind or depth, counting them, and showing them.

    names = select_parameters(model, ["last:2", "norms", "-model.norm"])
    train_only(model, names)

Choosing layers is the oldest of the criteria: Yosinski et al. 2014 (arXiv 1411.1792) for the topmost; norms alone, Lu et al.
2021 (2103.05247); biases alone, Ben Zaken et al. 2021 (2106.10199, BitFit; Llama 2's own projections have none).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import nn

from llama import Llama
from llama.errors import InputError, nearest

# Words of the vocabulary: what must occur in a parameter's name, as a regular expression.
KINDS = {
    "attention": r"\.self_attn\.",
    "mlp": r"\.mlp\.",
    "norms": r"norm\.weight$",
    "biases": r"\.bias$",
    "embeddings": r"\.embed_tokens\.",
    "lm_head": r"^lm_head\.",
}


def select_parameters(model: Llama, patterns: Sequence[str]) -> list[str]:
    """The names of the parameters that `patterns` mean, in the model's order.

    Args:
        patterns: each a word (attention, mlp, norms, biases, embeddings, lm_head); `last:N` or `first:N` decoder layers; or a
            name or glob for any run of whole parts of a parameter's name: `layers.30`, `norm`, `layers.*.q_proj`. A pattern
            that begins with "-" takes its parameters out again, wherever it stands.

    Raises:
        InputError: a pattern that matches nothing (with the nearest that would), a number of layers that the model does not
            have, or nothing left.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    excluded: set[str] = set()
    for pattern in patterns:
        (excluded if pattern.startswith("-") else chosen).update(_matching(model, names, pattern.removeprefix("-")))
    if not chosen - excluded:
        raise InputError(f"{','.join(patterns)!r} leaves nothing to train")
    return [name for name in names if name in chosen - excluded]


def _matching(model: Llama, names: Sequence[str], pattern: str) -> list[str]:
    config = model.config
    if pattern == "lm_head" and config.ties_head:
        raise InputError(
            "'lm_head' shares the embedding's weight in this model (tie_word_embeddings); 'embeddings' trains both"
        )
    if counted := re.fullmatch(r"(first|last):(.*)", pattern):
        number, layers = counted[2], config.num_hidden_layers
        if not (number.isdecimal() and 1 <= int(number) <= layers):
            raise InputError(f"{pattern!r}: expected {counted[1]}:N with 1 <= N <= {layers}, the model's decoder layers")
        span = range(int(number)) if counted[1] == "first" else range(layers - int(number), layers)
        return [name for name in names if layer_of(name) in span]
    if pattern in KINDS:
        found = [name for name in names if re.search(KINDS[pattern], name)]
    else:
        found = [name for name in names if fnmatchcase(f".{name}.", f"*.{pattern}.*")]
    if not found:
        if pattern == "biases":
            raise InputError("'biases' matches nothing: Llama 2's projections have none")
        raise InputError(f"{pattern!r} matches no parameter{nearest(pattern, _known(names))}")
    return found


def _known(names: Sequence[str]) -> list[str]:
    """Patterns that match something."""
    words = [word for word, kind in KINDS.items() if any(re.search(kind, name) for name in names)]
    inside = {f"layers.*.{name.split('.')[-2]}" for name in names if layer_of(name) is not None}
    parts = {part for name in names for part in (name, *name.split("."))} | {f"layers.{i}" for i in layers_in(names)}
    return [*words, *sorted(parts | inside), "last:N", "first:N"]


def layer_of(name: str) -> int | None:
    """The decoder layer that a parameter or module of this name belongs to."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def layers_in(names: Collection[str]) -> list[int]:
    """The decoder layers that occur in `names`, in order."""
    return sorted({layer for name in names if (layer := layer_of(name)) is not None})


def train_only(model: nn.Module, names: Collection[str]) -> None:
    """Let exactly these parameters require a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


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
