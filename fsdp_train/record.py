"""`config.toml` in the output: the settings in force, and what they left to the program.

torchrun -m fsdp_train.main --config out/config.toml --train.output_dir again
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fsdp_train.build import frozen_dtype
from fsdp_train.config import RunConfig
from fsdp_train.effects import without_effect
from fsdp_train.features import cache_directory
from fsdp_train.from_adapter import DROPOUT, continued, training_notes
from fsdp_train.inputs import Inputs
from fsdp_train.partial import RankedLayer
from fsdp_train.settings import values_of
from fsdp_train.strategy import called, chosen_strategy, dtype_name, replicas_and_shards
from fsdp_train.toml import write_toml
from fsdp_train.world import World

HEADER = """torchrun -m fsdp_train.main --config config.toml
Settings without an effect in this run are left out."""


@dataclass(frozen=True)
class Facts:
    """What a run has chosen by its first step.

    Attributes:
        dtype: of the computation.
        output: the run's directory.
        first_step: the steps that a checkpoint brought.
        ranking: of the layers, where `--finetune.partial.select` chose among them.
    """

    inputs: Inputs
    world: World
    dtype: torch.dtype
    output: Path
    first_step: int
    ranking: Sequence[RankedLayer]


def config_toml(config: RunConfig, facts: Facts) -> str:
    """The text of `config.toml`.

    A default that nobody gave is written too, since a later version may have another one, unless it
    would have no effect on another number of processes. What the program chose is not a setting: it
    stands in a comment.
    """
    config = dataclasses.replace(config, finetune=continued(config.finetune))
    without = without_effect(config, facts.world.size)
    remarks = {name: text for name, text in _chosen(config, facts).items() if name not in without}
    if not config.train.output_dir:
        without.add("train.output_dir")
        remarks["train.output_dir"] = f"{facts.output} was chosen"
    if config.finetune.from_adapter:
        section = f"finetune.{config.finetune.method}."
        own = {name for name in values_of(config) if name.startswith(section)}
        own -= without | config.given_settings()
        if training_notes(config.finetune):
            own.discard(DROPOUT)
        without |= own
        remarks.update(dict.fromkeys((*own, "finetune.method"), "the adapter's"))
    return write_toml(config, HEADER, without, remarks)


def _chosen(config: RunConfig, facts: Facts) -> dict[str, str]:
    """What was chosen, by the name of the setting that leaves it open."""
    inputs = facts.inputs
    chosen = {**_chosen_in_parallel(config, facts), **_chosen_in_finetune(config, facts)}
    if config.model.dtype == "auto" and config.finetune.method != "full":
        chosen["model.dtype"] = dtype_name(frozen_dtype(config.model, facts.dtype))
    if not config.model.tokenizer:
        found = inputs.tokenizer
        chosen["model.tokenizer"] = "there is none" if found is None else str(found.path)
    if config.data.format == "auto":
        chosen["data.format"] = inputs.data.format
    if config.data.max_length is None:
        chosen["data.max_length"] = f"{inputs.base.max_position_embeddings}, the model's context"
    if not config.train.max_steps:
        chosen["train.epochs"] = f"{config.train.epochs or 1}: {inputs.total_steps} steps"
    if config.checkpoint.resume == "auto":
        step = facts.first_step
        chosen["checkpoint.resume"] = f"from step {step}" if step else "from the start"
    return chosen


def _chosen_in_parallel(config: RunConfig, facts: Facts) -> dict[str, str]:
    parallel, world = config.parallel, facts.world
    chosen = {}
    if parallel.strategy == "auto":
        chosen["parallel.strategy"] = called(parallel, world.size).removeprefix("auto, which is ")
    if parallel.precision == "auto":
        chosen["parallel.precision"] = dtype_name(facts.dtype)
    replicas, shards = replicas_and_shards(parallel, world.size, world.local_size)
    if not parallel.replicas and chosen_strategy(parallel, world.size) in ("hsdp", "fsdp2"):
        chosen["parallel.replicas"] = str(replicas)
    if not parallel.reshard_to:
        chosen["parallel.reshard_to"] = str(shards)
    return chosen


def _chosen_in_finetune(config: RunConfig, facts: Facts) -> dict[str, str]:
    finetune, target = config.finetune, facts.inputs.target
    chosen = {}
    if finetune.prefix.encoder_hidden_size is None:
        width = target.num_key_value_heads * (target.hidden_size // target.num_attention_heads)
        chosen["finetune.prefix.encoder_hidden_size"] = str(width)
    if finetune.partial.select:
        layers = ", ".join(str(row.layer) for row in facts.ranking if row.trains)
        chosen["finetune.partial.select"] = f"decoder layers {layers}"
    if finetune.head.num_labels is None:
        chosen["finetune.head.num_labels"] = str(len(target.id2label))
    if finetune.head.feature_cache == "auto":
        chosen["finetune.head.feature_cache"] = str(cache_directory("auto"))
    return chosen
