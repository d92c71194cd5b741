"""Whole modules that an adapter trains beside its own parameters (PEFT's `modules_to_save`), the base's kept untouched."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from llama import Llama
from llama.errors import InputError, listing
from llama.loss import IGNORE
from peft_impl.adapters import Adapters, select


class Replaceable(nn.Module):
    """Mixed into a module's class: its forward goes, row by row, to the chosen adapter's copy of it, if there is one."""

    copies: nn.ModuleDict
    adapters: Adapters

    def forward(self, x: Tensor, labels: Tensor | None = None, *known: Tensor) -> Tensor:
        """As the module itself; with `labels` (the head's), the sum over rows of the loss of each row's own copy."""
        base, given = super().forward, (x,) if labels is None else (x, labels, *known)
        masks: dict[str, Tensor] = {}
        for name, copied in self.copies.items():
            rows = self.adapters.rows(name, x)
            if rows is True:
                return cast(Tensor, copied(*given))
            if rows is not False:
                masks[name] = rows
        if masks and labels is not None:
            rows_of = {name: mask.view(-1, *[1] * (labels.dim() - 1)) for name, mask in masks.items()}
            others = ~torch.stack(list(rows_of.values())).any(0)
            nothing = float("nan") if labels.is_floating_point() else IGNORE
            loss = base(x, labels.masked_fill(~others, nothing))
            for name, rows in rows_of.items():
                loss = loss + self.copies[name](x, labels.masked_fill(~rows, nothing))
            return cast(Tensor, loss)
        y = base(*given)
        for name, mask in masks.items():  # a token id has one dimension less than its vector
            y = select(mask.view(-1, *[1] * (y.dim() - 1)), self.copies[name](x), y)
        return cast(Tensor, y)


def attach_copies(model: Llama, paths: list[str], name: str, adapters: Adapters) -> None:
    """Give each module at `paths` a trainable copy (masters in fp32 at least) that answers while `name` is active.

    Raises:
        InputError: another adapter has changed something inside one of them.
    """
    for path in paths:
        module = model.get_submodule(path)
        for inner, part in module.named_modules():
            if isinstance(part, nn.ModuleDict) and not inner.startswith("copies"):
                raise InputError(f"modules_to_save: {path} holds parts of {listing(part)}; a copy must be of the base alone")
        duplicate = _restored(copy.deepcopy(module)).requires_grad_(True)
        for parameter in duplicate.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if not isinstance(module, Replaceable):
            original = type(module)
            module.__class__ = type(f"Replaceable{original.__name__}", (Replaceable, original), {})
            module.copies, module.adapters = nn.ModuleDict(), adapters  # type: ignore[assignment]
        cast(Replaceable, module).copies[name] = duplicate


def detach_copies(model: Llama, name: str) -> None:
    """Remove the copies of adapter `name`; a module without copies gets its own class back."""
    for module in list(model.modules()):
        if isinstance(module, Replaceable) and name in module.copies:
            del module.copies[name]
            if not module.copies:
                _restored(module)


def _restored(module: nn.Module) -> nn.Module:
    if isinstance(module, Replaceable):
        del module.copies, module.adapters
        module.__class__ = type(module).__mro__[2]
    return module
