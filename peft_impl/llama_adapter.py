"""LLaMA-Adapter: learned prompts in the upper layers, attended to in a softmax of their own behind a gate that starts at 0.

    add_adapter(model, LlamaAdapterConfig(adapter_len=10, adapter_layers=30))

    y = softmax(q k^T / sqrt(D)) v  +  a(g) * softmax(q k_p^T / sqrt(D)) v_p,    k_p = P W_k^T,  v_p = P W_v^T

P (K, C) goes unnormalised through the layer's own frozen projections; its keys are not rotated and every token sees them.

Sources: Zhang et al. 2023 (arXiv 2303.16199), eq. 5 to 8. PEFT's AdaptionPrompt has one gate per layer and a(g) = g; the
official repository (OpenGVLab/LLaMA-Adapter) has one per head, with a = tanh in its training code and a(g) = g in the released
inference code. Both are settings here; PEFT's form is the default, since it is what PEFT can open.

Legend: L layers with prompts, K prompt length, C hidden width, B batch, T queries, H query heads, G key/value heads, D head
size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Llama
from llama.errors import InputError
from peft_impl.adapters import METHODS, AdapterLeaf, Method, option, renamed
from peft_impl.attention import PROMPTS, AdaptedAttention, attach_leaf, detach_leaves


@dataclass(frozen=True)
class LlamaAdapterConfig:
    """The size of the adapter and the form of its gates.

    Raises:
        InputError: a value outside its range, naming the field.
    """

    adapter_len: int = option(10, "prompt length, in virtual tokens per layer")
    adapter_layers: int = option(30, "how many layers, from the top, have prompts")
    gate: Literal["scalar", "head"] = option("scalar", "one gate per layer, as in PEFT, or one per attention head")
    gate_activation: Literal["identity", "tanh"] = option("identity", "applied to the gate; PEFT has none")

    def __post_init__(self) -> None:
        for name in ("adapter_len", "adapter_layers"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)!r}; expected a positive integer")
        for name, known in (("gate", ("scalar", "head")), ("gate_activation", ("identity", "tanh"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} = {getattr(self, name)!r}; expected {' or '.join(known)}")


class Prompt(AdapterLeaf):
    """One layer's prompt (1, K, C) and gate (1,) or (H,): q (B, H, T, D) -> what is added to the attention (B, H, T, D)."""

    def __init__(self, attention: Any, config: LlamaAdapterConfig) -> None:
        super().__init__()
        base = attention.k_proj.weight
        kind: dict[str, Any] = {"dtype": torch.promote_types(base.dtype, torch.float32), "device": base.device}
        heads = attention.q_proj.out_features // attention.head_dim
        self.head_dim, self.gate_activation = attention.head_dim, config.gate_activation
        self.prompt = nn.Parameter(torch.empty(1, config.adapter_len, attention.k_proj.in_features, **kind))
        self.gate = nn.Parameter(torch.empty(1 if config.gate == "scalar" else heads, **kind))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Prompt N(0, 1), gate zero: the start is exactly the base, and only gates have a gradient in the first step."""
        with torch.no_grad():
            self.prompt.copy_(torch.empty(self.prompt.shape, device="cpu").normal_(generator=generator))
            self.gate.zero_()

    def forward(self, q: Tensor, k_weight: Tensor, v_weight: Tensor) -> Tensor:
        """`k_weight`, `v_weight` (G * D, C): the layer's frozen projections."""
        k, v = self._heads(k_weight, q), self._heads(v_weight, q)  # (G, 1, K, D)
        grouped = q.unflatten(1, (len(k), -1))  # (B, G, H / G, T, D)
        # Without a fused kernel: K is small, and what that saves is not worth what it costs on a CPU.
        y = ((grouped @ k.transpose(-2, -1)) / math.sqrt(self.head_dim)).softmax(-1) @ v
        y = y.flatten(1, 2)
        return self.effective_gate().to(y.dtype).view(1, -1, 1, 1) * y

    def effective_gate(self) -> Tensor:
        """a(g)"""
        return self.gate.tanh() if self.gate_activation == "tanh" else self.gate

    def _heads(self, weight: Tensor, q: Tensor) -> Tensor:
        projected = F.linear(self.prompt.to(q.dtype), weight.to(q.dtype))  # (1, K, G * D)
        return projected.view(-1, weight.shape[0] // self.head_dim, 1, self.head_dim).permute(1, 2, 0, 3)


def _attach(model: Llama, config: LlamaAdapterConfig, name: str) -> dict[str, AdapterLeaf]:
    layers = model.config.num_hidden_layers
    if config.adapter_layers > layers:
        raise InputError(f"adapter_layers = {config.adapter_layers}; the model has {layers} layers")
    leaves: dict[str, AdapterLeaf] = {}
    for layer in range(layers - config.adapter_layers, layers):
        leaf = Prompt(model.model.layers[layer].self_attn, config)
        leaves[attach_leaf(model, layer, PROMPTS, name, leaf)] = leaf
    return leaves


def _names(model: Llama, name: str) -> dict[str, str]:
    """Key in a PEFT file -> name of the parameter."""
    found = {}
    for layer, module in enumerate(model.model.layers):
        attention = cast(Any, module).self_attn
        if isinstance(attention, AdaptedAttention) and name in attention.prompts:
            path = f"model.layers.{layer}.self_attn"
            found[f"base_model.model.{path}.adaption_prompt"] = f"{path}.prompts.{name}.prompt"
            found[f"base_model.model.{path}.adaption_gate"] = f"{path}.prompts.{name}.gate"
    return found


# --- files --------------------------------------------------------------------------------------------------------------

PEFT_TYPE = "ADAPTION_PROMPT"
OWN_TYPE = "LLAMA_ADAPTER"  # gates per head, or with tanh: PEFT, which would compute another function, refuses the name


def _to_peft(model: Llama, config: LlamaAdapterConfig) -> dict[str, Any]:
    written = {"adapter_len": config.adapter_len, "adapter_layers": config.adapter_layers, "target_modules": "self_attn"}
    if (config.gate, config.gate_activation) == ("scalar", "identity"):
        return {"peft_type": PEFT_TYPE, **written}
    return {"peft_type": OWN_TYPE, **written, "gate": config.gate, "gate_activation": config.gate_activation}


def _from_peft(found: dict[str, Any], where: str) -> LlamaAdapterConfig:
    if found.get("target_modules") not in (None, "self_attn"):
        raise InputError(f"{where}: target_modules = {found['target_modules']!r} is not supported; expected 'self_attn'")
    known = {"peft_type", "adapter_len", "adapter_layers", "target_modules", "task_type", "inference_mode", "auto_mapping"}
    known |= {"base_model_name_or_path", "revision", "peft_version", "runtime_config"}
    if found["peft_type"] == OWN_TYPE:
        known |= {"gate", "gate_activation"}
    if unknown := [key for key, value in found.items() if key not in known and value]:
        raise InputError(f"{where}: {unknown[0]} = {found[unknown[0]]!r} is not supported here")
    fields = ("adapter_len", "adapter_layers", "gate", "gate_activation")
    if missing := [key for key in fields[:2] if found.get(key) is None]:
        raise InputError(f"{where}: no {missing[0]}")
    try:
        return LlamaAdapterConfig(**{key: found[key] for key in fields if key in found})
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _inert(tensors: Mapping[str, Tensor]) -> str:
    gates = [tensor for key, tensor in tensors.items() if key.endswith("adaption_gate")]
    return "" if any(gate.any() for gate in gates) else "every gate is zero"


METHODS[PEFT_TYPE] = METHODS[OWN_TYPE] = Method(
    LlamaAdapterConfig, _attach, detach_leaves, *renamed(_names), _to_peft, _from_peft, _inert
)
