"""Attention with a seam for adapters that add keys and values: prefixes inside its softmax, prompts in one beside it.

`Attention.attend` sees queries, keys and values that are rotated and cached already, so what is added here never enters the
cache and moves no position.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from llama import Llama
from llama.attention import Documents
from llama.errors import InputError
from llama.model import Attention, Mask
from peft_impl.adapters import AdapterLeaf, Adapters, adapters_of, select

PREFIXES, PROMPTS = "prefixes", "prompts"  # the two places for a leaf


class AdaptedAttention(Attention):
    """An `Attention` that has become adaptable: the same projections under the same names, and a leaf per adapter."""

    prefixes: nn.ModuleDict
    prompts: nn.ModuleDict
    adapters: Adapters

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """As `Attention.attend`, in each row with the keys and values of the adapter chosen for it."""
        y = self._attend_behind_prefixes(q, k, v, mask)
        for name, prompt in self.prompts.items():
            rows = self.adapters.rows(name, q)
            if rows is not False:
                # The frozen projections themselves: what another adapter adds to their outputs is not part of the method.
                y = select(rows, y + prompt(q, self.k_proj.weight, self.v_proj.weight), y)
        return y

    def _attend_behind_prefixes(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        for name, prefix in self.prefixes.items():
            rows = self.adapters.rows(name, q)
            if rows is False:
                continue
            tokens = k.shape[2]
            k, v = prefix(k, v)
            if rows is not True or isinstance(mask, Tensor):  # else no mask is needed: every query sees what is in front
                mask = _mask_with_prefix(mask, rows, q, tokens, k.shape[2] - tokens)
        return super().attend(q, k, v, mask)


def _mask_with_prefix(mask: Mask, rows: bool | Tensor, q: Tensor, tokens: int, added: int) -> Tensor:
    """The mask for `added` keys in front of `tokens` others: every query of the chosen rows sees all of them.

    Args:
        mask: as in `Attention.attend`, for the keys without those in front.
        rows: True, or a mask (B, 1, 1, 1).
        q: (B, H, T, D).

    Returns:
        bool, broadcastable to (B, H, T, added + tokens).
    """
    B, _, T, _ = q.shape
    if isinstance(mask, Documents):
        mask = mask.mask()
    if mask is None:
        mask = torch.ones(T, tokens, dtype=torch.bool, device=q.device).tril()
    shape = torch.broadcast_shapes(mask.shape[:-1], (B, 1, T))
    front = torch.ones((), dtype=torch.bool, device=q.device) if rows is True else cast(Tensor, rows)
    return torch.cat((front.expand(*shape, added), mask.expand(*shape, tokens)), dim=-1)


def attach_leaf(model: Llama, layer: int, place: str, name: str, leaf: AdapterLeaf) -> str:
    """Put `leaf` into the attention of a layer, as adapter `name`; return the attention's path."""
    attention: Any = model.model.layers[layer].self_attn
    if not isinstance(attention, AdaptedAttention):
        if type(attention) is not Attention:
            raise InputError(f"the attention of layer {layer} is a {type(attention).__name__}, trained whole by an adapter")
        attention.__class__ = AdaptedAttention
        attention.prefixes, attention.prompts = nn.ModuleDict(), nn.ModuleDict()
        attention.adapters = adapters_of(model)  # type: ignore[assignment]
    getattr(attention, place)[name] = leaf.train(attention.training)
    return f"model.layers.{layer}.self_attn"


def detach_leaves(model: Llama, name: str) -> None:
    """Take adapter `name` out of every attention; one without leaves gets its own class back."""
    for layer in model.model.layers:
        attention = cast(Any, layer).self_attn
        if isinstance(attention, AdaptedAttention):
            for place in (attention.prefixes, attention.prompts):
                if name in place:
                    del place[name]
            if not (attention.prefixes or attention.prompts):
                del attention.prefixes, attention.prompts, attention.adapters
                attention.__class__ = Attention  # type: ignore[assignment]
