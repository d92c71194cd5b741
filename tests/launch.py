"""Starting real process groups from tests: `torchrun` for the program, spawned workers for functions."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["fsdp_train.main", "torch.distributed.fsdp", "tests.oracle"]  # once, in the server that workers are forked from
SECONDS = 240  # after which a hanging job is a failure


def torchrun(processes: int, *flags: object, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node N -m fsdp_train.main FLAGS`, its output captured."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    command += ["-m", "fsdp_train.main", *map(str, flags)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # A session of its own: when the job hangs, its workers are killed with it, and the test fails with what they printed.
    job = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output = job.communicate(timeout=SECONDS)
    except BaseException as error:
        os.killpg(job.pid, signal.SIGKILL)
        output = job.communicate()
        raise AssertionError(f"{command} did not end in {SECONDS} s: {output[0]}{output[1]}") from error
    done = subprocess.CompletedProcess(command, job.returncode, *output)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def spawn(processes: int, worker: Callable[..., Any], *arguments: Any, tmp_path: Path, seconds: float = SECONDS) -> list[Any]:
    """Run `worker(rank, *arguments)` in each of N processes with torchrun's environment; return what they return, by rank.

    Workers return tensors, numbers and containers of them. A worker opens `process_group` once: a second one would meet at
    the same port, where a process that is early finds the first group's server still there, and waits for ever.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    given = (processes, free_port(), tmp_path, worker, arguments)
    context = mp.start_processes(_entry, given, nprocs=processes, join=False, start_method="forkserver")
    deadline = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{worker.__name__} did not end in {seconds} s on {processes} processes")
    return [torch.load(tmp_path / f"result_{rank}.pt", weights_only=False) for rank in range(processes)]


def _entry(
    rank: int, processes: int, port: int, tmp_path: Path, worker: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment(rank, processes, port))
    torch.save(worker(rank, *arguments), tmp_path / f"result_{rank}.pt")


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of one host."""
    numbers = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
