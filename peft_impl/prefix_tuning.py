"""Prefix-tuning: trained keys and values in front of every layer's own, as if P virtual tokens stood before the text.

    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=30))
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=512))

Sources: Li & Liang 2021 (arXiv 2101.00190), with their reparameterisation: the prefix of all layers is the output of an MLP
while it is trained, and only that output is kept. Shapes, files and positions are PEFT's: the prefix's keys are stored as
they stand, at no position, and the tokens count from P. Rotary positions being relative, the leaf turns its keys by -P
instead, and the tokens count from 0 as ever.

The start. PEFT draws the prefix from N(0, 1): foreign keys take attention away from the text at once. `init_std=0.02` starts
close to the base: each of the P keys then has a logit near 0 and a value near 0. It is not exactly the base (a key of
zeros still has its share of the softmax, so PEFT's init_weights="zero" is no identity either); no finite key would be.

Legend: P virtual tokens, N layers, G key/value heads, D head size, E = G * D, M hidden width of the MLP, B batch, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama
from llama.cache import KVCache
from llama.errors import InputError
from llama.model import LlamaModel, Mask, rotary_tables, rotate
from peft_impl.adapters import METHODS, AdapterLeaf, Adapters, Method, adapters_of, option
from peft_impl.attention import PREFIXES, attach_leaf, detach_leaves


@dataclass(frozen=True)
class PrefixTuningConfig:
    """The length of the prefix and how it is trained, in PEFT's field names.

    Raises:
        InputError: a value outside its range, naming the field.
    """

    num_virtual_tokens: int = option(30, "length of the prefix, in virtual tokens")
    prefix_projection: bool = option(False, "train an MLP whose output is the prefix, instead of the prefix itself")
    encoder_hidden_size: int | None = option(None, "hidden width of that MLP (none: key/value heads x head size)")
    init_std: float = option(1.0, "scale of the random start: 1 as in PEFT, 0.02 close to the base")

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "encoder_hidden_size"):
            value = getattr(self, name)
            if not (value is None and name == "encoder_hidden_size") and (type(value) is not int or value < 1):
                raise InputError(f"{name} = {value!r}; expected a positive integer")
        if type(self.prefix_projection) is not bool:
            raise InputError(f"prefix_projection = {self.prefix_projection!r}; expected true or false")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise InputError("encoder_hidden_size is the width of the MLP; it goes with prefix_projection = true")
        if not (isinstance(self.init_std, int | float) and math.isfinite(self.init_std) and self.init_std > 0):
            raise InputError(f"init_std = {self.init_std!r}; expected a positive number")


class LayerPrefix(AdapterLeaf):
    """One layer's prefix, however it is parametrised: k, v (B, G, S, D) -> (B, G, P + S, D) each."""

    def __init__(self, attention: Any, config: PrefixTuningConfig, rope_theta: float) -> None:
        super().__init__()
        self.length, self.std, self.rope_theta = config.num_virtual_tokens, config.init_std, rope_theta
        self.head_dim, self.heads = attention.head_dim, attention.k_proj.out_features // attention.head_dim

    def key_values(self) -> Tensor:
        """(P, 2, G, D): key, at no position, and value of each virtual token."""
        raise NotImplementedError

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix in front, its keys turned by -P."""
        keys, values = self.key_values().permute(1, 2, 0, 3)  # (G, P, D) each
        position = torch.tensor([-self.length], device=keys.device)
        keys = rotate(keys, *rotary_tables(position, self.head_dim, self.rope_theta, keys.dtype))
        B = len(k)
        k = torch.cat((keys.to(k.dtype).expand(B, -1, -1, -1), k), dim=2)
        return k, torch.cat((values.to(v.dtype).expand(B, -1, -1, -1), v), dim=2)


class DirectPrefix(LayerPrefix):
    """Trained as it is: prefix (P, 2, G, D)."""

    def __init__(self, attention: Any, config: PrefixTuningConfig, rope_theta: float) -> None:
        super().__init__(attention, config, rope_theta)
        self.prefix = nn.Parameter(torch.empty(self.length, 2, self.heads, self.head_dim, **_kind(attention)))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """N(0, init_std^2)."""
        _fill(self.prefix, generator, self.std)

    def key_values(self) -> Tensor:
        return self.prefix


class PrefixEncoder(AdapterLeaf):
    """The part of the MLP that all layers share: () -> tanh(W e + b) (P, M), for the embeddings e (P, E)."""

    def __init__(self, attention: Any, config: PrefixTuningConfig) -> None:
        super().__init__()
        width, kind = attention.k_proj.out_features, _kind(attention)
        hidden = config.encoder_hidden_size or width
        self.embedding = nn.Parameter(torch.empty(config.num_virtual_tokens, width, **kind))
        self.weight = nn.Parameter(torch.empty(hidden, width, **kind))
        self.bias = nn.Parameter(torch.empty(hidden, **kind))
        self.output: Tensor | None = None  # of the current forward pass, for the layers

    def reset_parameters(self, generator: torch.Generator) -> None:
        """As PEFT: embeddings N(0, 1), the layer as any `nn.Linear`."""
        _fill(self.embedding, generator, 1.0)
        _fill_linear(self.weight, self.bias, generator)

    def forward(self) -> Tensor:
        self.output = F.linear(self.embedding, self.weight, self.bias).tanh()
        return self.output


class ProjectedPrefix(LayerPrefix):
    """The MLP's output; this layer's part of its last layer: weight (2 * E, M), bias (2 * E,)."""

    def __init__(self, attention: Any, config: PrefixTuningConfig, rope_theta: float, encoder: PrefixEncoder) -> None:
        super().__init__(attention, config, rope_theta)
        rows, kind = 2 * self.heads * self.head_dim, _kind(attention)
        self.weight = nn.Parameter(torch.empty(rows, encoder.weight.shape[0], **kind))
        self.bias = nn.Parameter(torch.empty(rows, **kind))
        self._encoder = (encoder,)  # in a tuple, so that it does not become a submodule of every layer

    def reset_parameters(self, generator: torch.Generator) -> None:
        """As any `nn.Linear`, times init_std."""
        _fill_linear(self.weight, self.bias, generator, self.std)

    def key_values(self) -> Tensor:
        hidden = cast(Tensor, self._encoder[0].output)
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias).view(-1, 2, self.heads, self.head_dim)


class PrefixedModel(LlamaModel):
    """A `LlamaModel` that evaluates the shared parts of its projected prefixes before its layers."""

    encoders: nn.ModuleDict
    adapters: Adapters

    def forward(self, input_ids: Tensor, positions: Tensor | None, mask: Mask, cache: KVCache | None) -> Tensor:
        for name, encoder in self.encoders.items():
            if self.adapters.rows(name, input_ids) is not False:
                encoder()
        return super().forward(input_ids, positions, mask, cache)


def _kind(attention: Any) -> dict[str, Any]:
    base = attention.k_proj.weight
    return {"dtype": torch.promote_types(base.dtype, torch.float32), "device": base.device}


@torch.no_grad()
def _fill(parameter: Tensor, generator: torch.Generator, std: float) -> None:
    parameter.copy_(std * torch.empty(parameter.shape, device="cpu").normal_(generator=generator))


@torch.no_grad()
def _fill_linear(weight: Tensor, bias: Tensor, generator: torch.Generator, scale: float = 1.0) -> None:
    bound = scale / math.sqrt(weight.shape[1])
    for parameter in (weight, bias):
        parameter.copy_(torch.empty(parameter.shape, device="cpu").uniform_(-bound, bound, generator=generator))


def _attach(model: Llama, config: PrefixTuningConfig, name: str) -> dict[str, AdapterLeaf]:
    backbone: Any = model.model
    attentions = [cast(Any, layer).self_attn for layer in backbone.layers]
    leaves: dict[str, AdapterLeaf] = {}
    encoder = PrefixEncoder(attentions[0], config) if config.prefix_projection else None
    if encoder is not None:
        if not isinstance(backbone, PrefixedModel):
            backbone.__class__ = PrefixedModel
            backbone.encoders, backbone.adapters = nn.ModuleDict(), adapters_of(model)
        backbone.encoders[name] = leaves["model"] = encoder
    for layer, attention in enumerate(attentions):
        theta = model.config.rope_theta
        leaf: LayerPrefix
        if encoder is None:
            leaf = DirectPrefix(attention, config, theta)
        else:
            leaf = ProjectedPrefix(attention, config, theta, encoder)
        leaves[attach_leaf(model, layer, PREFIXES, name, leaf)] = leaf
    return leaves


def _detach(model: Llama, name: str) -> None:
    backbone: Any = model.model
    if isinstance(backbone, PrefixedModel) and name in backbone.encoders:
        del backbone.encoders[name]
        if not backbone.encoders:
            del backbone.encoders, backbone.adapters
            backbone.__class__ = LlamaModel  # type: ignore[assignment]
    detach_leaves(model, name)


# --- files: one tensor (P, N * 2 * G * D) for all layers; an MLP is folded into it ------------------------------------------

_KEY = "prompt_embeddings"


def _paths(model: Llama, name: str) -> list[str]:
    return [f"model.layers.{layer}.self_attn.{PREFIXES}.{name}" for layer in range(model.config.num_hidden_layers)]


def _pack(model: Llama, name: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    encoder, paths = f"model.encoders.{name}", _paths(model, name)
    if f"{encoder}.weight" not in parameters:
        return {_KEY: torch.cat([parameters[f"{path}.prefix"].flatten(1) for path in paths], dim=1)}
    embedding, weight, bias = (parameters[f"{encoder}.{part}"] for part in ("embedding", "weight", "bias"))
    hidden = F.linear(embedding, weight, bias).tanh()
    return {_KEY: torch.cat([F.linear(hidden, parameters[f"{p}.weight"], parameters[f"{p}.bias"]) for p in paths], dim=1)}


def _unpack(model: Llama, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    config, paths = model.config, _paths(model, name)
    parts = tensors[_KEY].chunk(len(paths), dim=1)
    shape = (-1, 2, config.num_key_value_heads, config.head_dim)
    return {f"{path}.prefix": part.reshape(shape) for path, part in zip(paths, parts, strict=True)}


def _sizes(model: Llama) -> dict[str, int]:
    """What PEFT writes of the base: its `token_dim` and heads are those of keys and values."""
    config = model.config
    heads = config.num_key_value_heads
    return {"num_layers": config.num_hidden_layers, "num_attention_heads": heads, "token_dim": heads * config.head_dim}


def _to_peft(model: Llama, config: PrefixTuningConfig) -> dict[str, Any]:
    written = {"num_virtual_tokens": config.num_virtual_tokens, "num_transformer_submodules": 1, **_sizes(model)}
    # The file holds the prefix itself, whatever it was trained as.
    return {"peft_type": "PREFIX_TUNING", **written, "prefix_projection": False, "encoder_hidden_size": None}


def _from_peft(found: dict[str, Any], where: str) -> PrefixTuningConfig:
    known = {"peft_type", "task_type", "inference_mode", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"}
    known |= {"num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"}
    known |= {"prefix_projection", "encoder_hidden_size", "init_weights", "runtime_config"}
    if unknown := [key for key, value in found.items() if key not in known and value]:
        raise InputError(f"{where}: {unknown[0]} = {found[unknown[0]]!r} is not supported here")
    if found.get("num_transformer_submodules") not in (1, None):
        raise InputError(f"{where}: num_transformer_submodules = {found['num_transformer_submodules']!r}; expected 1")
    if "num_virtual_tokens" not in found:
        raise InputError(f"{where}: no num_virtual_tokens")
    try:
        return PrefixTuningConfig(num_virtual_tokens=found["num_virtual_tokens"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _fits(model: Llama, found: dict[str, Any], where: str) -> None:
    for key, size in _sizes(model).items():
        if found.get(key) not in (size, None):
            raise InputError(f"{where}: {key} = {found[key]!r}, but this base has {size}: the prefix belongs to another one")


METHODS["PREFIX_TUNING"] = Method(PrefixTuningConfig, _attach, _detach, _pack, _unpack, _to_peft, _from_peft, fits=_fits)
