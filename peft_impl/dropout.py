"""Dropout whose mask compiled code may evaluate again in backward, and find to be the same.

A compiler (and checkpointing inside compiled code) computes again in backward what it would not store. A random draw
that is made again is another draw, and then the gradient is not that of the loss. So compiled code draws nothing:
its masks are a pure function of two random words and of the element's place, and the words are drawn outside of it.

    with drawn_masks(layer, device):
        y = compiled_layer(x)

Uncompiled code keeps torch's own dropout, which is right there: checkpointing restores the generator's state.

The function is a hash of 32 bits, `h(h(row) ^ word) ^ h(h(column) ^ other word)` hashed once more: a counter-based
generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the finalizer of
https://github.com/skeeto/hash-prospector. Its factors are below 2^31, so that no product leaves int64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANGE = 2**32  # of a hash


class Dropout(nn.Module):
    """Zero each element with probability p while training, and scale the others by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.words: Tensor | None = None  # (2,), int64 in [0, 2^32): what the mask is a function of

    @property
    def drops(self) -> bool:
        """Whether a forward pass now has a mask."""
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., width)."""
        if not self.drops:
            return x
        if self.words is None or not torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        kept = _hashes(self.words, x) >= round(self.p * RANGE)
        return torch.where(kept, x * (1 / (1 - self.p)), torch.zeros((), dtype=x.dtype, device=x.device))

    def extra_repr(self) -> str:
        return f"p={self.p}"


@contextmanager
def drawn_masks(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, each `Dropout` of `module` has the one mask that the words drawn here give it, as often as it is asked."""
    dropouts = [part for part in module.modules() if isinstance(part, Dropout) and part.drops]
    if not dropouts:
        yield
        return
    words = torch.randint(RANGE, (len(dropouts), 2), device=device)
    for dropout, own in zip(dropouts, words.unbind(), strict=True):
        dropout.words = own
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.words = None


def _hashes(words: Tensor, x: Tensor) -> Tensor:
    """An integer in [0, 2^32) for each element of x (..., width)."""
    *batch, width = x.shape
    rows = torch.arange(x.numel() // width, device=x.device).view(*batch, 1)
    columns = torch.arange(width, device=x.device)
    return _mixed(_mixed(_mixed(rows) ^ words[0]) ^ _mixed(_mixed(columns) ^ words[1]))


def _mixed(h: Tensor) -> Tensor:
    """A permutation of the integers in [0, 2^32) without visible structure."""
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & (RANGE - 1)
    h = ((h ^ (h >> 15)) * 0x735A2D97) & (RANGE - 1)
    return h ^ (h >> 15)
