"""Merging a LoRA adapter into the base's weights, and taking it out again bit for bit.

report = merge(model, "default")       # one matrix per projection: no cost at inference
unmerge(model)                         # torch.equal to what it was
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llama import Llama
from llama.errors import InputError
from llama.rounding import Rounding
from peft_impl.adapters import adapters_of, remove_adapter
from peft_impl.lora import LoraConfig, LoRALinear
from peft_impl.modules_to_save import Replaceable


@dataclass
class MergeReport(Rounding):
    """What rounding to the base's dtype cost, over all weights that were merged.

    Attributes:
        modules: how many were merged.
    """

    modules: int = 0


@torch.no_grad()
def merge(model: Llama, name: str = "default") -> MergeReport:
    """Fold adapter `name` into the base's weights: computed in fp32, rounded once to the base's dtype.

    The base's own weights are kept beside the merged ones, for `unmerge`. Meanwhile no adapter can be chosen, added or
    removed.

    Raises:
        InputError: no such adapter, or it is no LoRA; one is merged already; the result is not finite; or a trained copy of a
            tied head or embedding would have to change both.
    """
    state = adapters_of(model)
    state.check_name(name)
    if state.merged is not None:
        raise InputError(f"adapter {state.merged!r} is merged already; a second merge would add its update twice")
    if not isinstance(state.configs[name], LoraConfig):
        kind = type(state.configs[name]).__name__.removesuffix("Config")
        raise InputError(f"adapter {name!r} is no LoRA but a {kind}, which no change of the base's weights can replace")
    tied = {"lm_head", "model.embed_tokens"} if model.config.ties_head else set()
    report = MergeReport()
    replaced: list[tuple[Tensor, Tensor]] = []
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and name in module.lora:
            pairs = [(module.weight, module.lora[name].merged_weight(module.weight))]  # type: ignore[operator]
        elif isinstance(module, Replaceable) and name in module.copies:
            if path in tied:
                raise InputError(f"{path} of adapter {name!r} cannot be merged: the base ties head and embedding to one weight")
            own = dict(module.named_parameters())
            pairs = [(own[key], trained.detach()) for key, trained in module.copies[name].named_parameters()]
        else:
            continue
        for weight, exact in pairs:
            merged = exact.to(weight.dtype)
            if not torch.isfinite(merged).all():
                raise InputError(f"merging {name!r} gives non-finite weights in {path}")
            report.add(exact, merged, weight)
            replaced.append((weight, merged))
        report.modules += 1
    state.kept = [(weight, weight.data) for weight, _ in replaced]
    for weight, merged in replaced:
        weight.data = merged
    state.merged = name
    return report


def unmerge(model: Llama) -> None:
    """Give the base its own weights back, the very tensors that `merge` set aside.

    Raises:
        InputError: nothing is merged.
    """
    state = adapters_of(model)
    if state.merged is None:
        raise InputError("no adapter is merged")
    for weight, original in state.kept:
        weight.data = original
    state.merged, state.kept = None, []


def merge_and_unload(model: Llama, name: str = "default") -> MergeReport:
    """Merge, then forget the adapter and the base's old weights: what is left is a plain `Llama`, ready for `llama.save`.

    Raises:
        InputError: as `merge`; or the model has further adapters, which would not be true of the new base.
    """
    state = adapters_of(model)
    state.check_name(name)
    if others := [other for other in state.configs if other != name]:
        raise InputError(f"the model also has {others}; remove them first: they belong to the base without {name!r}")
    if state.merged == name:
        unmerge(model)
    report = merge(model, name)
    state.merged, state.kept = None, []
    remove_adapter(model, name)
    return report
