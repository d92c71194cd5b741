"""What of a model goes into its files, Hugging Face's and Meta's alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llama.errors import InputError, listing
from llama.model import Llama, LlamaConfig


def plain_tensors(config: LlamaConfig, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of `state` that belong into a model's files, in the order of its parameters; a tied head is left out.

    Args:
        dtype: in which they will be written; None means their own. They are returned uncast.

    Raises:
        InputError: `state` is not a plain Llama's (an adapter is attached), or a tensor is not finite in `dtype`.
    """
    with torch.device("meta"):
        expected = [name for name, _ in Llama(config).named_parameters()]
    found = set(state) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if strange := sorted(found ^ set(expected)):
        raise InputError(
            f"this model is not a plain Llama: {listing(strange)};"
            " call peft_impl.merge_and_unload (instead of merge) or remove_adapter before saving the model"
        )
    for name in expected:
        written = state[name].to(dtype or state[name].dtype)
        if not torch.isfinite(written).all():
            kind = str(written.dtype).removeprefix("torch.")
            raise InputError(f"{name} holds NaN or infinity in {kind}; a model with such weights is not saved")
    return {name: state[name] for name in expected}
