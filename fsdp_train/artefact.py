"""What the user keeps: `adapter/` (PEFT) or `model/` (Hugging Face), rehearsed before the first step.

A model is written tensor by tensor: what trained is gathered one sharding unit at a time, and what did not comes, bit for bit,
from the base's own files. No process ever holds a second copy of it.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import llama
from fsdp_train.config import RunConfig
from fsdp_train.parallel import full_trainable_state, trained_tensors
from fsdp_train.world import World
from llama import Llama, LlamaConfig, Tokenizer
from llama.errors import InputError
from llama.weight_files import Weights
from peft_impl import add_adapter, count_parameters, save_adapter

REHEARSAL = ".rehearsal"


class Artefact:
    """Where it goes, how large it is, and how it is written."""

    def __init__(
        self, config: RunConfig, target: LlamaConfig, base: Weights | None, adapter: Any, tokenizer: Tokenizer | None,
        directory: Path, world: World,
    ) -> None:  # fmt: skip
        """Args: the run's settings, the trained model's configuration, the base's files (None: random weights), the adapter's
        configuration (None: a whole model is kept), the tokenizer whose files go along, the run's directory."""
        self._config, self._base, self._adapter, self._tokenizer, self._world = config, base, adapter, tokenizer, world
        self.path = directory / ("model" if adapter is None else "adapter")
        with torch.device("meta"):
            self._skeleton = Llama(target)
        if adapter is not None:
            add_adapter(self._skeleton, adapter)
            self.expected_bytes = 4 * count_parameters(self._skeleton)[0]
            return
        for name, parameter in self._skeleton.named_parameters():
            parameter.data = parameter.data.to(self._stored(name))
        self.expected_bytes = sum(p.numel() * p.itemsize for p in self._skeleton.parameters())

    def _stored(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the file: that of the base's file, a new head's that of its embedding, or what was asked."""
        asked = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[self._config.model.dtype]
        if asked is not None or self._base is None:
            return asked or torch.float32
        return self._base.dtype(name if name in self._base.shapes else "model.embed_tokens.weight")

    def check_room(self, checkpoint_bytes: int) -> None:
        """Raise InputError if the disk has no room for this and for the checkpoints that are still to come."""
        needed, free = self.expected_bytes + checkpoint_bytes, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise InputError(
                f"--train.output_dir {self.path.parent}: the run needs {needed / 1e9:.2f} GB there (the result"
                f" {self.expected_bytes / 1e9:.2f}, checkpoints {checkpoint_bytes / 1e9:.2f}), {free / 1e9:.2f} GB are free"
                + " (--checkpoint.every 0 writes no checkpoints)"
                * (checkpoint_bytes > 0)
            )

    def rehearse(self, model: nn.Module) -> float:
        """Write everything as at the end, read it back, remove it; return the seconds it took. All processes must call it.

        Raises:
            InputError: as `write`: on every process alike, before the first step instead of after the last.
        """
        started = time.perf_counter()
        path = self.path.with_name(REHEARSAL)
        self.write(model, path)
        if self._world.rank == 0:
            shutil.rmtree(path)
        return time.perf_counter() - started

    def write(self, model: nn.Module, path: Path | None = None) -> int:
        """Write under a temporary name, read back, compare, rename; return the bytes written. All processes must call it.

        Raises:
            InputError: it cannot be written, or holds something that is not finite.
        """
        path = path or self.path
        written = 0
        with self._world.together():
            if self._adapter is not None:
                state = full_trainable_state(model, self._world)
                if self._world.rank == 0:
                    base = self._config.model.path
                    written = save_adapter(self._skeleton, path, state=state, base=base, replace=True)
            else:
                stream = trained_tensors(model, self._world)
                try:
                    if self._world.rank == 0:
                        self._save(path, stream)
                        written = sum(file.stat().st_size for file in path.iterdir())
                finally:
                    deque(stream, maxlen=0)  # gathering takes all processes, so it goes on if writing has failed
        return written

    def _save(self, path: Path, stream: Iterator[tuple[str, Tensor]]) -> None:
        trained = set()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for item in stream:
                trained.add(item[0])
                yield item
                del item  # before the next is made
            for name, _ in self._skeleton.named_parameters():
                if name not in trained and self._base is not None:
                    yield name, self._base.read(name)

        llama.save(
            self._skeleton,
            path,
            tensors=tensors(),
            tokenizer_from=None if self._tokenizer is None else self._tokenizer.path.parent,
            max_shard_bytes=round(self._config.train.max_shard_gb * 1e9),
            replace=True,
        )
