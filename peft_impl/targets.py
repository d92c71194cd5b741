"""Which modules an adapter's configuration means: PEFT's matching rules, with errors for patterns that match nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from llama.errors import InputError, nearest
from llama.linear import Linear

Value = TypeVar("Value")


def linear_targets(
    model: nn.Module, targets: str | Sequence[str], layers: Sequence[int] | None, excluded: Sequence[str] = ()
) -> list[str]:
    """Paths of the projections that `targets` names, in the model's order.

    Args:
        targets: names, each equal to a path or to its end after a dot; or one string: "all-linear" (every projection but
            the head), or a regular expression that must match a whole path.
        layers: restrict to these decoder layers; None or none for all.
        excluded: paths, themselves and all below them, that are left out.

    Raises:
        InputError: a name, the expression, or a layer number that matches nothing; or one that matches the head or the
            embedding, which have no low-rank form here.
    """
    modules = _base_modules(model)
    paths = [p for p in modules if not any(p == e or p.startswith(e + ".") for e in excluded)]
    if targets == "all-linear":
        chosen = [p for p in paths if _adaptable(p, modules[p])]
    elif isinstance(targets, str):
        try:
            chosen = [p for p in paths if re.fullmatch(targets, p)]
        except re.error as error:
            raise InputError(f"target_modules {targets!r} is not a regular expression: {error}") from None
        if not chosen:
            raise InputError(f"target_modules {targets!r}, read as a regular expression, matches no module path"
                             " such as model.layers.0.self_attn.q_proj")  # fmt: skip
    else:
        for name in targets:
            if not any(_ends_with(p, name) for p in modules):  # PEFT writes the names of excluded modules, too
                raise InputError(f"target_modules: {name!r} matches no module{nearest(name, _last_names(paths))}")
        chosen = [p for p in paths if any(_ends_with(p, name) for name in targets)]
    for path in chosen:
        module = modules[path]
        if not _adaptable(path, module):
            raise InputError(
                f"target_modules: {path} is a {type(module).__name__}; low-rank updates apply to the decoder layers'"
                " projections (train heads and embeddings through modules_to_save)"
            )
    if layers:
        present = {_layer(p) for p in chosen}
        if wrong := [layer for layer in layers if layer not in present]:
            raise InputError(f"layers_to_transform: no targeted module in layer {wrong[0]}; layers are {_range(present)}")
        chosen = [p for p in chosen if _layer(p) in layers or p in targets]  # a whole path stands, as in PEFT
    if not chosen:
        raise InputError("target_modules: nothing is left to adapt")
    return chosen


def saved_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Paths of the modules that `modules_to_save` names: a plain `endswith`, as in PEFT ("norm" also means
    "input_layernorm").

    Raises:
        InputError: a name that matches no module with parameters, or one that lies inside another.
    """
    modules = _base_modules(model)
    paths = [p for p in modules if p and any(True for _ in modules[p].parameters())]
    for name in names:
        if not any(p.endswith(name) for p in paths):
            raise InputError(f"modules_to_save: {name!r} matches no module{nearest(name, _last_names(modules))}")
    chosen = [p for p in paths if any(p.endswith(name) for name in names)]
    for outer in chosen:
        if inner := [p for p in chosen if p.startswith(outer + ".")]:
            raise InputError(f"modules_to_save: {inner[0]} lies inside {outer}, which is named too; its copy holds both")
    return chosen


def pattern_value(pattern: Mapping[str, Value], path: str, default: Value) -> Value:
    """The value of the first key that matches the end of `path` (rank_pattern, alpha_pattern), or the default."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def check_pattern(field: str, pattern: Mapping[str, object], paths: Sequence[str]) -> None:
    """Raise InputError for a key of `pattern` that matches none of the adapted modules."""
    for key in pattern:
        try:
            matches = any(re.match(rf"(.*\.)?({key})$", path) for path in paths)
        except re.error as error:
            raise InputError(f"{field}: {key!r} is not a regular expression: {error}") from None
        if not matches:
            raise InputError(f"{field}: {key!r} matches no adapted module, such as {paths[0]}")


def _base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The base's own modules by path; what adapters have brought stands in ModuleDicts, which a Llama has none of."""
    modules = dict(model.named_modules())
    brought = tuple(path for path, module in modules.items() if isinstance(module, nn.ModuleDict))
    return {p: m for p, m in modules.items() if p not in brought and not p.startswith(tuple(b + "." for b in brought))}


def _adaptable(path: str, module: nn.Module) -> bool:
    return isinstance(module, Linear) and path.startswith("model.layers.")


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _last_names(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths if path}


def _layer(path: str) -> int | None:
    number = re.search(r"\.(\d+)\.", path)
    return int(number.group(1)) if number else None


def _range(layers: set[int | None]) -> str:
    known = sorted(layer for layer in layers if layer is not None)
    return f"{known[0]}..{known[-1]}" if known else "none"
