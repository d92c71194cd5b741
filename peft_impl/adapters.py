"""Adapters on a frozen backbone: add, choose, remove; and the seam where a further method plugs in.

    add_adapter(model, LoraConfig(r=8), "math")       # edits the model in place and freezes the base
    set_adapter(model, None)                          # the bare base, bit for bit
    remove_adapter(model, "math")                     # as if it had never been there

A method is a `Method` in its own file: its configuration, how it attaches to a model, and which of its parameters goes
under which key of a PEFT file. Adapters are modules inside the model; which one is active stands in `model.adapters`,
one plain object that all of them share.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llama import Llama
from llama.errors import InputError, listing, nearest


@dataclass
class Adapters:
    """Which adapters a model has, which one its rows go through, and which one is merged into the base.

    Attributes:
        kept: while one is merged, the base's own weights: (parameter, its tensor before the merge).
    """

    configs: dict[str, Any] = field(default_factory=dict)
    active: str | None = None
    merged: str | None = None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def check_name(self, name: str) -> None:
        """Raise InputError unless `name` is an adapter of this model."""
        if name not in self.configs:
            known = f"it has {listing(self.configs)}" if self.configs else "it has none"
            raise InputError(f"the model has no adapter {name!r}; {known}{nearest(name, self.configs)}")


class AdapterLeaf(nn.Module):
    """A module that owns trainable parameters only, and whose forward returns fresh tensors, never views of them.

    Both halves matter under FSDP: a leaf is sharded as a unit of its own, so that its gradients are sharded without those
    of the frozen weights around it, and its storage is freed as soon as its forward has returned.
    """

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Fill the parameters with the method's start, from `generator` alone."""
        raise NotImplementedError(f"{type(self).__name__} has no initialisation")


@dataclass(frozen=True)
class Method:
    """What the rest of the program needs to know of a PEFT method.

    Attributes:
        config: the configuration's dataclass.
        peft_type: PEFT's name of the method, as in `adapter_config.json`.
        attach: (model, config, name) -> the new leaves by module path; checks the configuration against the model first.
        detach: (model, name) -> None; the exact inverse.
        tensors: (model, name) -> {key in a PEFT file: parameter name in the model}, complete.
        to_peft: (model, config) -> the contents of `adapter_config.json` that are the method's own.
        from_peft: (found, where) -> config; refuses what is not implemented.
    """

    config: type
    peft_type: str
    attach: Callable[[Llama, Any, str], dict[str, AdapterLeaf]]
    detach: Callable[[Llama, str], None]
    tensors: Callable[[Llama, str], dict[str, str]]
    to_peft: Callable[[Llama, Any], dict[str, Any]]
    from_peft: Callable[[dict[str, Any], str], Any]


METHODS: dict[str, Method] = {}  # by PEFT's name; each method's file registers its own


def method_of(config: Any) -> Method:
    """The method whose configuration `config` is."""
    for method in METHODS.values():
        if isinstance(config, method.config):
            return method
    known = listing(method.config.__name__ for method in METHODS.values())
    raise InputError(f"{type(config).__name__} is not the configuration of an adapter; expected {known}")


def adapters_of(model: nn.Module) -> Adapters:
    """The model's adapters; an empty set for one that never had any."""
    found = getattr(model, "adapters", None)
    return found if isinstance(found, Adapters) else Adapters()


def add_adapter(model: Llama, config: Any, name: str = "default", seed: int = 0) -> None:
    """Attach a new adapter, trainable and active, and freeze the base; the model stays as it was when that is refused.

    The base's parameter names and bits stay as they are. The start depends on `seed` and each module's path only, so it
    is the same on every process and for every order of construction.

    Raises:
        InputError: the name is taken or unusable, the configuration does not fit the model, or an adapter is merged.
    """
    state = adapters_of(model)
    if state.merged is not None:
        raise InputError(f"adapter {state.merged!r} is merged into the base; unmerge it before adding another")
    if name in state.configs:
        raise InputError(f"the model already has an adapter {name!r}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"adapter name {name!r}; expected letters, digits, '_' and '-'")
    if hasattr(nn.ModuleDict(), name):
        raise InputError(f"adapter name {name!r} is taken by torch's ModuleDict, which keeps the adapters")
    method = method_of(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not state.configs:
        model.requires_grad_(False)
        model.adapters = state  # type: ignore[assignment]  # a plain object, not a submodule
    try:
        leaves = method.attach(model, config, name)
    except InputError:
        method.detach(model, name)
        if not state.configs:
            del model.adapters
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    for path, leaf in leaves.items():
        digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=8).digest()
        leaf.reset_parameters(torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big")))
    state.configs[name] = config
    state.active = name


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Let every row of a batch go through the adapter `name`, or through the bare base with None.

    Raises:
        InputError: no such adapter, or one is merged.
    """
    state = adapters_of(model)
    if name is not None:
        state.check_name(name)
    if state.merged is not None:
        raise InputError(f"adapter {state.merged!r} is merged into the base; unmerge it before choosing")
    state.active = name


def remove_adapter(model: Llama, name: str) -> None:
    """Take the adapter out again; after the last one the model is the base, module types included.

    Raises:
        InputError: no such adapter, or one is merged.
    """
    state = adapters_of(model)
    state.check_name(name)
    if state.merged is not None:
        raise InputError(f"adapter {state.merged!r} is merged into the base; unmerge it before removing one")
    method_of(state.configs[name]).detach(model, name)
    del state.configs[name]
    if state.active == name:
        state.active = None
    if not state.configs:
        del model.adapters
