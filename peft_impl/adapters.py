"""Adapters on a frozen backbone: add, choose, remove; and the seam where a further method plugs in.

    add_adapter(model, LoraConfig(r=8), "math")       # edits the model in place and freezes the base
    set_adapter(model, None)                          # the bare base, bit for bit
    set_adapter(model, ["math", None, "chat"])        # one adapter, or none, for each row of the batch
    remove_adapter(model, "math")                     # the other adapters and the base are as without it

A method is a `Method` in its own file: its configuration, how it attaches to a model, and which of its parameters goes
under which key of a PEFT file. Adapters are modules inside the model; which of them a row goes through stands in
`model.adapters`, one plain object that all of them share.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from llama import Llama
from llama.errors import InputError, listing, nearest


def option(default: Any, help: str) -> Any:
    """A field of a method's configuration with its line of help, which the training program shows beside its flag."""
    return field(default=default, metadata={"help": help})


Choice = str | None | tuple[str | None, ...]  # one adapter (or none) for all rows, or one entry per row


@dataclass
class Adapters:
    """Which adapters a model has, which of them its rows go through, and which one is merged into the base.

    Attributes:
        seeds: what each adapter's start was drawn from.
        active: set by `set_adapter`; it must stay until backward is done, since recomputation in backward reads it again.
        kept: while one is merged, the base's own weights: (parameter, its tensor before the merge).
    """

    configs: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    active: Choice = None
    merged: str | None = None
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _masks: dict[str, Tensor] = field(default_factory=dict)

    def choose(self, active: Choice, device: torch.device | str = "cpu") -> None:
        """Change the choice. Its masks are made here, once, for all modules: compiled layers must not keep anything."""
        self.active = active
        self._masks.clear()
        if isinstance(active, tuple):
            for name in self.configs:
                self._masks[name] = torch.tensor([row == name for row in active], device=device)

    def rows(self, name: str, like: Tensor) -> bool | Tensor:
        """Which rows of `like` (B, ...) go through adapter `name`: all (True), none (False), or a mask (B, 1, ...).

        With a choice per row every resident adapter gets a mask, be it all False: each process of a sharded model then
        makes the same calls, whatever its rows are.

        Raises:
            InputError: the choice is of another number of rows.
        """
        if self.merged is not None:
            return False
        if not isinstance(self.active, tuple):
            return self.active == name
        if len(self.active) != len(like):
            raise InputError(f"set_adapter chose for {len(self.active)} rows, but the batch has {len(like)}")
        # A copy only where the parameters wait in the host's memory.
        return self._masks[name].to(like.device).view(-1, *[1] * (like.dim() - 1))

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


def select(rows: bool | Tensor, adapted: Tensor, plain: Tensor) -> Tensor:
    """`adapted` in the rows (see `Adapters.rows`) that go through an adapter, `plain` in the others."""
    return adapted if rows is True else torch.where(cast(Tensor, rows), adapted, plain)


Pack = Callable[[Llama, str, Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """What the rest of the program needs to know of a PEFT method.

    Attributes:
        config: the configuration's dataclass.
        attach: (model, config, name) -> the new leaves by module path; checks the configuration against the model first.
        detach: (model, name) -> None; the exact inverse.
        pack: (model, name, parameters by name) -> the tensors of a PEFT file by key, complete.
        unpack: (model, name, tensors by key) -> parameters by name, the inverse.
        to_peft: (model, config) -> the contents of `adapter_config.json`, its `peft_type` included.
        from_peft: (found, where) -> config; refuses what is not implemented.
        inert: (tensors by key) -> why an adapter of these tensors has no effect, or "".
        fits: (model, found, where) -> None; refuses a file that says it belongs to another base.
    """

    config: type
    attach: Callable[[Llama, Any, str], dict[str, AdapterLeaf]]
    detach: Callable[[Llama, str], None]
    pack: Pack
    unpack: Pack
    to_peft: Callable[[Llama, Any], dict[str, Any]]
    from_peft: Callable[[dict[str, Any], str], Any]
    inert: Callable[[Mapping[str, Tensor]], str] = lambda tensors: ""
    fits: Callable[[Llama, dict[str, Any], str], None] = lambda model, found, where: None


def renamed(names: Callable[[Llama, str], dict[str, str]]) -> tuple[Pack, Pack]:
    """`pack` and `unpack` of a method whose files hold its parameters as they are; `names` maps key to parameter name."""

    def pack(model: Llama, name: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: parameters[own] for key, own in names(model, name).items()}

    def unpack(model: Llama, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {own: tensors[key] for key, own in names(model, name).items()}

    return pack, unpack


METHODS: dict[str, Method] = {}  # by the `peft_type` of its files; each method's file registers its own


def method_of(config: Any) -> Method:
    """The method whose configuration `config` is."""
    for method in METHODS.values():
        if isinstance(config, method.config):
            return method
    known = listing(dict.fromkeys(method.config.__name__ for method in METHODS.values()))
    raise InputError(f"{type(config).__name__} is not the configuration of an adapter; expected {known}")


def adapters_of(model: nn.Module) -> Adapters:
    """The model's adapters; an empty set for one that never had any."""
    found = getattr(model, "adapters", None)
    return found if isinstance(found, Adapters) else Adapters()


def add_adapter(model: Llama, config: Any, name: str = "default", seed: int = 0) -> None:
    """Attach a new adapter, trainable and active, and freeze the base; the model stays as it was when that is refused.

    The base's parameter names and bits stay as they are. The start depends on `seed` and each module's path only, so it
    is the same on every process and for every order of construction. On a base that is on the meta device it is there, too,
    until `materialise_adapter`.

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
    except BaseException:  # an InputError, or no memory for a rank of a billion
        method.detach(model, name)
        if not state.configs:
            del model.adapters
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    for path, leaf in leaves.items():
        if not _is_meta(leaf):  # random numbers by the billion, for nothing
            leaf.reset_parameters(_generator(seed, path))
    state.configs[name], state.seeds[name] = config, seed
    state.choose(name)


def materialise_adapter(model: nn.Module, name: str = "default") -> None:
    """Give an adapter of a base on the meta device its start, on the CPU. What it starts from the base's values (DoRA, whole
    copies of modules) is left where the base is."""
    for path, leaf in _leaves(model, name):
        if _is_meta(leaf):
            leaf.to_empty(device="cpu")
            leaf.reset_parameters(_generator(adapters_of(model).seeds[name], path))


def _is_meta(leaf: AdapterLeaf) -> bool:
    return any(parameter.is_meta for parameter in leaf.parameters())


def _leaves(model: nn.Module, name: str) -> Iterator[tuple[str, AdapterLeaf]]:
    """An adapter's leaves by the paths of the modules that they were added to."""
    for path, leaf in model.named_modules():
        if isinstance(leaf, AdapterLeaf) and path.endswith(f".{name}"):
            yield path.rsplit(".", 2)[0], leaf


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{path}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


@torch.no_grad()
def is_untrained(model: nn.Module, name: str) -> bool:
    """Whether every leaf of adapter `name` is still what `add_adapter` made it: it draws each start again and compares."""
    for path, leaf in _leaves(model, name):
        now = [parameter.clone() for parameter in leaf.parameters()]
        leaf.reset_parameters(_generator(adapters_of(model).seeds[name], path))
        same = all(torch.equal(a, b) for a, b in zip(now, leaf.parameters(), strict=True))
        for parameter, value in zip(leaf.parameters(), now, strict=True):
            parameter.copy_(value)
        if not same:
            return False
    return True


def set_adapter(model: nn.Module, name: str | Sequence[str | None] | None) -> None:
    """Let every row of a batch go through the adapter `name`, or through the bare base with None, or each through its own.

    Costs no copy of the base. Processes that share a sharded model must all choose one for all rows, or all per row; which
    rows they choose is then free.

    Args:
        name: one adapter, None, or one entry per row of the batches to come. It must stay until backward is done.

    Raises:
        InputError: no such adapter, or one is merged.
    """
    state = adapters_of(model)
    names = [name] if name is None or isinstance(name, str) else list(name)
    for one in names:
        if one is not None:
            state.check_name(one)
    if state.merged is not None:
        raise InputError(f"adapter {state.merged!r} is merged into the base; unmerge it before choosing")
    device = next(model.parameters()).device
    state.choose(name if name is None or isinstance(name, str) else tuple(names), device)


def remove_adapter(model: Llama, name: str) -> None:
    """Take the adapter out again; after the last one the model is the base, module types included. It stays frozen.

    Raises:
        InputError: no such adapter, or one is merged.
    """
    state = adapters_of(model)
    state.check_name(name)
    if state.merged is not None:
        raise InputError(f"adapter {state.merged!r} is merged into the base; unmerge it before removing one")
    method_of(state.configs[name]).detach(model, name)
    del state.configs[name], state.seeds[name]
    if state.active == name or (isinstance(state.active, tuple) and name in state.active):
        state.choose(None)
    if not state.configs:
        del model.adapters
