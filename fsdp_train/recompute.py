"""Activation checkpointing: what backward computes again instead of finding it stored (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

import functools
import warnings
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo as dynamo
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from llama.model import DecoderLayer
from peft_impl.dropout import drawn_masks
from peft_impl.lora import LoRALinear

_ATEN = torch.ops.aten
KEPT = {  # what takes the time: matrix products and attention, in whatever kernel they run
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default, _ATEN.linear.default),
    *(_ATEN._scaled_dot_product_flash_attention_for_cpu.default, _ATEN._scaled_dot_product_flash_attention.default),
    *(_ATEN._scaled_dot_product_efficient_attention.default, _ATEN._scaled_dot_product_cudnn_attention.default),
    *(torch.ops.torch_attn._varlen_attn.default, torch.ops.llama.blockwise_attention.default),
}


def checkpoint_activations(model: nn.Module, kind: str, compiled: bool = False) -> None:
    """Wrap each decoder layer. Call it after `FullyShardedDataParallel` (which then stands outside: a unit is gathered once for
    recomputation and backward), and before `fully_shard`.

    Non-reentrant: the reentrant kind needs inputs that require gradients, and a frozen embedding's output does not.

    Args:
        kind: "full" stores a layer's input only, and costs a second forward pass; "selective" keeps the outputs of matrix
            products and attention too, and computes again only what lies between them. "offload" is "full", with the layers'
            inputs in the host's memory until backward.
        compiled: `compile_layers` follows, which knows torch's own form of the latter only.
    """
    keep_and_reuse = functools.partial(create_selective_checkpoint_contexts, list(KEPT)) if compiled else _keep_and_reuse
    context: dict[str, Any] = {"context_fn": keep_and_reuse} if kind == "selective" else {}
    wrapper: Any = _Offloaded if kind == "offload" else _Checkpointed
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT, **context),
        check_fn=lambda module: isinstance(module, DecoderLayer),
    )


class _Checkpointed(CheckpointWrapper):
    """Computes its layer again in backward; where there is none to come (evaluation, generation, layers below all that
    trains), it is the layer."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or (torch.compiler.is_compiling() and not self._differentiates(hidden)):
            return self._checkpoint_wrapped_module(hidden, *args, **kwargs)
        return super().forward(hidden, *args, **kwargs)

    def _differentiates(self, hidden: Tensor) -> bool:
        """To the compiler, which refuses to compute again what no backward asks for. Not for `FullyShardedDataParallel`,
        which holds the layer's parameters outside of it; uncompiled, checkpointing itself stores nothing there."""
        return hidden.requires_grad or any(parameter.requires_grad for parameter in self.parameters())


class _Offloaded(_Checkpointed):
    """What a checkpointed layer stores, its input, goes to the host, through pinned memory, and comes back for backward."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return super().forward(hidden, *args, **kwargs)


class _Keep(TorchDispatchMode):
    """Stores what the operations in `KEPT` give. (torch's own form of this counts all operations, and FSDP gathers a unit
    within a layer by others in backward than in forward.)"""

    def __init__(self, kept: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in KEPT:
            self._kept[function].append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, result))
        return result


class _Reuse(_Keep):
    """Gives them back, in the same order."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._kept[function].popleft() if function in KEPT else function(*args, **(kwargs or {}))


def _keep_and_reuse() -> tuple[_Keep, _Reuse]:
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


RECOMPILE_LIMIT = 64  # training, evaluation and generation, each with shapes of its own


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer, with its wrapper if it has one, as one graph. The first call compiles; all layers share
    that.

    What is not a layer stays as it is: the embedding is a lookup, and the head has its own form (llama/loss.py).
    """
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # what is cached never changes
    wrapper_of = wrappers(model)
    # What the norms give is needed by LoRA's thin products alone: a tenth of what a layer stores, and computed again from
    # its input at hardly a price. Without LoRA the compiler would find something dearer to compute again (tools/LOG.md).
    # Checkpointing says by itself what is stored, and is not to be asked for less.
    thin = not wrapper_of and any(isinstance(module, LoRALinear) for module in model.modules())
    for layer in [module for module in model.modules() if isinstance(module, DecoderLayer)]:
        called = wrapper_of.get(layer, layer)
        called.compile(fullgraph=True)
        called._compiled_call_impl = _surrounded(called, called._compiled_call_impl, 0.99 if thin else 1.0)


def _surrounded(layer: nn.Module, compiled: Any, budget: float) -> Callable[..., Any]:
    """The compiled call of `layer` with what has to stand around it: the compiler's settings, which are the process's own
    otherwise, and the random draws, which compiled code might repeat in backward (peft_impl/dropout.py)."""

    def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        with (
            dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT),
            functorch_config.patch(activation_memory_budget=budget),
            drawn_masks(layer, hidden.device),
        ):
            return compiled(hidden, *args, **kwargs)

    return call


def wrappers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The wrapper of each module that has one."""
    return {m._checkpoint_wrapped_module: m for m in model.modules() if isinstance(m, CheckpointWrapper)}
