"""What of a model goes into its files, Hugging Face's and Meta's alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.errors import InputError, listing
from llama.model import Llama


def check_plain(config: LlamaConfig, names: Iterable[str]) -> None:
    """Raise InputError unless `names` are exactly the parameters of a Llama of this configuration, without adapters."""
    with torch.device("meta"):
        expected = {name for name, _ in Llama(config).named_parameters()}
    if strange := sorted(set(names) ^ expected):
        raise InputError(
            f"this model is not a plain Llama: {listing(strange)};"
            " call peft_impl.merge_and_unload (instead of merge) or remove_adapter before saving the model"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise InputError for a tensor that is not finite in the dtype in which it is about to be written."""
    if not torch.isfinite(tensor).all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{name} holds NaN or infinity in {kind}; a model with such weights is not saved")
