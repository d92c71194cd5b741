"""From settings to a model that is ready to train: load -> adapter -> what trains -> shard -> checkpointing -> optimizer.

The order matters and stands in one place: an adapter added after sharding would not be sharded, an optimizer built before
it would hold parameters that nothing updates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import llama
from fsdp_train.optim import OptimConfig, build_optimizer
from fsdp_train.parallel import ParallelConfig, World, checkpoint_activations, chosen_strategy, compute_dtype, shard
from fsdp_train.settings import option
from llama import PRESETS, Llama, Tokenizer
from llama.errors import InputError, nearest
from peft_impl import LlamaAdapterConfig, LoraConfig, PrefixTuningConfig, add_adapter, load_adapter

ADAPTER_METHODS = ("lora", "llama_adapter", "prefix")


@dataclass(frozen=True)
class ModelConfig:
    """The base."""

    path: str = option("", "Hugging Face or Meta directory of the base model", "DIR")
    preset: str = option("", f"train from random weights instead: {', '.join(PRESETS)}", "NAME")
    tokenizer: str = option("", "tokenizer.model or its directory (default: the model's directory)", "PATH")
    dtype: Literal["auto", "bf16", "fp32"] = option("auto", "of frozen weights; auto: that of the computation")

    def __post_init__(self) -> None:
        if self.path and self.preset:
            raise InputError("--model.path and --model.preset are given both; choose one")
        if self.preset and self.preset not in PRESETS:
            raise InputError(f"--model.preset {self.preset}: expected {', '.join(PRESETS)}{nearest(self.preset, PRESETS)}")


@dataclass(frozen=True)
class FinetuneConfig:
    """What trains."""

    method: Literal["lora", "llama_adapter", "prefix", "full"] = option(
        "lora", "an adapter on the frozen base: lora, llama_adapter or prefix; or all weights: full"
    )
    from_adapter: str = option("", "continue from this PEFT adapter directory, with its own settings", "DIR")
    lora: LoraConfig = field(default_factory=LoraConfig)
    llama_adapter: LlamaAdapterConfig = field(default_factory=LlamaAdapterConfig)
    prefix: PrefixTuningConfig = field(default_factory=PrefixTuningConfig)

    def __post_init__(self) -> None:
        if self.from_adapter and self.method not in ADAPTER_METHODS:
            raise InputError(
                f"--finetune.from_adapter goes with --finetune.method {' or '.join(ADAPTER_METHODS)}, not {self.method}"
            )
        for section in ADAPTER_METHODS:
            settings = getattr(self, section)
            if settings == type(settings)():
                continue
            if section != self.method:
                raise InputError(f"--finetune.{section} is set, but --finetune.method is {self.method}, which does not use it")
            if self.from_adapter:
                raise InputError(f"--finetune.{section} is set, but --finetune.from_adapter brings its own settings")


def load_tokenizer(config: ModelConfig) -> Tokenizer | None:
    """The tokenizer that the settings name, or the model directory's; None when there is none.

    Raises:
        InputError: a named one that cannot be read.
    """
    if config.tokenizer:
        return Tokenizer(config.tokenizer)
    has_one = config.path and (Path(config.path) / "tokenizer.model").exists()
    return Tokenizer(config.path) if has_one else None


def check_tokenizer(tokenizer: Tokenizer | None, vocab_size: int) -> str:
    """A note for people when the vocabularies differ harmlessly.

    Raises:
        InputError: the tokenizer has ids that the model has no row for.
    """
    if tokenizer is None or tokenizer.vocab_size == vocab_size:
        return ""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model only {vocab_size}: they do not belong together"
        )
    return f"note: the tokenizer has {tokenizer.vocab_size} pieces, the model {vocab_size}; the rest is never used"


def build_model(model_config: ModelConfig, finetune: FinetuneConfig, seed: int, dtype: torch.dtype) -> Llama:
    """The base with its adapter, unsharded, on the CPU; what trains is in fp32, what is frozen in `model.dtype`.

    Args:
        dtype: of the computation.

    Raises:
        InputError: anything wrong with the files or the adapter's settings.
    """
    full = finetune.method == "full"
    frozen = {"auto": dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[model_config.dtype]
    weights = torch.float32 if full else frozen
    if model_config.preset:
        torch.manual_seed(seed)  # the same weights on every process
        model = Llama(PRESETS[model_config.preset]).to(weights)
    else:
        model = llama.load(model_config.path, dtype=weights)
    model.model.compute_dtype = dtype
    if finetune.from_adapter:
        load_adapter(model, finetune.from_adapter, trainable=True)
    elif not full:
        add_adapter(model, getattr(finetune, finetune.method), seed=seed)
    return model


def wrap_model(
    model: Llama, parallel: ParallelConfig, optim: OptimConfig, world: World
) -> tuple[nn.Module, torch.optim.AdamW, str]:
    """Sharded (or not), checkpointed (or not), on the device, with its optimizer; and the strategy that "auto" became.

    Raises:
        InputError: a unit would mix trainable and frozen parameters.
    """
    strategy = chosen_strategy(parallel, world)
    wrapped: nn.Module = model
    if strategy == "fsdp":
        wrapped = shard(model, world, compute_dtype(parallel, world.device))
    else:
        wrapped = model.to(world.device)
    if parallel.activation_checkpointing == "full":
        checkpoint_activations(wrapped)
    return wrapped, build_optimizer(wrapped, optim), strategy
