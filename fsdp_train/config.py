"""The configuration of a run: a section per file that it configures, and what of it was given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsdp_train.build import FinetuneConfig, ModelConfig
from fsdp_train.checkpoint import CheckpointConfig
from fsdp_train.data import DataConfig
from fsdp_train.effects import notes, refuse
from fsdp_train.from_adapter import adapter_settings, settled, training_notes
from fsdp_train.log import LogConfig
from fsdp_train.optim import OptimConfig
from fsdp_train.settings import beside_settings, build, changed, parse_flags
from fsdp_train.strategy import ParallelConfig, called, chosen_strategy
from fsdp_train.toml import read_toml
from fsdp_train.train import TrainConfig
from llama.errors import InputError

DEMO = Path(__file__).parent / "demo"
DESCRIPTION = """Fine-tune Llama 2. With no flags: LoRA on the bundled demo model and task, about a minute on a laptop.
With your own: --model.path DIR --data.path FILE."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    Attributes:
        given: names of those that a flag or a file has set; None where nobody knows (in Python).
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    given: frozenset[str] | None = beside_settings(None)

    def __post_init__(self) -> None:
        refuse(self)
        if self.model.preset and self.finetune.method != "full":
            raise InputError("--model.preset starts from random weights, which only --finetune.method full can train")
        if self.finetune.head.kind == "classification":
            if self.train.exact_match:
                raise InputError("--train.exact_match counts generated answers, which a classifier does not give")
            if self.data.packing:
                raise InputError("--data.packing true: a classifier looks at the end of each row; leave it out")
            if self.data.format not in ("auto", "classification"):
                raise InputError(f"--data.format {self.data.format} has no labels, which a classification head learns")
        if self.parallel.optimizer_in_backward:
            needs = {
                f"--finetune.method full, not {self.finetune.method}": self.finetune.method == "full",
                "--optim.grad_clip 0": not self.optim.grad_clip,
                "--train.grad_accum 1": self.train.grad_accum == 1,
            }
            if missing := [need for need, met in needs.items() if not met]:
                raise InputError(
                    f"--parallel.optimizer_in_backward needs {' and '.join(missing)}: it updates a parameter as soon as it has"
                    " a gradient, and never sees all of them"
                )
        self._check_unfreezing(self.parallel.strategy, self.parallel.strategy)
        for name in ("exact_match", "eval_every"):
            if getattr(self.train, name) and not (self.data.eval_path or self.data.eval_fraction):
                raise InputError(f"--train.{name} needs held-out data: --data.eval_path or --data.eval_fraction")

    def check_strategy(self, processes: int) -> None:
        """Whether everything goes with what "auto" becomes for this number of processes.

        Raises:
            InputError: as if that strategy had been given.
        """
        strategy = chosen_strategy(self.parallel, processes)
        self._check_unfreezing(strategy, called(self.parallel, processes))

    def checked(self, processes: int) -> list[str]:
        """Lines to be told before work starts, of settings that were given and do not hold.

        Raises:
            InputError: as `check_strategy`.
        """
        self.check_strategy(processes)
        return [*notes(self, processes), *training_notes(self.finetune)]

    def _check_unfreezing(self, strategy: str, called: str) -> None:
        if self.finetune.partial.unfreeze_every and strategy in ("ddp", "fsdp2"):
            raise InputError(
                "--finetune.partial.unfreeze_every goes with --parallel.strategy none, fsdp or hsdp, not with"
                f" {called}, which settles once what trains"
            )

    def given_settings(self) -> frozenset[str]:
        """The names of those that were given; where nobody knows, of those that are no default."""
        return frozenset(changed(self)) if self.given is None else self.given


def parse_config(arguments: Sequence[str]) -> RunConfig:
    """Flags, and the file they name, to a checked configuration.

    Without a model, data or file, the demo's own file for the method (`lora.toml`, ...) is the file, and that of `head` for
    any method with a classification head: flags change the demo.

    Raises:
        InputError: anything unknown, malformed or contradictory.
    """
    flags, file = parse_flags(RunConfig, arguments, DESCRIPTION)
    given = _over(read_toml(RunConfig, Path(file)) if file is not None else {}, flags)
    values = {**given, **(adapter_settings(given) if given.get("finetune.from_adapter") else {})}
    if file is None and not any(given.get(name) for name in ("model.path", "model.preset", "data.path")):
        values = _with_demo(values)
    config = build(RunConfig, values)
    finetune = settled(config.finetune) if config.finetune.from_adapter else config.finetune
    config = dataclasses.replace(config, finetune=finetune, given=frozenset(given))
    if not (config.model.path or config.model.preset):
        raise InputError("no model: give --model.path DIR, a Hugging Face or Meta directory")
    if not config.data.path:
        raise InputError("no data: give --data.path FILE, such as a JSON list of {instruction, input, output}")
    return config


def _with_demo(values: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's settings, changed by these. Nobody has given the demo's own."""
    classifies = values.get("finetune.head.kind") == "classification"
    name = "head" if classifies else values.get("finetune.method", FinetuneConfig.method)
    demo = read_toml(RunConfig, DEMO / f"{name}.toml")
    for path in ("model.path", "data.path", "data.eval_path"):
        demo[path] = str(DEMO / demo[path])
    return _over(demo, values)


def _over(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values under the flags', each of which replaces its alternative in the file."""
    merged = {**file, **flags}
    for one, other in (("train.max_steps", "train.epochs"), ("data.eval_path", "data.eval_fraction")):
        for new, replaced in ((one, other), (other, one)):
            if flags.get(new) and replaced not in flags:
                merged.pop(replaced, None)
    return merged
