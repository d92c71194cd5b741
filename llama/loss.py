"""Cross-entropy of a linear head, chunk by chunk: the (N, V) logits of all positions never exist at once.

Legend: N label positions, C hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label of a position that is not a target (PyTorch's and HF's convention)
CHUNK_ELEMENTS = 2**22  # logits held at once: 16 MB in fp32, 131 rows of Llama 2's vocabulary
CHUNK_ELEMENTS_LARGE = 2**25  # where each chunk adds to the gradient of the whole weight, or so few rows leave a GPU idle


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of `cross_entropy(hidden @ weight.T, targets)`, with fp32 softmax.

    Args:
        hidden: (N, C), the positions that have a label and no others.
        weight: (V, C), multiplied in `hidden`'s dtype; its gradient comes back in its own dtype.
        targets: (N,) token ids.

    Returns:
        A scalar in fp32 (fp64 for fp64 input). Gradients are computed in the forward pass, while a chunk's logits are at
        hand (the idea of Liger's fused linear cross-entropy), so backward costs two multiplications by a scalar.
    """
    return _LinearCrossEntropy.apply(hidden, weight.to(hidden.dtype), targets, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = (with_gradients and need for need in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        loss = hidden.new_zeros((), dtype=wide)
        rows = max(1, (CHUNK_ELEMENTS_LARGE if need_weight or hidden.is_cuda else CHUNK_ELEMENTS) // weight.shape[0])
        for start in range(0, len(targets), rows):
            h, target = hidden[start : start + rows], targets[start : start + rows, None]
            log_probabilities = F.linear(h, weight).log_softmax(-1, dtype=wide)  # (rows, V)
            loss -= log_probabilities.gather(1, target).sum()
            if not (need_hidden or need_weight):
                continue
            # d loss / d logits = softmax(logits) - one_hot(target)
            d_logits = log_probabilities.exp_()
            d_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[start : start + rows])
            if d_weight is not None:
                d_weight += d_logits.t() @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> Any:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * d_loss.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * d_loss).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None
