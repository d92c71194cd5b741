"""The key/value cache of generation. A token's slot in the cache is its position, so rows of different lengths need no
padding mask: a query at position p sees the slots 0..p of its own row, and what a right-padded prompt left in later slots
is overwritten before any query can reach it.

Legend: B batch, T tokens of this call, S slots, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer, (B, G, S, D) each, allocated at the first update."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k, v (B, G, T, D) at `cache.positions`; return all keys and values of slots 0..shown-1."""
        if self.k is None or self.v is None:
            shape = (*k.shape[:2], self.cache.capacity, k.shape[3])
            # Zeros, not empty: a masked slot still enters the product 0 * value, and 0 * NaN is NaN.
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[rows, :, self.cache.positions] = k.transpose(1, 2)  # (B, T, G, D) into slots (B, T)
        self.v[rows, :, self.cache.positions] = v.transpose(1, 2)
        return self.k[:, :, : self.cache.shown], self.v[:, :, : self.cache.shown]


class KVCache:
    """One `LayerCache` per layer, and the positions that the current call writes.

    Args:
        num_layers: layers of the model.
        capacity: slots per row, at least the longest prompt plus all tokens to be generated.
        grain: slots are shown in multiples of it, those that are not filled yet with a mask: compiled code sees few shapes.
    """

    def __init__(self, num_layers: int, capacity: int, grain: int = 1) -> None:
        self.grain, self.capacity = grain, -(-capacity // grain) * grain
        self.extent = 0  # slots that any row may have filled: the longest row's length
        # Slots that attention looks at. Rounded in `advance`, not where it is read: inside a compiled layer, the compiler would
        # follow the rounding as a formula of the length, and its algebra over formulas of formulas may not end.
        self.shown = 0
        self.positions: Tensor = torch.empty(0)
        self.layers = [LayerCache(self) for _ in range(num_layers)]

    def advance(self, positions: Tensor) -> None:
        """Make room for one call's tokens, whose positions are (B, T). The longest row grows by exactly T."""
        self.positions = positions
        self.extent += positions.shape[1]
        self.shown = -(-self.extent // self.grain) * self.grain
        if self.extent > self.capacity:
            raise ValueError(f"the cache has {self.capacity} slots; this call needs {self.extent}")
