"""LoRA: a frozen projection W plus a trained low-rank update, y = W x + s B A x.

    add_adapter(model, LoraConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")))

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685), eq. 3; rsLoRA, Kalajdzievski 2023 (2312.03732): s = alpha / sqrt(r);
DoRA, Liu et al. 2024 (2402.09353), eq. 5. Formulas, initialisation and files equal Hugging Face PEFT's.

Legend: `in`, `out` sizes of the projection, r rank, s scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama
from llama.errors import InputError, listing
from llama.linear import Linear
from peft_impl.adapters import METHODS, AdapterLeaf, Adapters, Method, adapters_of, option, renamed, select
from peft_impl.dropout import Dropout
from peft_impl.modules_to_save import Replaceable, attach_copies, detach_copies
from peft_impl.targets import check_pattern, linear_targets, pattern_value, saved_targets


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how, in PEFT's field names.

    Raises:
        InputError: a value outside its range, naming the field.
    """

    r: int = option(8, "rank of the update")
    lora_alpha: float = option(16, "the update is scaled by lora_alpha / r")
    lora_dropout: float = option(0.0, "dropout probability on the update's input")
    target_modules: tuple[str, ...] | str = option(
        ("q_proj", "v_proj"), "names, separated by commas; or all-linear; or a regular expression for whole module paths"
    )
    layers_to_transform: tuple[int, ...] | None = option(None, "only these decoder layers, separated by commas")
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "other ranks by module, q_proj=16,layers.0.*=4"}
    )
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "other values of lora_alpha by module"})
    modules_to_save: tuple[str, ...] = option((), "modules trained whole beside the updates, such as lm_head")
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(r) instead")
    use_dora: bool = option(False, "train a magnitude per output row too (DoRA)")

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise InputError(f"{name} = {getattr(self, name)!r}; expected pairs of a module pattern and a number")
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if type(rank) is not int or rank < 1:
                raise InputError(f"LoRA rank {name} = {rank!r}; expected a positive integer")
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
                raise InputError(f"{name} = {alpha!r}; expected a positive number")
        if not (isinstance(self.lora_dropout, int | float) and 0 <= self.lora_dropout < 1):
            raise InputError(f"lora_dropout = {self.lora_dropout!r}; expected a probability in [0, 1)")
        if not self.target_modules:
            raise InputError("target_modules is empty; nothing would be adapted")
        names = () if isinstance(self.target_modules, str) else self.target_modules
        for field_name, values, kind in (
            ("target_modules", names, str),
            ("modules_to_save", self.modules_to_save, str),
            ("layers_to_transform", () if self.layers_to_transform is None else self.layers_to_transform, int),
        ):
            if not isinstance(values, tuple | list) or not all(type(value) is kind and value != "" for value in values):
                raise InputError(f"{field_name} = {values!r}; expected a list of {kind.__name__}")
        for flag in ("use_rslora", "use_dora"):
            if type(getattr(self, flag)) is not bool:
                raise InputError(f"{flag} = {getattr(self, flag)!r}; expected true or false")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear" and self.layers_to_transform:
            raise InputError("layers_to_transform cannot restrict a regular expression; name the layers in the expression")


class LowRank(AdapterLeaf):
    """The update of one projection: x (..., in) -> s B A dropout(x) (..., out). A (r, in), B (out, r)."""

    def __init__(self, linear: Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)  # masters are fp32 beside a bf16 base
        kind: dict[str, Any] = {"dtype": dtype, "device": linear.weight.device}
        self.scale = scale
        self.dropout = Dropout(dropout)
        self.A = nn.Parameter(torch.empty(r, linear.in_features, **kind))
        self.B = nn.Parameter(torch.empty(linear.out_features, r, **kind))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """A uniform in +-1/sqrt(in) (PEFT's Kaiming with a = sqrt 5), B zero: the update starts as nothing."""
        bound = 1 / math.sqrt(self.A.shape[1])
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape, device="cpu").uniform_(-bound, bound, generator=generator))
            self.B.zero_()

    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """What is added to the base's output y (..., out) for its input x (..., in); `weight` is the frozen W."""
        return self._project(self.dropout(x)) * self.scale

    def _project(self, x: Tensor) -> Tensor:
        """B A x."""
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def delta(self) -> Tensor:
        """s B A, (out, in), in the masters' dtype."""
        return (self.B @ self.A) * self.scale

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The single matrix that does what W and the update do together, in the masters' dtype."""
        return weight.to(self.B.dtype) + self.delta()


class DoraLowRank(LowRank):
    """DoRA: W + s B A is rescaled row by row to a trained magnitude m (out,): c = m / ||W + s B A||, detached norm."""

    def __init__(self, linear: Linear, r: int, scale: float, dropout: float) -> None:
        super().__init__(linear, r, scale, dropout)
        self.magnitude = nn.Parameter(torch.empty_like(self.B[:, 0]))
        self._linear = (linear,)  # in a tuple, so that the base does not become a submodule of the leaf

    def reset_parameters(self, generator: torch.Generator) -> None:
        """As LoRA; m is the norm of W's rows, so that c starts as one."""
        super().reset_parameters(generator)
        with torch.no_grad():
            self.magnitude.copy_(self._row_norms(self._linear[0].weight))

    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        c = self.magnitude / self._row_norms(weight)  # in fp32: near one, bf16 has steps of 0.8 %
        if self.dropout.drops:
            x = self.dropout(x)  # one mask for both terms
            y = F.linear(x, weight.to(x.dtype))
        return (c - 1).to(x.dtype) * y + c.to(x.dtype) * self._project(x) * self.scale

    @torch.no_grad()
    def _row_norms(self, weight: Tensor) -> Tensor:
        return super().merged_weight(weight).norm(dim=1)

    def merged_weight(self, weight: Tensor) -> Tensor:
        c = self.magnitude / self._row_norms(weight)
        return c[:, None] * super().merged_weight(weight)


class LoRALinear(Linear):
    """A `Linear` that has become adaptable: the same weight under the same name, and a leaf per adapter."""

    lora: nn.ModuleDict
    adapters: Adapters

    def forward(self, x: Tensor) -> Tensor:
        base = y = super().forward(x)
        for name, leaf in self.lora.items():
            rows = self.adapters.rows(name, x)
            if rows is not False:
                y = select(rows, base + leaf(x, base, self.weight), y)
        return y


def _attach(model: Llama, config: LoraConfig, name: str) -> dict[str, AdapterLeaf]:
    saved = saved_targets(model, config.modules_to_save) if config.modules_to_save else []
    paths = linear_targets(model, config.target_modules, config.layers_to_transform, excluded=saved)
    check_pattern("rank_pattern", config.rank_pattern, paths)
    check_pattern("alpha_pattern", config.alpha_pattern, paths)
    adapters = adapters_of(model)
    leaves: dict[str, AdapterLeaf] = {}
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, Linear)
        if isinstance(linear, Replaceable):
            raise InputError(f"target_modules: {path} is trained whole by {listing(linear.copies)}")
        r = pattern_value(config.rank_pattern, path, config.r)
        if r > max(linear.in_features, linear.out_features):
            raise InputError(f"rank {r} for {path}, which is {linear.in_features} x {linear.out_features}")
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        scale = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        leaf = (DoraLowRank if config.use_dora else LowRank)(linear, r, scale, config.lora_dropout)
        if not isinstance(linear, LoRALinear):
            linear.__class__ = LoRALinear
            linear.lora, linear.adapters = nn.ModuleDict(), adapters  # type: ignore[assignment]
        cast(LoRALinear, linear).lora[name] = leaf.train(linear.training)
        leaves[path] = leaf
    attach_copies(model, saved, name, adapters)
    return leaves


def _detach(model: Llama, name: str) -> None:
    for module in list(model.modules()):
        if isinstance(module, LoRALinear) and name in module.lora:
            del module.lora[name]
            if not module.lora:
                del module.lora, module.adapters
                module.__class__ = Linear  # type: ignore[assignment]
    detach_copies(model, name)


_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def _names(model: Llama, name: str) -> dict[str, str]:
    """Key in a PEFT file -> name of the parameter."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear) and name in module.lora:
            for own, _ in module.lora[name].named_parameters():
                found[f"base_model.model.{path}.{_KEYS[own]}"] = f"{path}.lora.{name}.{own}"
        if isinstance(module, Replaceable) and name in module.copies:
            for own, _ in module.copies[name].named_parameters():
                found[f"base_model.model.{path}.{own}"] = f"{path}.copies.{name}.{own}"
    return found


def _to_peft(model: Llama, config: LoraConfig) -> dict[str, Any]:
    written = dataclasses.asdict(config)
    if config.target_modules == "all-linear":  # saved expanded, as PEFT does: the head is no target on any reader
        paths = linear_targets(model, "all-linear", None, saved_targets(model, config.modules_to_save))
        written["target_modules"] = sorted({path.rpartition(".")[2] for path in paths})
    saved = [*config.modules_to_save]
    if model.config.id2label and "score" in saved:
        saved = ["classifier", *saved]  # both names, as PEFT writes them for a classifier
    written["modules_to_save"] = saved or None
    return {**written, "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True}


# PEFT's fields with the values that leave the function as it is here; any other value is refused.
_FIXED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    "layers_pattern": (None, "layers", ["layers"], [], ""),
}
_IGNORED = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config"),
}


def _from_peft(found: dict[str, Any], where: str) -> LoraConfig:
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    for key, value in found.items():
        allowed = _FIXED.get(key)
        if allowed is not None and value not in allowed:
            raise InputError(f"{where}: {key} = {value!r} is not supported; expected {allowed[0]!r}")
        if allowed is None and key not in fields | _IGNORED and value:
            raise InputError(f"{where}: {key} = {value!r} is not supported here")
    # PEFT's defaults where the file is silent; lists become tuples.
    values: dict[str, Any] = {"lora_alpha": 8}
    for key in fields & found.keys():
        if found[key] is not None:
            values[key] = tuple(found[key]) if isinstance(found[key], list) else found[key]
    if found.get("task_type") == "SEQ_CLS":  # PEFT names both of the heads that a classifier may have
        values["modules_to_save"] = tuple(name for name in values.get("modules_to_save", ()) if name != "classifier")
    if isinstance(values.get("layers_to_transform"), int):
        values["layers_to_transform"] = (values["layers_to_transform"],)
    try:
        return LoraConfig(**values)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: {error}") from None


def _inert(tensors: Mapping[str, Tensor]) -> str:
    if not all(".lora_" in key for key in tensors):  # modules trained whole, or DoRA's magnitudes
        return ""
    return "" if any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key) else "every lora_B is zero"


METHODS["LORA"] = Method(LoraConfig, _attach, _detach, *renamed(_names), _to_peft, _from_peft, _inert)
