"""Two "nodes": two torchrun agents that know of each other only what a real one's flags say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_train.main import main
from tests.launch import ROOT, SECONDS, free_port

SAME = 1e-6  # fp32: other orders of summation


def nodes(processes: int, launch: list[list[str]], flags: list[str]) -> list[str]:
    """What each agent's processes print."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    jobs = [
        subprocess.Popen(
            [*torchrun, *one, "-m", "fsdp_train.main", *flags],
            env={**os.environ, "PYTHONPATH": path}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for one in launch
    ]  # fmt: skip
    try:
        outputs = [job.communicate(timeout=SECONDS) for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    assert [job.returncode for job in jobs] == [0, 0], outputs
    return [out for out, _ in outputs]


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_nodes_are_one_process(rendezvous: str, model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    """The two rendezvous of the README; over c10d with two processes to a node, a replica of hsdp on each."""
    processes, port = (2 if rendezvous == "c10d" else 1), free_port()
    if rendezvous == "static":
        launch = [["--nnodes=2", f"--node_rank={i}", "--master_addr=127.0.0.1", f"--master_port={port}"] for i in range(2)]
    else:
        one = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint=127.0.0.1:{port}"]
        launch = [one, one]

    def flags(out: str, size: int, strategy: str) -> list[str]:
        chosen = [
            *("--model.path", model_dir, "--data.path", alpaca_file, "--train.output_dir", tmp_path / out, "--log.every", 1),
            *("--train.max_steps", 4, "--train.batch_size", 4 // size, "--parallel.precision", "fp32", "--train.samples", 0),
            *("--parallel.strategy", strategy, "--optim.lr", 1e-4),
        ]
        return list(map(str, chosen))

    size = 2 * processes
    printed = nodes(processes, launch, flags("two", size, "hsdp" if processes == 2 else "fsdp"))
    told = next(text for text in printed if "processes:" in text)  # by rank 0, wherever it is
    assert f"{size} processes:" in told
    assert f"  rank {size - 1}: " in told
    assert "hsdp over 2 processes, 2 copies of the model" in told or processes == 1
    assert [text for text in printed if text != told] == [""]
    main(flags("one", 1, "none"))
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True)) <= SAME * 6
