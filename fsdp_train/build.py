"""From settings to a model that is ready to train: load -> adapter -> what trains -> shard -> checkpointing -> optimizer.

The order matters and stands in one place: an adapter added after sharding would not be sharded, an optimizer built before
it would hold parameters that nothing updates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fsdp_train.from_adapter import ADAPTER_CONFIGS, continued
from fsdp_train.heads import HeadConfig, new_parameters
from fsdp_train.optim import OptimConfig, Optimizer, build_optimizer
from fsdp_train.parallel import Fill, nothing_to_fill, place_model
from fsdp_train.partial import PartialConfig
from fsdp_train.settings import beside_settings, option
from fsdp_train.strategy import DTYPES, ParallelConfig
from fsdp_train.world import World
from llama import PRESETS, Llama, LlamaConfig, Tokenizer, relabel, replace_head
from llama.errors import InputError, nearest
from llama.io import filler, on_meta
from llama.weight_files import Weights
from peft_impl import (
    LlamaAdapterConfig,
    LoraConfig,
    PrefixTuningConfig,
    add_adapter,
    load_adapter,
    select_parameters,
    train_only,
)
from peft_impl.adapters import materialise_adapter
from peft_impl.freeze import layer_of

ADAPTER_METHODS = tuple(ADAPTER_CONFIGS)


@dataclass(frozen=True)
class ModelConfig:
    """The base."""

    path: str = option("", "Hugging Face or Meta directory of the base model", "DIR")
    preset: str = option("", f"train from random weights instead: {', '.join(PRESETS)}", "NAME")
    tokenizer: str = option("", "tokenizer.model or its directory (default: the model's directory)", "PATH")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "of frozen weights and of the saved model; auto: that of the computation, and saved as in the base's files,"
        " but what trained in fp32",
    )

    def __post_init__(self) -> None:
        if self.path and self.preset:
            raise InputError("--model.path and --model.preset are given both; choose one")
        if self.preset and self.preset not in PRESETS:
            raise InputError(f"--model.preset {self.preset}: expected {', '.join(PRESETS)}{nearest(self.preset, PRESETS)}")


@dataclass(frozen=True)
class FinetuneConfig:
    """What trains.

    Attributes:
        settled: method and section are those of the adapter in `from_adapter`: see `continued`.
    """

    method: Literal["lora", "llama_adapter", "prefix", "full", "partial", "head"] = option(
        "lora", "an adapter on the frozen base (lora, llama_adapter, prefix), all weights (full), some (partial), or the head"
    )
    from_adapter: str = option(
        "",
        "continue from this PEFT adapter directory: method and settings are the adapter's, and a given"
        " one must be the same (but a given lora_dropout holds in training)",
        "DIR",
    )
    lora: LoraConfig = field(default_factory=LoraConfig)
    llama_adapter: LlamaAdapterConfig = field(default_factory=LlamaAdapterConfig)
    prefix: PrefixTuningConfig = field(default_factory=PrefixTuningConfig)
    partial: PartialConfig = field(default_factory=PartialConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    settled: bool = beside_settings(False)

    def __post_init__(self) -> None:
        adapter = self.method in ADAPTER_METHODS
        if self.from_adapter and not adapter:
            raise InputError(
                f"--finetune.from_adapter goes with --finetune.method {' or '.join(ADAPTER_METHODS)}, not {self.method}"
            )
        if self.method == "partial" and not (self.partial.train or self.partial.select):
            raise InputError(
                "--finetune.method partial: say what trains, --finetune.partial.train last:2 (or norms, layers.*.q_proj, ...)"
                " or --finetune.partial.select gradient_norm:2"
            )
        if self.head.kind == "classification" and self.method in ("llama_adapter", "prefix"):
            raise InputError(
                f"--finetune.head.kind classification goes with lora, full, partial and head, not with {self.method}"
            )

    @property
    def caches_features(self) -> bool:
        """Whether the backbone is frozen and seen through one vector per text, which is then computed once."""
        return self.method == "head" and self.head.kind == "classification"


def tokenizer_path(config: ModelConfig) -> str:
    """The tokenizer that the settings name, or the model directory if it has one; or nothing."""
    if config.tokenizer:
        return config.tokenizer
    has_one = config.path and (Path(config.path) / "tokenizer.model").exists()
    return config.path if has_one else ""


def load_tokenizer(config: ModelConfig) -> Tokenizer | None:
    """The tokenizer that the settings name, or the model directory's; None when there is none.

    Raises:
        InputError: a named one that cannot be read.
    """
    path = tokenizer_path(config)
    return Tokenizer(path) if path else None


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


def trained_names(finetune: FinetuneConfig, base: LlamaConfig, target: LlamaConfig, layers: Collection[int] = ()) -> list[str]:
    """The base's own parameters that train, in the model's order; none for an adapter, which brings its own.

    Args:
        base, target: the model on disk, and with the head that is wanted.
        layers: decoder layers that `--finetune.partial.select` has chosen.

    Raises:
        InputError: as `select_parameters`.
    """
    with torch.device("meta"):
        model = Llama(target)
    names = [name for name, _ in model.named_parameters()]
    if finetune.method in ADAPTER_METHODS:
        return []
    if finetune.method == "full":
        return names
    if finetune.method == "head":
        return [name for name in names if not name.startswith("model.")]
    patterns = finetune.partial.train
    try:
        chosen = set(select_parameters(model, patterns)) if patterns else set()
    except InputError as error:
        raise InputError(f"--finetune.partial.train {','.join(patterns)}: {error}") from None
    chosen |= {name for name in names if layer_of(name) in layers} | set(new_parameters(base, target))
    return [name for name in names if name in chosen]


def build_model(
    weights: Weights | None,
    model_config: ModelConfig,
    finetune: FinetuneConfig,
    target: LlamaConfig,
    trained: Collection[str],
    seed: int,
    dtype: torch.dtype,
    masters: torch.dtype = torch.float32,
) -> tuple[Llama, Fill]:
    """The base with its head and its adapter, its own weights still on the meta device; and what reads them.

    An adapter and a new head are there already, on the CPU, the same on every process. What starts from the base's values
    (DoRA), or has random ones, is there as a whole.

    Args:
        weights: the base's files; None for random weights.
        target: the base's configuration with the head that is wanted.
        trained: names of the base's own parameters that train, kept in `masters`; what is frozen is in `model.dtype`.
        dtype: of the computation.

    Raises:
        InputError: anything wrong with the files or the adapter's settings.
    """
    frozen = frozen_dtype(model_config, dtype)
    finetune = continued(finetune)
    if weights is None:
        torch.manual_seed(seed)  # the same weights on every process
        model = Llama(PRESETS[model_config.preset])
    else:
        model = on_meta(weights)
    if model.config.id2label:
        relabel(model, target.id2label, target.problem_type)
    elif model.config != target:
        replace_head(model, target.id2label, target.problem_type, target.head_hidden, seed)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(masters if name in trained else frozen)
    train_only(model, trained)
    model.model.compute_dtype = dtype
    if weights is not None and _starts_from_values(finetune):
        filler(model, weights)(model)
    if finetune.from_adapter:
        config = getattr(finetune, finetune.method)
        load_adapter(model, finetune.from_adapter, trainable=True, config=config)
    elif finetune.method in ADAPTER_METHODS:
        add_adapter(model, adapter_config(finetune), seed=seed)
        materialise_adapter(model)
    return model, filler(model, weights) if weights is not None else nothing_to_fill


def _starts_from_values(finetune: FinetuneConfig) -> bool:
    """Whether the adapter needs the base's values before it is spread: DoRA's magnitudes are its rows' norms."""
    return getattr(getattr(finetune, finetune.method, None), "use_dora", False)


def frozen_dtype(config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """Of weights that do not train, where the computation is in `dtype`."""
    return dtype if config.dtype == "auto" else DTYPES[config.dtype]


def adapter_config(finetune: FinetuneConfig) -> Any:
    """The method's settings; a classification head trains beside the adapter, as in PEFT."""
    config = getattr(finetune, finetune.method)
    if finetune.head.kind == "classification":
        saved = dict.fromkeys((*config.modules_to_save, "score"))  # the user may have named it, too
        config = dataclasses.replace(config, modules_to_save=tuple(saved))
    return config


def wrap_model(
    model: nn.Module, parallel: ParallelConfig, optim: OptimConfig, world: World, fill: Fill = nothing_to_fill
) -> tuple[nn.Module, Optimizer]:
    """`place_model`, and then its optimizer."""
    placed = place_model(model, parallel, world, fill)
    return placed, build_optimizer(placed, optim, parallel.optimizer_in_backward)
