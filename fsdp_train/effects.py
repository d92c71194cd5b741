"""Which settings have an effect in a run, and why the others have none: a line for each in EFFECTS.

A setting that was given and has no effect is told by name; one that says something else than its
default, by which the user must have meant something, is refused. What has no effect is not written
to `config.toml`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fsdp_train.build import ADAPTER_METHODS, tokenizer_path
from fsdp_train.settings import as_text, changed, values_of
from fsdp_train.strategy import GOES_WITH, called, meant_strategy
from llama.errors import InputError

if TYPE_CHECKING:
    from fsdp_train.config import RunConfig


@dataclass(frozen=True)
class Situation:
    """What decides about effects. `processes`: 0 while nobody knows how many there will be."""

    config: RunConfig
    processes: int

    @property
    def strategy(self) -> str:
        """As it was chosen; "auto" while that can be anything."""
        parallel = self.config.parallel
        return meant_strategy(parallel, self.processes) if self.processes else parallel.strategy

    @property
    def is_adapter(self) -> bool:
        return self.config.finetune.method in ADAPTER_METHODS

    @property
    def answers(self) -> bool:
        """Whether prompts can be answered: by a language model, of which a tokenizer is known."""
        return self.config.finetune.head.kind == "lm" and self.shows_samples

    @property
    def shows_samples(self) -> bool:
        """Whether there is a tokenizer to show them with. (A classifier cannot do without one.)"""
        return bool(tokenizer_path(self.config.model))

    def explained(self, why: str) -> str:
        """The sentence with the values that it speaks of."""
        config = self.config
        strategy: str = config.parallel.strategy
        if self.processes:
            strategy = called(config.parallel, self.processes)
        return why.format(
            method=config.finetune.method,
            strategy=strategy,
            sharding=config.parallel.sharding,
            max_steps=config.train.max_steps,
            epochs=config.train.epochs,
            eval_path=config.data.eval_path,
        )


@dataclass(frozen=True)
class Needs:
    """What must be met for a setting to have an effect.

    Attributes:
        otherwise: why it has none.
        refuses: whether another value than the default is then an error.
    """

    met: Callable[[Situation], bool]
    otherwise: str
    refuses: bool = False


ALWAYS: tuple[Needs, ...] = ()
_ANSWERS = Needs(
    lambda s: s.answers,
    "a classifier, or a model without a tokenizer, answers no prompts",
)
_MODEL_IS_SAVED = Needs(lambda s: not s.is_adapter, "an adapter is one file")
_CLASSIFIES = Needs(
    lambda s: s.config.finetune.head.kind == "classification",
    "it goes with --finetune.head.kind classification",
    refuses=True,
)
_ALL_SPREAD = Needs(
    lambda s: s.config.parallel.sharding == "full_shard",
    "with --parallel.sharding {sharding} nothing is gathered in backward",
)


def _of_method(method: str) -> Needs:
    return Needs(
        lambda s: s.config.finetune.method == method,
        "--finetune.method is {method}, which does not use it",
        refuses=True,
    )


def _of_strategies(name: str) -> Needs:
    """`ParallelConfig` itself refuses another value than the default."""
    strategies = (*GOES_WITH[name], "auto")
    return Needs(lambda s: s.strategy in strategies, "--parallel.strategy is {strategy}")


EFFECTS: dict[str, tuple[Needs, ...]] = {
    "model.path": ALWAYS,
    "model.preset": ALWAYS,
    "model.tokenizer": ALWAYS,
    "model.dtype": ALWAYS,
    "data.path": ALWAYS,
    "data.format": ALWAYS,
    "data.eval_path": ALWAYS,
    "data.eval_fraction": (
        Needs(
            lambda s: not s.config.data.eval_path,
            "--data.eval_path {eval_path} is the held-out data",
        ),
    ),
    "data.max_length": ALWAYS,
    "data.shuffle": ALWAYS,
    "data.packing": ALWAYS,
    "finetune.method": ALWAYS,
    "finetune.from_adapter": (
        Needs(lambda s: s.is_adapter, "--finetune.method is {method}, which has no adapter"),
    ),
    "finetune.lora": (_of_method("lora"),),
    "finetune.llama_adapter": (_of_method("llama_adapter"),),
    "finetune.prefix": (_of_method("prefix"),),
    "finetune.prefix.encoder_hidden_size": (
        _of_method("prefix"),
        Needs(
            lambda s: s.config.finetune.prefix.prefix_projection,
            "--finetune.prefix.prefix_projection is false",
        ),
    ),
    "finetune.prefix.init_std": (
        _of_method("prefix"),
        Needs(
            lambda s: not s.config.finetune.from_adapter,
            "the prefix starts as that of --finetune.from_adapter",
            refuses=True,
        ),
    ),
    "finetune.partial": (_of_method("partial"),),
    "finetune.partial.probe_batches": (
        _of_method("partial"),
        Needs(
            lambda s: bool(s.config.finetune.partial.select),
            "it goes with --finetune.partial.select",
            refuses=True,
        ),
    ),
    "finetune.head.kind": ALWAYS,
    "finetune.head.hidden": (
        Needs(
            lambda s: not s.is_adapter,
            "a PEFT adapter ({method}) has no place for extra layers",
            refuses=True,
        ),
    ),
    "finetune.head.num_labels": (_CLASSIFIES,),
    "finetune.head.feature_cache": (
        Needs(
            lambda s: s.config.finetune.caches_features,
            "it goes with --finetune.method head and a classification head",
            refuses=True,
        ),
    ),
    "optim.lr": ALWAYS,
    "optim.weight_decay": ALWAYS,
    "optim.warmup_steps": ALWAYS,
    "optim.schedule": ALWAYS,
    "optim.grad_clip": ALWAYS,
    "parallel.strategy": ALWAYS,
    "parallel.sharding": (_of_strategies("sharding"),),
    "parallel.replicas": (_of_strategies("replicas"),),
    "parallel.precision": ALWAYS,
    "parallel.reduce_dtype": (_of_strategies("reduce_dtype"),),
    "parallel.activation_checkpointing": (
        Needs(
            lambda s: s.config.finetune.method != "head",
            "no gradient goes through the layers below the head",
        ),
    ),
    "parallel.compile": (_of_strategies("compile"),),
    "parallel.cpu_offload": (_of_strategies("cpu_offload"),),
    "parallel.backward_prefetch": (_of_strategies("backward_prefetch"), _ALL_SPREAD),
    "parallel.limit_all_gathers": (
        _of_strategies("limit_all_gathers"),
        Needs(
            lambda s: s.config.parallel.sharding != "no_shard",
            "with --parallel.sharding {sharding} nothing is gathered",
        ),
    ),
    "parallel.no_sync": (
        _of_strategies("no_sync"),
        Needs(lambda s: s.config.train.grad_accum > 1, "--train.grad_accum is 1", refuses=True),
    ),
    "parallel.optimizer_in_backward": (_of_strategies("optimizer_in_backward"),),
    "parallel.reshard_to": (_of_strategies("reshard_to"), _ALL_SPREAD),
    "parallel.keep_last_layer": (_of_strategies("keep_last_layer"), _ALL_SPREAD),
    "parallel.timeout": (Needs(lambda s: s.processes != 1, "one process waits for no other"),),
    "train.max_steps": (Needs(lambda s: not s.config.train.epochs, "--train.epochs is {epochs}"),),
    "train.epochs": (
        Needs(lambda s: not s.config.train.max_steps, "--train.max_steps is {max_steps}"),
    ),
    "train.batch_size": ALWAYS,
    "train.grad_accum": ALWAYS,
    "train.seed": ALWAYS,
    "train.output_dir": ALWAYS,
    "train.max_shard_gb": (_MODEL_IS_SAVED,),
    "train.eval_every": (
        Needs(
            lambda s: s.config.train.eval_every < (s.config.train.max_steps or math.inf),
            "the run ends after {max_steps} steps, where it evaluates anyway",
        ),
    ),
    "train.samples": (
        Needs(
            lambda s: s.shows_samples or not s.config.train.samples,
            "there is no tokenizer",
        ),
    ),
    "train.sample_tokens": (
        _ANSWERS,
        Needs(lambda s: s.config.train.samples > 0, "--train.samples is 0"),
    ),
    "train.exact_match": ALWAYS,
    "checkpoint.every": ALWAYS,
    "checkpoint.keep": (
        Needs(
            lambda s: s.config.checkpoint.every > 0,
            "--checkpoint.every is 0, and only a signal can ask for a checkpoint",
        ),
    ),
    "checkpoint.resume": ALWAYS,
    "checkpoint.overwrite": ALWAYS,
    "checkpoint.accept_changes": ALWAYS,
    "log.every": ALWAYS,
}  # fmt: skip


def needs_of(name: str) -> tuple[Needs, ...]:
    """The line of a setting: its own, or that of the section above it.

    Raises:
        KeyError: it has none.
    """
    while name not in EFFECTS:
        name, dot, _ = name.rpartition(".")
        if not dot:
            raise KeyError(name)
    return EFFECTS[name]


def why_not(name: str, situation: Situation) -> str:
    """Why a setting has no effect; empty where it has one."""
    unmet = (need for need in needs_of(name) if not need.met(situation))
    return next((situation.explained(need.otherwise) for need in unmet), "")


def refuse(config: RunConfig) -> None:
    """Refuse settings that cannot mean anything beside each other, on however many processes.

    Raises:
        InputError: one that has no effect says something else than its default.
    """
    situation = Situation(config, processes=0)
    for name, value in changed(config).items():
        for need in needs_of(name):
            if need.refuses and not need.met(situation):
                why = situation.explained(need.otherwise)
                raise InputError(f"--{name} {as_text(value)} has no effect: {why}")


def notes(config: RunConfig, processes: int) -> list[str]:
    """A line for each setting that was given and has no effect in this run."""
    situation, given = Situation(config, processes), config.given_settings()
    reasons = {name: why_not(name, situation) for name in values_of(config) if name in given}
    return [f"note: --{name} has no effect: {why}" for name, why in reasons.items() if why]


def without_effect(config: RunConfig, processes: int) -> set[str]:
    """The settings that another run like this one need not be told.

    They have no effect here; or nobody gave them, and on one process or on two they would have
    none, so that reading them there would be worth a note.
    """
    here, given = Situation(config, processes), config.given_settings()
    anywhere = (here, Situation(config, 1), Situation(config, 2))
    found = set()
    for name in values_of(config):
        situations = (here,) if name in given else anywhere
        if any(why_not(name, situation) for situation in situations):
            found.add(name)
    return found
