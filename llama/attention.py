"""softmax(q k^T / sqrt(D)) v with causal queries: one meaning, and the fastest kernel for it that is here.

Several documents may stand in one row, one behind the other (`Documents`): a token then sees the tokens before it in its own
document, and keys that stand in front of all tokens (a prefix), which every document sees.

On a GPU these are torch's own kernels: `scaled_dot_product_attention`, and for documents `varlen_attn` (Dao 2023, arXiv
2307.08691). On a CPU torch's kernel computes the upper triangle too, and no faster in bf16 than in fp32; here it is matrix
products over blocks of queries (Rabe & Staats 2021, 2112.05682), probabilities computed again in backward.

Legend: B batch, T queries, P keys in front, S = P + T keys, H query heads, G key/value heads, R = H / G, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.nn.attention.varlen import varlen_attn


class Documents(NamedTuple):
    """Where documents begin and end in a batch of rows.

    Attributes:
        positions: (B, T), each token's position in its own document, from 0.
        bounds: (N + 1,) int32, where the N documents begin in the flattened (B * T) tokens, ascending, and the end. No
            document reaches over a row's end; padding is a document of its own.
    """

    positions: Tensor
    bounds: Tensor

    @staticmethod
    def of(lengths: Sequence[Sequence[int]], width: int, device: torch.device | str = "cpu") -> Documents:
        """Documents of these lengths, row by row, in rows of `width` tokens.

        Raises:
            ValueError: documents that are empty, or longer than their row.
        """
        bounds, positions = [0], []
        for row in lengths:
            parts = [*row, width - sum(row)] if sum(row) < width else list(row)
            if min(parts) < 1 or sum(parts) != width:
                raise ValueError(f"documents of {list(row)} tokens in a row of {width}")
            for part in parts:
                bounds.append(bounds[-1] + part)
                positions.append(torch.arange(part))
        table = torch.cat(positions).view(len(lengths), width)
        return Documents(table.to(device), torch.tensor(bounds, dtype=torch.int32, device=device))

    def mask(self) -> Tensor:
        """(B, 1, T, T) bool, True where a query may look; for kernels that know nothing of documents."""
        B, T = self.positions.shape
        number = torch.searchsorted(self.bounds, torch.arange(B * T, device=self.bounds.device), right=True).view(B, T)
        same = number[:, None, :, None] == number[:, None, None, :]
        return same & torch.ones(T, T, dtype=torch.bool, device=same.device).tril()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None) -> Tensor:
    """Key head j serves query heads j * R .. (j + 1) * R - 1.

    Args:
        q: (B, H, T, D). k, v: (B, G, S, D).
        mask: bool, broadcastable to (B, H, T, S), True where a query may look. None: causal, and every query sees the P = S - T
            keys in front. Documents: the same within each of them.

    Returns:
        (B, H, T, D)
    """
    # Compiled code may round otherwise than eager code does; uncompiled, the kernel is Hugging Face's, and so is every bit.
    quick = torch.compiler.is_compiling() and q.device.type == "cpu" and q.dtype == torch.bfloat16
    if isinstance(mask, Tensor):
        if quick and q.shape[2] == 1:
            return _one_query(q, k, v, mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    if q.is_cuda and mask is not None and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, mask)
    if mask is not None or quick:
        return _blockwise(q, k, v, None if mask is None else mask.bounds)
    # Idle queries in front make it square, which every fused kernel knows; a mask would be dense, and leave those kernels.
    idle = k.shape[2] - q.shape[2]
    square = F.pad(q, (0, 0, idle, 0)) if idle else q
    return F.scaled_dot_product_attention(square, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])[:, :, idle:]


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Of a row that is being generated: sums that the compiler fuses, where a CPU's fused kernel is made for many queries."""
    q = q.unflatten(1, (k.shape[1], -1))  # (B, G, R, 1, D)
    scores = (q.float() * k[:, :, None].float()).sum(-1) / math.sqrt(q.shape[-1])  # (B, G, R, S)
    p = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (p[..., None] * v[:, :, None].float()).sum(-2, keepdim=True).to(q.dtype).flatten(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Flash attention over the flattened tokens. Keys in front are repeated before each document."""
    B, H, T, D = q.shape
    P, bounds = k.shape[2] - T, documents.bounds
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (q, k[:, :, P:], v[:, :, P:]))  # (B * T, heads, D)
    bounds_k, longest = bounds, T
    if P:
        count = len(bounds) - 1
        bounds_k, longest = bounds + P * torch.arange(count + 1, dtype=torch.int32, device=bounds.device), T + P
        number = torch.searchsorted(bounds, torch.arange(B * T, device=bounds.device), right=True) - 1
        place = torch.arange(B * T, device=bounds.device) + P * (number + 1)
        front = (bounds_k[:-1, None] + torch.arange(P, device=bounds.device)).flatten()
        row = (bounds[:-1] // T).repeat_interleave(P, output_size=count * P)

        def with_front(tokens: Tensor, x: Tensor) -> Tensor:
            empty = tokens.new_zeros(B * T + count * P, *tokens.shape[1:])
            parts = x[:, :, :P].transpose(1, 2)[row, torch.arange(P, device=x.device).repeat(count)]
            return empty.index_copy(0, place, tokens).index_copy(0, front.long(), parts)

        key, value = with_front(key, k), with_front(value, v)
    repeat = H // k.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    y = varlen_attn(query, key, value, bounds, bounds_k, T, longest, window_size=(-1, 0))
    return y.view(B, T, H, D).transpose(1, 2)  # type: ignore[union-attr]


# --- blocks of queries --------------------------------------------------------------------------------------------------


SCORES = 2**20  # at once: few enough to stay in a cache from one product to the next


def _block(tokens: int) -> int:
    """Queries at once: few enough that little is computed above the diagonal."""
    return 128 if tokens <= 512 else 256


def _spans(bounds: Tensor | None, q: Tensor, G: int) -> Iterator[tuple[slice, int, int]]:
    """Key heads (of B * G), first token, end of each document: as many heads at once as SCORES allows."""
    B, H, T, _ = q.shape
    documents = [(0, B, 0, T)]  # rows and tokens
    if bounds is not None:
        documents = [
            (first // T, first // T + 1, first % T, first % T + end - first) for first, end in pairwise(bounds.tolist())
        ]
    for row, after, first, end in documents:
        count = max(1, SCORES // (H // G * _block(T) * (end - first)))
        for head in range(row * G, after * G, count):
            yield slice(head, min(head + count, after * G)), first, end


def _seen(x: Tensor, P: int, first: int, end: int) -> Tensor:
    """Of x (n, S, D): what the document sees, (n, P + end - first, D)."""
    if P and first:
        return torch.cat((x[:, :P], x[:, P + first : P + end]), dim=1)
    return x[:, first : P + end]


def _grouped(x: Tensor, G: int) -> Tensor:
    """x (B, H, T, D): the queries that share a key head, (B * G, R, T, D)."""
    return x.unflatten(1, (G, -1)).flatten(0, 1)


def _future(q: Tensor) -> Tensor:
    """What is added to the scores of a block of queries and their own keys: minus infinity above the diagonal."""
    n = _block(q.shape[2])
    return torch.full((n, n), -math.inf, dtype=q.dtype, device=q.device).triu(1)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a b, batched."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _probabilities(q: Tensor, k: Tensor, future: Tensor) -> Tensor:
    """q (N, R, n, D), the last n of k (N, m, D) being their own -> (N, R * n, m)."""
    N, R, n, D = q.shape
    scores = _product(q.flatten(1, 2), k.transpose(1, 2), 1 / math.sqrt(D))
    scores.view(N, R, n, -1)[..., -n:].add_(future[:n, :n])
    return scores.softmax(-1)


@library.custom_op("llama::blockwise_attention", mutates_args=())
def _blockwise(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None) -> Tensor:
    T, G, P = q.shape[2], k.shape[1], k.shape[2] - q.shape[2]
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    queries, keys, values, results = _grouped(q, G), k.flatten(0, 1), v.flatten(0, 1), _grouped(y, G)
    future = _future(q)
    for heads, first, end in _spans(bounds, q, G):
        key, value = _seen(keys[heads], P, first, end), _seen(values[heads], P, first, end)
        for start in range(first, end, _block(T)):
            stop = min(start + _block(T), end)
            query, seen = queries[heads, :, start:stop], P + stop - first
            part = torch.bmm(_probabilities(query, key[:, :seen], future), value[:, :seen])
            results[heads, :, start:stop] = part.view(query.shape)
    return y


@library.custom_op("llama::blockwise_attention_backward", mutates_args=())
def _blockwise_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    T, G, P = q.shape[2], k.shape[1], k.shape[2] - q.shape[2]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    queries, keys, values, directions = _grouped(q, G), k.flatten(0, 1), v.flatten(0, 1), _grouped(dy, G)
    d_queries, wholes = _grouped(dq, G), (dk.flatten(0, 1), dv.flatten(0, 1))
    scale, wide = 1 / math.sqrt(q.shape[3]), torch.promote_types(q.dtype, torch.float32)  # of sums over blocks and documents
    fronts = tuple(torch.zeros_like(x[:, :P], dtype=wide) for x in wholes)
    future = _future(q)
    for heads, first, end in _spans(bounds, q, G):
        key, value = _seen(keys[heads], P, first, end), _seen(values[heads], P, first, end)
        sums: list[Tensor] = []
        for start in reversed(range(first, end, _block(T))):  # the last block sees all keys
            stop = min(start + _block(T), end)
            query, seen = queries[heads, :, start:stop].contiguous(), P + stop - first
            direction = directions[heads, :, start:stop].flatten(1, 2).contiguous()
            key_seen = key[:, :seen].contiguous()  # once, where each product would copy it
            p = _probabilities(query, key_seen, future)
            dp = torch.bmm(direction, value[:, :seen].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            d_queries[heads, :, start:stop] = _product(ds, key_seen, scale).view(query.shape)
            parts = _product(ds.transpose(1, 2), query.flatten(1, 2), scale), torch.bmm(p.transpose(1, 2), direction)
            if not sums:
                sums = [part.to(wide) for part in parts]
                continue
            for total, part in zip(sums, parts, strict=True):
                total[:, :seen] += part
        for whole, front, total in zip(wholes, fronts, sums, strict=True):
            front[heads] += total[:, :P]
            whole[heads, P + first : P + end] = total[:, P:]
    for whole, front in zip(wholes, fronts, strict=True):
        whole[:, :P] = front
    return dq, dk, dv


@_blockwise.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_blockwise_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: object, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)  # type: ignore[attr-defined]


def _differentiate(ctx: object, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_blockwise_backward(dy, *ctx.saved_tensors), None  # type: ignore[attr-defined]


_blockwise.register_autograd(_differentiate, setup_context=_save)
