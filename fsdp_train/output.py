"""Where a run goes: a directory that can be written, and that holds nothing which nobody said to replace; and what to do with
what it leaves."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from fsdp_train.build import ADAPTER_METHODS
from fsdp_train.config import DEMO, RunConfig
from fsdp_train.inputs import Inputs
from llama.errors import InputError


def output_directory(config: RunConfig) -> Path:
    """The directory of this run, which can be created and written. Without a name a new one below runs/.

    Raises:
        InputError: it cannot be written, or holds a finished run that nobody said to replace. (One that torchrun restarted
            after a failure may have been finished: what is missing is done again.)
    """
    if not config.train.output_dir and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise InputError("torchrun --max-restarts: give --train.output_dir, where a restarted run finds its checkpoints")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if config.train.output_dir:
        path = Path(config.train.output_dir)
    else:
        parent = Path("runs")
        taken = [int(p.name.rpartition("-")[2]) for p in parent.glob("*-[0-9]*") if p.name.rpartition("-")[2].isdigit()]
        path = parent / f"{config.finetune.method}-{max(taken, default=0) + 1:03d}"
    own, other = ("adapter", "model") if config.finetune.method in ADAPTER_METHODS else ("model", "adapter")
    if (path / other).exists():
        raise InputError(f"{path} holds the result of another method ({path / other}); choose another --train.output_dir")
    if (path / own).exists() and config.checkpoint.resume == "auto" and not restarted:
        raise InputError(
            f"{path} holds a finished run ({path / own}); choose another --train.output_dir,"
            " or replace it with --checkpoint.resume none"
        )
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"--train.output_dir {path}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--train.output_dir {path}: {existing} cannot be written")
    return path


def next_commands(config: RunConfig, inputs: Inputs, artefact: Path) -> list[str]:
    """What to type next, for people."""
    if inputs.tokenizer is None:
        return []
    base = shlex.quote(config.model.path)
    is_adapter = config.finetune.method in ADAPTER_METHODS
    target = f"--model {base} --adapter {artefact}" if is_adapter else f"--model {artefact}"
    example = inputs.asked.example
    if config.finetune.head.kind == "classification":
        lines = ["next:", f"  python -m tools.classify {target} --text {shlex.quote(example['text'])}"]
    else:
        lines = ["next:", f"  python -m tools.generate {target} {_example_prompt(example, inputs.data.format)}"]
    if config.finetune.method == "lora":
        output = artefact.with_name("merged")
        lines.append(f"  python -m tools.merge_adapter --model {base} --adapter {artefact} --output {output}")
    if Path(config.model.path).is_relative_to(DEMO):
        lines.append("  torchrun -m fsdp_train.main --model.path DIR --data.path FILE      # your model, your data")
    return lines


def _example_prompt(example: dict[str, Any], format: str) -> str:
    if format == "alpaca":
        given = f" --input {shlex.quote(example['input'])}" if example.get("input") else ""
        return f"--template alpaca --prompt {shlex.quote(example['instruction'])}{given}"
    return f"--prompt {shlex.quote(str(example.get('prompt', 'Once upon a time')))}"
