"""Llama 2, from the tokens' embeddings to logits or loss, readable from top to bottom.

    from llama import PRESETS, Llama
    logits = Llama(PRESETS["demo"])(torch.tensor([[1, 2, 3]]))          # (1, 3, vocab_size)

Sources: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288); RMSNorm, Zhang & Sennrich 2019 (1910.07467); rotary positions,
Su et al. 2021 (2104.09864); SwiGLU, Shazeer 2020 (2002.05202); grouped-query attention, Ainslie et al. 2023 (2305.13245).
Parameter names and the half-rotation layout of rotary positions are Hugging Face's, so HF files need no key table.

Every module computes in the dtype of its input and casts its weight to it: fp32 master weights serve bf16 activations.
There are no buffers: rotary tables are computed from the configuration in each forward pass, so neither `.to(bf16)` nor
meta-device construction can damage them.

Legend: B batch, T tokens of this call, S keys (cached tokens + T), H query heads, G key/value heads, D head size,
C hidden width, V vocabulary.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.attention import Documents, attention
from llama.cache import KVCache, LayerCache
from llama.config import LlamaConfig
from llama.heads import ClassificationHead, LanguageModelHead
from llama.linear import INIT_STD, Linear

Mask = Tensor | Documents | None  # which tokens a query may look at; None: causal


class RMSNorm(nn.Module):
    """x / rms(x) * weight: normalised in fp32 (fp64 stays fp64), cast back, then multiplied, in HF's order."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


@lru_cache(maxsize=16)
def _inverse_frequencies(head_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """theta^(-2i/D) for i < D/2. Computed on the CPU, so that every device turns by the same angles."""
    exponents = torch.arange(0, head_dim, 2, device="cpu").to(dtype) / head_dim
    return (1.0 / theta**exponents).to(device)


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * frequency, computed in fp32 (fp64 for fp64), then cast to `dtype` as HF does.

    Args:
        positions: (T,) or (B, T).

    Returns:
        Two tensors (T, D/2) or (B, 1, T, D/2), which broadcast over (B, H, T, D/2).
    """
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None].to(wide) * _inverse_frequencies(head_dim, theta, wide, positions.device)
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of x (B, H, T, D) by the angles of `cos`, `sin`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention: project -> rotate -> cache -> attend -> output projection.

    Adapters replace the projections (each is *called* as a module) or override `attend`, which owns no parameters.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: LayerCache | None) -> Tensor:
        """x (B, T, C) -> (B, T, C). `mask` as in `attend`."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, G, S, D)
        y = self.attend(q, k, v, mask)
        return cast(Tensor, self.o_proj(y.transpose(1, 2).reshape(B, T, -1)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, as `llama.attention.attention`: q (B, H, T, D), k, v (B, G, S, D) -> (B, H, T, D)."""
        return attention(q, k, v, mask)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Pre-norm residual block: h = x + attention(norm(x)); h + mlp(norm(h))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: LayerCache | None) -> Tensor:
        h = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return cast(Tensor, h + self.mlp(self.post_attention_layernorm(h)))


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm: token ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # None: that of the embedding's weight
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=INIT_STD)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor | None, mask: Mask, cache: KVCache | None) -> Tensor:
        B, T = input_ids.shape
        start = cache.extent if cache is not None else 0
        if positions is None:
            positions = torch.arange(start, start + T, device=input_ids.device)
        if cache is not None:
            cache.advance(positions.expand(B, T))
            if mask is None and (start > 0 or cache.shown > T):  # a first call that fills what is shown is causal with S == T
                slots = torch.arange(cache.shown, device=input_ids.device)
                mask = (slots <= positions.expand(B, T)[..., None])[:, None]  # (B, 1, T, S)
        x = self.embed_tokens(input_ids)
        x = x.to(self.compute_dtype or self.embed_tokens.weight.dtype)  # an adapter's copy of the embedding is in fp32
        rotary = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, mask, cache.layers[index] if cache is not None else None)
        return cast(Tensor, self.norm(x))


class Llama(nn.Module):
    """Llama 2 with a head, called as `head(hidden, labels)`: `lm_head`, or a classifier's `score` (llama/heads.py)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        if config.id2label:
            self.score = ClassificationHead(config)
        else:
            self.lm_head = LanguageModelHead(config)
        self.tie_weights()

    @property
    def head(self) -> LanguageModelHead | ClassificationHead:
        return self.score if self.config.id2label else self.lm_head

    def tie_weights(self) -> None:
        """Let the language model's head share the embedding's weight, if the configuration says so."""
        if self.config.ties_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        documents: Documents | None = None,
        cache: KVCache | None = None,
        last: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> Tensor:
        """Logits, or the loss when `labels` are given.

        Args:
            input_ids: (B, T). Right padding with any valid id needs no mask: no earlier token sees it.
            labels: (B, T), aligned with `input_ids` (the shift happens inside); -100 where there is no target. A
                classifier's: see `classification_loss`.
            positions: (T,) or (B, T); default 0..T-1, after what the cache holds.
            mask: bool, broadcastable to (B, H, T, S), True where a query may look; default causal.
            documents: several in each row, none of which sees another, each with positions from 0; in place of both.
            cache: filled and read by this call.
            last: (B,) index of the one token per row whose logits are wanted. A classifier looks at it, or at the last
                column without it.
            learned: `learned_positions(labels)`, where the caller knows them already.

        Returns:
            Logits (B, T, V), or (B, 1, V) with `last`, or a classifier's (B, K); with labels, the *sum* of the losses over
            targets, in fp32.
        """
        if documents is not None:
            hidden = self.model(input_ids, documents.positions, documents, None)
        else:
            hidden = self.model(input_ids, positions, mask, cache)
        if last is not None:
            hidden = hidden[torch.arange(len(last), device=last.device), last][:, None]
        known = () if learned is None or labels is None else (learned,)
        return cast(Tensor, self.head(hidden, labels, *known))
