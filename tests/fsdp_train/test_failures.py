"""When one process fails, all of them end soon, with a non-zero exit code, and the first cause is the one thing they print."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from fsdp_train.checkpoint_files import checkpoints
from fsdp_train.data import Dataset
from fsdp_train.main import main
from fsdp_train.world import World
from llama.errors import InputError
from llama.heads import LanguageModelHead
from tests.launch import PRELOADED, environment, free_port

SOON = 40  # seconds, of which the two processes need a few to start
TIMEOUT = 4  # of --parallel.timeout, where a process does not fail but hangs


def at_call(number: int, act: Callable[[], None]) -> None:
    """Let the n-th batch of this process be something else first."""
    made, calls = Dataset.batch, []

    def batch(self: Dataset, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            act()
        return made(self, *args)

    Dataset.batch = batch  # type: ignore[method-assign]


def raise_(error: BaseException) -> None:
    raise error


def a_bad_sample() -> None:
    at_call(5, lambda: raise_(ValueError("sample 7 makes no sense")))


def a_refusal_of_one() -> None:
    at_call(5, lambda: raise_(InputError("only this process cannot go on")))


def a_loss_that_is_not_finite() -> None:
    forward, calls = LanguageModelHead.forward, []

    def broken(self: LanguageModelHead, *args: Any) -> Tensor:
        calls.append(1)
        return forward(self, *args) * (float("nan") if len(calls) == 5 else 1)

    LanguageModelHead.forward = broken  # type: ignore[method-assign]


def a_full_disk() -> None:
    def write_data(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    HuggingFaceStorageWriter.write_data = write_data  # type: ignore[method-assign]


def a_full_disk_at_the_end() -> None:
    write = Path.write_text

    def write_text(self: Path, *args: Any, **more: Any) -> int:
        if self.name == "state.json" or "state.json" in self.name:
            raise OSError(28, "No space left on device")
        return write(self, *args, **more)

    Path.write_text = write_text  # type: ignore[method-assign]


def a_directory_that_cannot_be_made() -> None:
    mkdir = Path.mkdir

    def refusing(self: Path, *args: Any, **more: Any) -> None:
        if self.name.startswith(".step_"):
            raise OSError(30, "Read-only file system")
        mkdir(self, *args, **more)

    Path.mkdir = refusing  # type: ignore[method-assign]


def a_kill() -> None:
    at_call(5, lambda: os.kill(os.getpid(), signal.SIGKILL))


def a_sleep() -> None:
    at_call(5, lambda: time.sleep(600))


def a_late_start() -> None:
    World.barrier = lambda self, name: time.sleep(600)  # type: ignore[method-assign,assignment]


CASES: dict[str, tuple[Callable[[], None], int, list[int | None], str]] = {  # what, on which rank, exit codes, what is said
    "bad sample": (a_bad_sample, 1, [1, 1], "error: ValueError: sample 7 makes no sense"),
    "bad sample on rank 0": (a_bad_sample, 0, [1, 1], "error: ValueError: sample 7 makes no sense"),
    "refusal of one": (a_refusal_of_one, 1, [1, 2], "error: only this process cannot go on"),
    "not finite": (a_loss_that_is_not_finite, 1, [3, 3], "error: step 5: the loss is nan, from the samples of rank 1: "),
    "full disk": (a_full_disk, 0, [2, 2], "No space left on device; 0.00 GB are needed, "),
    "full disk elsewhere": (a_full_disk, 1, [2, 2], "No space left on device; 0.00 GB are needed, "),
    "full disk at the end": (a_full_disk_at_the_end, 0, [2, 2], "No space left on device; 0.00 GB are needed, "),
    "no disk": (a_directory_that_cannot_be_made, 0, [2, 2], "Read-only file system; those before it are whole"),
    "killed": (a_kill, 1, [1, -9], "error: rank 0 lost another process, or waited for it longer than --parallel.timeout: "),
    "killed, rank 0": (
        a_kill,
        0,
        [-9, 1],
        "error: rank 1 lost another process, or waited for it longer than --parallel.timeout",
    ),
    "hangs": (a_sleep, 1, [1, None], "error: rank 0 lost another process, or waited for it longer than --parallel.timeout: "),
    "late": (a_late_start, 1, [2, None], f"waited {TIMEOUT} s (--parallel.timeout) for all processes, before the first step"),
}


def worker(rank: int, port: int, case: str, arguments: list[str], out: Path) -> None:
    """One process of a run whose output goes into a file."""
    os.environ.update(environment(rank, 2, port))
    # As under torchrun, whose agent holds the store: it outlives every process.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    file = os.open(out / f"stderr_{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    act, where, *_ = CASES[case]
    if rank == where:
        act()
    main(arguments)


@pytest.mark.parametrize("case", CASES)
def test_one_failure_ends_all_with_one_cause(case: str, model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    _, where, codes, said = CASES[case]
    strategy = "ddp" if "disk" in case else "fsdp"
    arguments = [
        *("--model.path", model_dir, "--data.path", alpaca_file, "--train.output_dir", tmp_path / "out"),
        *("--train.max_steps", 12, "--train.batch_size", 2, "--checkpoint.every", 2, "--train.samples", 0),
        *("--parallel.timeout", TIMEOUT if None in codes else 300, "--parallel.strategy", strategy),
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=worker, args=(rank, port, case, list(map(str, arguments)), tmp_path)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + SOON
    for process, code in zip(processes, codes, strict=True):
        if code is not None:
            process.join(max(0, deadline - time.monotonic()))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    del store
    printed = [(tmp_path / f"stderr_{rank}").read_text() for rank in range(2)]
    assert found == codes, printed
    errors = [line for text in printed for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, printed
    assert said in errors[0]
    if case.startswith("bad sample"):  # a defect of ours or of the machine: its traceback, once, from where it happened
        assert printed[where].count("Traceback") == 1
        assert printed[1 - where] == ""
    else:
        assert "Traceback" not in "".join(printed)
    # What was saved before is whole, and the same command goes on from there.
    left = [p.name for p in checkpoints(tmp_path / "out" / "checkpoints")]
    assert left[:1] == ([] if "disk" in case or "late" in case else ["step_00000002"])


# --- signals ------------------------------------------------------------------------------------------------------------


def flags(model_dir: Path, data: Path, out: Path, *more: object) -> list[str]:
    chosen = [
        *("--model.path", model_dir, "--data.path", data, "--train.output_dir", out, "--train.max_steps", 12),
        *("--train.batch_size", 4, "--checkpoint.every", 0, "--train.samples", 0, "--log.every", 1, *more),
    ]
    return list(map(str, chosen))


def rows(out: Path) -> list[tuple[float, float]]:
    return [(r["step"], r["loss"]) for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    number: signal.Signals, code: int, model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    main(flags(model_dir, alpaca_file, tmp_path / "whole"))
    at_call_of(monkeypatch, 5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, tmp_path / "cut"))
    assert stopped.value.code == code
    assert f"stopped by {number.name} after step 5; the same command" in capsys.readouterr().err
    assert [p.name for p in checkpoints(tmp_path / "cut" / "checkpoints")] == ["step_00000005"]
    monkeypatch.undo()
    main(flags(model_dir, alpaca_file, tmp_path / "cut"))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert all(torch.equal(a, weights(tmp_path / "cut")[key]) for key, a in weights(tmp_path / "whole").items())


def test_usr1_asks_for_a_checkpoint_and_no_more(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_call_of(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    main(flags(model_dir, alpaca_file, tmp_path / "out"))
    assert [p.name for p in checkpoints(tmp_path / "out" / "checkpoints")] == ["step_00000005"]
    assert len(rows(tmp_path / "out")) == 12
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL  # and signals are what they were


def at_call_of(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    patch.setattr(Dataset, "batch", Dataset.batch)  # so that it is put back
    at_call(number, act)
