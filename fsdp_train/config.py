"""The configuration of a run: one section per file that it configures. `config.toml` in the output says it all again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fsdp_train.build import FinetuneConfig, ModelConfig
from fsdp_train.checkpoint import CheckpointConfig
from fsdp_train.data import DataConfig
from fsdp_train.log import LogConfig
from fsdp_train.optim import OptimConfig
from fsdp_train.settings import build, parse_flags, read_toml
from fsdp_train.strategy import ParallelConfig
from fsdp_train.train import TrainConfig
from llama.errors import InputError

DEMO = Path(__file__).parent / "demo"
DESCRIPTION = """Fine-tune Llama 2. With no flags: LoRA on the bundled demo model and task, about a minute on a laptop.
With your own: --model.path DIR --data.path FILE."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.model.preset and self.finetune.method != "full":
            raise InputError("--model.preset starts from random weights, which only --finetune.method full can train")
        if self.finetune.head.kind == "classification":
            if self.train.exact_match:
                raise InputError("--train.exact_match counts generated answers, which a classifier does not give")
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
        if self.parallel.no_sync and self.train.grad_accum == 1:
            raise InputError("--parallel.no_sync changes nothing with --train.grad_accum 1")
        if self.finetune.partial.unfreeze_every and self.parallel.strategy in ("ddp", "fsdp2"):
            raise InputError(
                f"--finetune.partial.unfreeze_every goes with --parallel.strategy none, fsdp or hsdp, not with"
                f" {self.parallel.strategy}, which settles once what trains"
            )
        for name in ("exact_match", "eval_every"):
            if getattr(self.train, name) and not (self.data.eval_path or self.data.eval_fraction):
                raise InputError(f"--train.{name} needs held-out data: --data.eval_path or --data.eval_fraction")


def parse_config(arguments: Sequence[str]) -> RunConfig:
    """Flags, and the file they name, to a checked configuration.

    Without a model, data or file, the demo's own file for the method (`lora.toml`, ...) is the file, and that of `head` for
    any method with a classification head: flags change the demo.

    Raises:
        InputError: anything unknown, malformed or contradictory.
    """
    flags, file = parse_flags(RunConfig, arguments, DESCRIPTION)
    values = read_toml(RunConfig, Path(file)) if file is not None else {}
    merged = {**values, **flags}
    if file is None and not any(merged.get(name) for name in ("model.path", "model.preset", "data.path")):
        classifies = merged.get("finetune.head.kind") == "classification"
        name = "head" if classifies else merged.get("finetune.method", FinetuneConfig.method)
        values = read_toml(RunConfig, DEMO / f"{name}.toml")
        for name in ("model.path", "data.path", "data.eval_path"):
            values[name] = str(DEMO / values[name])
        merged = {**values, **flags}
    for one, other in (("train.max_steps", "train.epochs"), ("data.eval_path", "data.eval_fraction")):
        for given, replaced in ((one, other), (other, one)):  # a flag replaces its alternative from the file
            if given in flags and replaced not in flags:
                merged.pop(replaced, None)
    config = build(RunConfig, merged)
    if not (config.model.path or config.model.preset):
        raise InputError("no model: give --model.path DIR, a Hugging Face or Meta directory")
    if not config.data.path:
        raise InputError("no data: give --data.path FILE, such as a JSON list of {instruction, input, output}")
    return config
