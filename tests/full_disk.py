"""A disk that is full from the n-th file operation on: what a run says then, and what the next one makes of it.

    python -m tests.full_disk                # every operation of three kinds of runs
    python -m tests.full_disk --every 10     # the suite's part: every tenth

Operations are opening a file to write, the first write into it, making a directory, and renaming, below the run's directory.
Each failure must be told in one line that names a path and what is free, and the same command given again, with room, must
end in the bits of a run that nothing disturbed and leave no file behind that such a run would not.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fsdp_train.main import main as program

DEMO = Path(__file__).resolve().parents[1] / "fsdp_train" / "demo"
RUNS = {
    "lora": ("--finetune.lora.r", 2),
    "full": ("--finetune.method", "full", "--train.max_shard_gb", 0.001),
    "partial": (
        *("--finetune.method", "partial", "--finetune.partial.select", "gradient_norm:1"),
        *("--finetune.partial.probe_batches", 1),
    ),
}
COMMON = (
    *("--model.path", DEMO / "base", "--data.path", DEMO / "train.jsonl", "--data.max_length", 64),
    *("--data.eval_fraction", 0.02, "--train.max_steps", 4, "--train.batch_size", 2),
    *("--train.eval_every", 3, "--checkpoint.every", 2, "--log.every", 1, "--train.samples", 0),
    *("--parallel.precision", "fp32"),
)


class Counted:
    """A file whose first write says so before it writes."""

    def __init__(self, file: Any, operate: Callable[[], None]) -> None:
        self._file, self._operate, self._written = file, operate, False

    def write(self, data: Any) -> int:
        if not self._written:
            self._written = True
            self._operate()
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class FullDisk:
    """File operations below a directory, counted; from number `fails_from` on each of them fails."""

    def __init__(self) -> None:
        self.directory = ""
        self.count = 0
        self.fails_from = sys.maxsize
        sys.addaudithook(self._hear)  # of the interpreter: it cannot be taken off again

    @contextlib.contextmanager
    def watching(self, directory: Path, fails_from: int = sys.maxsize) -> Iterator[None]:
        """Inside, operations below `directory` count, from 1."""
        self.directory, self.count, self.fails_from = str(directory), 0, fails_from
        kept = builtins.open, safetensors.torch.serialize_file
        builtins.open = io.open = self._open  # type: ignore[assignment]
        safetensors.torch.serialize_file = self._serialize_file  # type: ignore[assignment]
        try:
            yield
        finally:
            builtins.open, safetensors.torch.serialize_file = kept
            io.open = builtins.open  # type: ignore[assignment]
            self.directory = ""

    def _operate(self, path: Any) -> None:
        if not self.directory or not isinstance(path, str | os.PathLike):
            return
        if not os.path.abspath(path).startswith(self.directory):
            return
        self.count += 1
        if self.count >= self.fails_from:
            raise OSError(28, "No space left on device", str(path))

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            self._operate(arguments[1])
        elif event == "os.mkdir" or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self._operate(arguments[0])

    def _open(self, path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        file = _REAL_OPEN(path, mode, *args, **more)
        writes = bool(set(mode) & set("wxa+")) and isinstance(path, str | os.PathLike)
        return Counted(file, lambda: self._operate(path)) if writes else file

    def _serialize_file(self, tensors: Any, path: Any, *args: Any, **more: Any) -> None:
        try:
            self._operate(path)
        except OSError:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)") from None
        _REAL_SERIALIZE(tensors, path, *args, **more)


_REAL_OPEN = io.open
_REAL_SERIALIZE = safetensors.torch.serialize_file


def start(out: Path, kind: str) -> tuple[int, str]:
    """One start of the program: its exit code, and what it printed as an error."""
    errors = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            program(list(map(str, (*COMMON, *RUNS[kind], "--train.output_dir", out))))
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    return code, errors.getvalue()


def outcome(out: Path) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]], set[str]]:
    """What a run leaves: its tensors, (step, loss) of each step, the names of its files."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*/*.safetensors")):
        tensors |= load_file(path)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    return tensors, [(row["step"], row["loss"]) for row in rows if "loss" in row], names


def faults_of(disk: FullDisk, kind: str, number: int, wanted: Any, directory: Path) -> list[str]:
    """What is wrong with a run whose disk is full from operation `number` on, and with the next start."""
    out = directory / f"{kind}{number}"
    with disk.watching(out, number):
        code, said = start(out, kind)
    faults = []
    if code == 0:
        faults.append("exit code 0")
    if not (said.startswith("error: ") and said.count("\n") == 1 and " free there" in said):
        faults.append(f"said {said[-400:]!r}")
    if str(out) not in said:
        faults.append(f"no path in {said!r}")
    code, said = start(out, kind)
    if code:
        return [*faults, f"the next start failed: {said[-400:]!r}"]
    found, losses, names = outcome(out)
    tensors, wanted_losses, wanted_names = wanted
    if found.keys() != tensors.keys() or not all(torch.equal(found[k], tensors[k]) for k in tensors):
        faults.append("other weights")
    if losses != wanted_losses:
        faults.append("other losses")
    if names != wanted_names:
        faults.append(f"other files: {sorted(names ^ wanted_names)}")
    shutil.rmtree(out)
    return faults


def run_all(every: int, directory: Path, kinds: Sequence[str] = tuple(RUNS)) -> tuple[int, list[str]]:
    """(operations tried, the faults found), every `every`-th operation of each kind of run."""
    disk = FullDisk()
    tried, faults = 0, []
    for kind in kinds:
        out = directory / kind
        with disk.watching(out):
            code, said = start(out, kind)
        assert code == 0, said
        wanted, operations = outcome(out), disk.count
        for number in range(1, operations + 1, every):
            found = faults_of(disk, kind, number, wanted, directory)
            tried += 1
            faults += [f"{kind}, operation {number} of {operations}: {fault}" for fault in found]
    return tried, faults


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, try, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.full_disk")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=list(RUNS), choices=list(RUNS))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        tried, faults = run_all(options.every, Path(directory).resolve(), options.kinds)
    print("\n".join(faults))
    print(f"{tried} operations, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
