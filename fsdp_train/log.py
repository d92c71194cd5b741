"""What a run tells: lines for people on rank 0, and metrics.jsonl for programs."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdp_train.settings import option
from llama.errors import InputError


@dataclass(frozen=True)
class LogConfig:
    """How often to tell."""

    every: int = option(10, "steps between rows of metrics.jsonl and progress lines")

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"--log.every {self.every}: expected at least 1 step")


class Metrics:
    """`metrics.jsonl`: one JSON object per line, written at once. Only rank 0 writes.

    Args:
        resume_step: keep the rows up to this step (a resumed run repeats none), or start an empty file with 0.
    """

    def __init__(self, path: Path, writes: bool, resume_step: int = 0) -> None:
        self._file = None
        if not writes:
            return
        kept = []
        if resume_step and path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= resume_step]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, **row: Any) -> None:
        """Append one row."""
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")


def _step(line: str) -> float:
    """The step of a row; a row that a killed process left half-written is beyond every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Progress:
    """A bar with `tqdm` in a terminal, plain lines otherwise; silent on other ranks than 0.

    Args:
        total: steps of the run; done: steps before this start.
        every: steps between plain lines.
    """

    def __init__(self, total: int, done: int, every: int, shows: bool) -> None:
        self._total, self._every, self._shows = total, every, shows
        self._first, self._start = done, time.perf_counter()
        self._bar = _bar(total, done) if shows and sys.stderr.isatty() else None

    def step(self, step: int, loss: float, lr: float, tokens_per_second: float) -> None:
        """Show that `step` steps are done."""
        if not self._shows:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(1)
        elif step % self._every == 0 or step == self._total:
            left = (time.perf_counter() - self._start) / (step - self._first) * (self._total - step)
            say(
                f"step {step}/{self._total}  loss {loss:.4f}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s  {left:.0f} s left"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar(total: int, done: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there completely or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def say(text: str) -> None:
    """One message for people."""
    print(text, flush=True)


def no_picture(name: str) -> None:
    """Say what is missing where a picture would have been drawn."""
    print(f'no {name}: it needs matplotlib, pip install "llama-fsdp-finetuning[ui]"', file=sys.stderr, flush=True)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
