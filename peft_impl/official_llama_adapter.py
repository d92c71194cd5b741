"""LLaMA-Adapter files of the official repository (OpenGVLab/LLaMA-Adapter, v1), in; and the form that PEFT can open, out.

    load_official(model, "llama_adapter_len10_layer30_release.pth", gate_activation="identity")
    to_peft_form(model)                    # refused where it would compute something else
    save_adapter(model, "adapter")

Such a file is a dictionary, in training checkpoints wrapped as {"model": ...}: `adapter_query.weight` (L * K, C), whose rows
i*K .. (i+1)*K - 1 are the prompt of layer N - L + i, and `layers.{0..N-1}.attention.gate` (1, H, 1, 1) in every layer, of which
only the upper L are used. Prompts live in hidden space, so Meta's rotary layout does not matter. What the file does not say
is whether tanh belongs to its gates: the training code has it, the released inference code does not (their issue 39).

Legend: N layers of the model, L adapted layers, K prompt length, C hidden width, H query heads.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from llama import Llama
from llama.errors import InputError, listing
from llama.weight_files import unpickled
from peft_impl.adapters import adapters_of, add_adapter
from peft_impl.llama_adapter import LlamaAdapterConfig, Prompt

_BASE = re.compile(r"(tok_embeddings|norm|output)\.weight|rope\.freqs|layers\.\d+\.(attention|feed_forward|.*norm)\..*")
_QUERY, _GATE = "adapter_query.weight", re.compile(r"layers\.(\d+)\.attention\.gate")


def load_official(
    model: Llama,
    path: str | os.PathLike[str],
    gate_activation: Literal["identity", "tanh"],
    name: str = "default",
    adapter_len: int = 10,
    trainable: bool = False,
) -> None:
    """Add the adapter in an official `.pth` file to the model, active; frozen unless `trainable`.

    Args:
        gate_activation: which the file does not say; see the top of this page.
        adapter_len: K, which the file does not say either.

    Raises:
        InputError: a damaged file, missing gates, sizes of another base, values that are not finite, or tensors that are
            neither the adapter's nor a Llama's.
    """
    LlamaAdapterConfig(adapter_len)  # refuses what is no length
    tensors = _adapter_tensors(Path(path))
    query, config = tensors.pop(_QUERY), model.config
    if query.dim() != 2 or query.shape[1] != config.hidden_size or query.shape[0] % adapter_len:
        raise InputError(
            f"{path}: {_QUERY} has shape {tuple(query.shape)}; expected a multiple of adapter_len = {adapter_len} rows,"
            f" of hidden_size {config.hidden_size}"
        )
    wanted = [f"layers.{layer}.attention.gate" for layer in range(config.num_hidden_layers)]
    if set(tensors) != set(wanted):
        raise InputError(f"{path}: gates are not one per layer of this base: {listing(sorted(set(tensors) ^ set(wanted)))}")
    for key, gate in tensors.items():
        if gate.shape != (1, config.num_attention_heads, 1, 1):
            raise InputError(f"{path}: {key} has shape {tuple(gate.shape)}; expected (1, {config.num_attention_heads}, 1, 1)")
    if broken := [key for key, tensor in {_QUERY: query, **tensors}.items() if not torch.isfinite(tensor).all()]:
        raise InputError(f"{path}: {listing(broken)} holds NaN or infinity")
    layers = len(query) // adapter_len
    add_adapter(model, LlamaAdapterConfig(adapter_len, layers, "head", gate_activation), name)
    first = config.num_hidden_layers - layers
    with torch.no_grad():
        for index, prompt in enumerate(query.split(adapter_len)):
            leaf = _leaf(model, first + index, name)
            leaf.prompt.copy_(prompt[None])
            leaf.gate.copy_(tensors[wanted[first + index]].flatten())
            leaf.requires_grad_(trainable)


def _adapter_tensors(path: Path) -> dict[str, Tensor]:
    """`adapter_query.weight` and the gates of a file that may hold the whole model beside them."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # the training code stores its arguments
        found = unpickled(path)
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path} holds something other than a dictionary of tensors")
    chosen = {key: value for key, value in found.items() if key == _QUERY or _GATE.fullmatch(key)}
    base = re.compile(
        r"tok_embeddings\.weight|norm\.weight|output\.weight|rope\.freqs|layers\.\d+\.(attention|feed_forward|.*norm)\..*"
    )
    if unknown := [key for key in found if key not in chosen and not base.fullmatch(key)]:
        raise InputError(f"{path}: {len(unknown)} tensors are no part of LLaMA-Adapter v1: {listing(unknown)}")
    if _QUERY not in chosen or not all(isinstance(value, Tensor) for value in chosen.values()):
        raise InputError(f"{path}: no tensor {_QUERY}; expected a file of the official LLaMA-Adapter repository")
    return chosen


@torch.no_grad()
def to_peft_form(model: Llama, name: str = "default") -> None:
    """Give adapter `name` PEFT's gates, one per layer without activation, where that is the same function.

    Raises:
        InputError: heads of one layer whose effective gates differ, naming the layer.
    """
    state = adapters_of(model)
    state.check_name(name)
    config = state.configs[name]
    if not isinstance(config, LlamaAdapterConfig):
        raise InputError(f"adapter {name!r} is no LLaMA-Adapter")
    layers = range(model.config.num_hidden_layers - config.adapter_layers, model.config.num_hidden_layers)
    leaves = {layer: _leaf(model, layer, name) for layer in layers}
    effective = {layer: leaf.effective_gate() for layer, leaf in leaves.items()}
    for layer, gate in effective.items():
        if not torch.equal(gate, gate[:1].expand_as(gate)):
            raise InputError(
                f"layer {layer}: gates of its heads run from {gate.min():.4g} to {gate.max():.4g};"
                " PEFT has one gate per layer, which would be another function"
            )
    for layer, leaf in leaves.items():
        leaf.gate = nn.Parameter(effective[layer][:1].clone(), requires_grad=leaf.gate.requires_grad)
        leaf.gate_activation = "identity"
    state.configs[name] = dataclasses.replace(config, gate="scalar", gate_activation="identity")


def _leaf(model: Llama, layer: int, name: str) -> Prompt:
    attention: Any = model.model.layers[layer].self_attn
    return cast(Prompt, attention.prompts[name])
