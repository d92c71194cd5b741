"""Attention by blocks and within documents is attention: against the definition with a dense mask, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from llama.attention import Documents, _blockwise, attention

EXACT = 1e-12  # float64
BF16_OF_FUSED = (
    2.5  # scores pass through bf16 here; torch's kernel keeps them in fp32. Measured: 1.8 in outputs, 0.9 to 1.7 in gradients
)
LENGTHS = {7: [[3, 4], [6]], 300: [[100, 150, 20], [299]], 600: [[80, 400, 90], [599]]}  # what is left of a row is padding


def inputs(heads: int, groups: int, T: int, P: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T + P)
    shapes = ((2, heads, T, 16), (2, groups, P + T, 16), (2, groups, P + T, 16))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def definition(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """A token sees the keys in front, and the tokens before it that are in its document: written out, pair by pair."""
    B, _, T, _ = q.shape
    P = k.shape[2] - T
    sees = torch.zeros(B, 1, T, P + T, dtype=torch.bool)
    for row in range(B):
        starts = [0] * T
        if documents is not None:
            starts = [t - int(documents.positions[row, t]) for t in range(T)]
        for t in range(T):
            sees[row, 0, t, :P] = True
            sees[row, 0, t, P + starts[t] : P + t + 1] = True
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=sees, enable_gqa=True)


def off(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm()).item() for a, b in pairs]


def with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, direction)]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("P", [0, 5])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("several", [True, False], ids=["documents", "whole rows"])
def test_blocks_are_the_definition(groups: int, P: int, T: int, several: bool) -> None:
    leaves = inputs(4, groups, T, P, torch.float64)
    documents = Documents.of(LENGTHS[T], T) if several else None
    found = with_gradients(_blockwise(*leaves, documents.bounds if documents else None), leaves)
    expected = with_gradients(definition(*leaves, documents), leaves)
    assert max(off(found, expected)) < EXACT
    assert max(off([attention(*leaves, documents)], expected[:1])) < EXACT


@pytest.mark.parametrize("T", [40, 300, 600])
def test_in_bf16_it_is_as_near_as_the_fused_kernel(T: int) -> None:
    leaves = inputs(4, 2, T, 0, torch.bfloat16)
    expected = with_gradients(definition(*leaves, None), leaves)
    fused = with_gradients(F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True), leaves)
    found = with_gradients(_blockwise(*leaves, None), leaves)
    for mine, theirs in zip(off(found, expected), off(fused, expected), strict=True):
        assert mine < BF16_OF_FUSED * theirs


def test_the_operator_keeps_torchs_rules() -> None:
    """Fake tensors, autograd and strides, checked by torch itself: what compiling relies on."""
    leaves = inputs(4, 2, 7, 2, torch.float64)
    for bounds in (None, Documents.of(LENGTHS[7], 7).bounds):
        library.opcheck(torch.ops.llama.blockwise_attention.default, (*leaves, bounds))


def test_documents_know_their_tokens() -> None:
    documents = Documents.of([[2, 3], [4]], 5)
    assert documents.positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert documents.bounds.tolist() == [0, 2, 5, 9, 10]
    mask = documents.mask()
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask[1, 0, 4].tolist() == [False] * 4 + [True]
    for wrong in ([[2, 4]], [[0, 5]]):
        with pytest.raises(ValueError, match="in a row of 5"):
            Documents.of(wrong, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("P", [0, 5])
@pytest.mark.parametrize("groups", [4, 2])
def test_the_gpus_kernel_for_documents_is_the_definition(groups: int, P: int) -> None:
    leaves = [x.detach().cuda().requires_grad_() for x in inputs(4, groups, 300, P, torch.bfloat16)]
    documents = Documents.of(LENGTHS[300], 300, "cuda")
    found = with_gradients(attention(*leaves, documents).cpu(), leaves)
    on_cpu = [x.detach().cpu().requires_grad_() for x in leaves]
    expected = with_gradients(definition(*on_cpu, Documents.of(LENGTHS[300], 300)), on_cpu)
    assert max(off([x.cpu() for x in found], expected)) < 1e-2
