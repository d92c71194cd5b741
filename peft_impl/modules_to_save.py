"""Whole modules that an adapter trains beside its own parameters (PEFT's `modules_to_save`), the base's kept untouched."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from llama import Llama
from llama.errors import InputError, listing
from peft_impl.adapters import Adapters


class Replaceable(nn.Module):
    """Mixed into a module's class: its forward goes to the active adapter's copy of it, if there is one."""

    copies: nn.ModuleDict
    adapters: Adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.adapters.active
        if name is not None and name in self.copies and self.adapters.merged is None:
            return self.copies[name](*args, **kwargs)
        return super().forward(*args, **kwargs)


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
