"""Activation checkpointing: what backward computes again instead of finding it stored (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from llama.model import DecoderLayer

_ATEN = torch.ops.aten
KEPT = [  # what takes the time: matrix products and attention, in whatever kernel they run
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default, _ATEN.linear.default),
    *(_ATEN._scaled_dot_product_flash_attention_for_cpu.default, _ATEN._scaled_dot_product_flash_attention.default),
    *(_ATEN._scaled_dot_product_efficient_attention.default, _ATEN._scaled_dot_product_cudnn_attention.default),
]


def checkpoint_activations(model: nn.Module, kind: str) -> None:
    """Wrap each decoder layer. Call it after `FullyShardedDataParallel` (which then stands outside: a unit is gathered once for
    recomputation and backward), and before `fully_shard`.

    Non-reentrant: the reentrant kind needs inputs that require gradients, and a frozen embedding's output does not.

    Args:
        kind: "full" stores a layer's input only, and costs a second forward pass; "selective" keeps the outputs of matrix
            products and attention too, and computes again only what lies between them.
    """
    context: dict[str, Any] = {}
    if kind == "selective":
        context["context_fn"] = functools.partial(create_selective_checkpoint_contexts, KEPT)
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT, **context),
        check_fn=lambda module: isinstance(module, DecoderLayer),
    )


def wrappers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The wrapper of each module that has one."""
    return {m._checkpoint_wrapped_module: m for m in model.modules() if isinstance(m, CheckpointWrapper)}
