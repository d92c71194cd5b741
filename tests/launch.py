"""Starting real process groups from tests: `torchrun` for the program, spawned workers for functions."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # after which a hanging job is a failure


def torchrun(processes: int, *flags: object, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node N -m fsdp_train.main FLAGS`, its output captured."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    command += ["-m", "fsdp_train.main", *map(str, flags)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def spawn(processes: int, worker: Callable[..., Any], *arguments: Any, tmp_path: Path) -> list[Any]:
    """Run `worker(rank, *arguments)` in each of N processes with torchrun's environment; return what they return, by rank.

    Workers return tensors, numbers and containers of them.
    """
    mp.spawn(_entry, (processes, free_port(), tmp_path, worker, arguments), nprocs=processes)
    return [torch.load(tmp_path / f"result_{rank}.pt", weights_only=False) for rank in range(processes)]


def _entry(
    rank: int, processes: int, port: int, tmp_path: Path, worker: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.save(worker(rank, *arguments), tmp_path / f"result_{rank}.pt")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
