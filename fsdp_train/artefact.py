"""What the user keeps: `adapter/` (PEFT) or `model/` (Hugging Face), rehearsed before the first step.

A model is written tensor by tensor: what trained is gathered one sharding unit at a time, and what
did not comes from the base's own files. No process ever holds a second copy of it.

With `--model.dtype auto` nothing is rounded: what trained is written as the fp32 masters it has, what
did not has the base's bits. A dtype that was asked for is that of every tensor, and the run says what
that took.
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
from fsdp_train.parallel import full_trainable_state, local_part, spread_again, trained_tensors
from fsdp_train.strategy import DTYPES, dtype_name
from fsdp_train.world import World
from llama import Llama, LlamaConfig, Tokenizer
from llama.errors import InputError
from llama.io import stored_dtype
from llama.rounding import Rounding
from llama.weight_files import Weights
from peft_impl import add_adapter, count_parameters, save_adapter

REHEARSAL = ".rehearsal"


class Artefact:
    """Where it goes, how large it is, and how it is written.

    Attributes:
        adapter: the configuration of the adapter that is kept; None where a whole model is.
    """

    def __init__(
        self, config: RunConfig, target: LlamaConfig, base: Weights | None, model: nn.Module, tokenizer: Tokenizer | None,
        directory: Path, world: World,
    ) -> None:  # fmt: skip
        """
        Args:
            config: the run's settings.
            target: the trained model's configuration.
            base: the base's files; None for random weights.
            model: before it is spread. Of one with an adapter, the adapter alone is kept.
            tokenizer: whose files go along.
            directory: the run's.
        """
        adapters = getattr(model, "adapters", None)
        adapter: Any = next(iter(adapters.configs.values())) if adapters else None
        self.adapter = adapter
        self._config, self._base, self._tokenizer, self._world = config, base, tokenizer, world
        self._trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        asked = config.model.dtype
        # Of a saved model. Adapters are fp32, as PEFT writes them, whatever the base is held in.
        self._asked = None if asked == "auto" or adapter is not None else DTYPES[asked]
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
        """The dtype of a tensor in the file: what was asked, or else the masters' where it trains, and the base's."""
        if self._asked is not None:
            return self._asked
        if name in self._trained or self._base is None:
            return torch.float32
        return stored_dtype(self._base, name)

    def _origin(self, name: str) -> str | None:
        """The tensor of the base's files that this one starts from; None where it is drawn anew."""
        if self._base is None:
            return None
        if name == "lm_head.weight" and self._base.config.ties_head:
            return "model.embed_tokens.weight"
        return name if name in self._base.shapes else None

    def size_note(self) -> str:
        """For people, before training: that what trains is kept in more bits than the base's files have for it."""
        if self.adapter is not None or self._asked is not None or self._base is None:
            return ""
        origins = [origin for name in self._trained if (origin := self._origin(name)) is not None]
        dtypes = {stored_dtype(self._base, origin) for origin in origins}
        narrow = sorted(dtype_name(dtype) for dtype in dtypes if dtype.itemsize < torch.float32.itemsize)
        if not narrow:
            return ""
        size = f"{self.expected_bytes / 1e6:,.1f} MB"
        if self.expected_bytes >= 1e9:
            size = f"{self.expected_bytes / 1e9:,.1f} GB"
        return (
            f"trained tensors are written in fp32 (base: {' and '.join(narrow)}), {size};"
            f" --model.dtype {narrow[0]} writes as the base, and rounds"
        )

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
            if self.adapter is not None:
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

    @torch.no_grad()
    def round_as_written(self, model: nn.Module) -> None:
        """Let the model hold what the file holds, so that what is measured next is measured of the file.

        Each process rounds its own part of what trained, in place; the parameters keep their dtype.
        Elementwise, so for any strategy it is what rounding the whole tensors gives.
        """
        if self._asked is None:
            return
        spread_again(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                mine = local_part(parameter)
                mine.copy_(mine.to(self._asked))

    def summary(self, checksum: str, held: torch.dtype) -> list[str]:
        """For people, on rank 0 after `write`: what became of the base's weights, and what rounding took.

        Args:
            checksum: of the frozen weights, the same before and after training.
            held: the dtype that the run had them in.
        """
        if self.adapter is not None:
            where = ""
            if self._base is not None and not all(_holds(held, dtype) for dtype in self._frozen_dtypes()):
                where = f" in the base's files, rounded to {dtype_name(held)} in this run"
            return [f"base weights: unchanged{where} (checksum {checksum} before and after)"]
        return [*self._frozen_line(), *self._rounding_lines()]

    def _frozen_dtypes(self) -> set[torch.dtype]:
        """In the base's files, of the weights that are used and do not train."""
        assert self._base is not None
        names = [name for name, _ in self._skeleton.named_parameters() if name in self._base.shapes]
        return {stored_dtype(self._base, name) for name in names if name not in self._trained}

    def _frozen_line(self) -> list[str]:
        dtypes = self._frozen_dtypes() if self._base is not None else set()
        if not dtypes:
            return []
        if self._asked is None or dtypes == {self._asked}:
            return ["frozen weights: unchanged, copied from the base's files"]
        kind = f"{dtype_name(self._asked)}, as --model.dtype asks"
        if all(_holds(self._asked, dtype) for dtype in dtypes):
            return [f"frozen weights: widened without loss to {kind}"]
        changed, count = self._frozen_changed, self._frozen_count
        return [f"frozen weights: rounded to {kind} ({changed:,} of {count:,} elements changed)"]

    def _rounding_lines(self) -> list[str]:
        if self._asked is None or _holds(self._asked, torch.float32):
            return []
        found = self._rounding
        undone = f"; {found.undone:,} of the {found.changed:,} elements that training changed are the base's again"
        line = f"trained weights: rounded to {dtype_name(self._asked)}, as --model.dtype asks: {found}"
        note = "note: --model.dtype fp32 keeps the whole update"
        return [line + undone * (found.changed > 0), *([note] if found.is_large else [])]

    def _save(self, path: Path, stream: Iterator[tuple[str, Tensor]]) -> None:
        self._rounding, self._frozen_changed, self._frozen_count = Rounding(), 0, 0

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for item in stream:
                self._count_trained(*item)
                yield item
                del item  # before the next is made
            for name, _ in self._skeleton.named_parameters():
                if name not in self._trained and self._base is not None:
                    tensor = self._base.read(name)
                    self._count_frozen(tensor)
                    yield name, tensor

        llama.save(
            self._skeleton,
            path,
            tensors=tensors(),
            tokenizer_from=None if self._tokenizer is None else self._tokenizer.path.parent,
            max_shard_bytes=round(self._config.train.max_shard_gb * 1e9),
            replace=True,
        )

    def _count_trained(self, name: str, exact: Tensor) -> None:
        if self._asked is None or _holds(self._asked, exact.dtype):
            return
        origin = self._origin(name)
        base = None if self._base is None or origin is None else self._base.read(origin)
        self._rounding.add(exact, exact.to(self._asked), base)

    def _count_frozen(self, tensor: Tensor) -> None:
        self._frozen_count += tensor.numel()
        if self._asked is not None and not _holds(self._asked, tensor.dtype):
            self._frozen_changed += int((tensor.to(self._asked).to(tensor.dtype) != tensor).sum())


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every value of `other` is one of `dtype`."""
    return torch.promote_types(dtype, other) == dtype
