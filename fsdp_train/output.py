"""What to do with what a run leaves."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from fsdp_train.build import ADAPTER_METHODS
from fsdp_train.config import DEMO, RunConfig
from fsdp_train.inputs import Inputs


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
