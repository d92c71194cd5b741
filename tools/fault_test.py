"""Kill a training run again and again, and see whether its result is still the same to the last bit.

    python -m tools.fault_test --rounds 50

Each round starts the demo with `torchrun` on several processes, kills one of them or all (`kill -9`) at random moments, about
half of them while a checkpoint is being written, and starts it again by the very same command until it is done. A killed
process is restarted by torchrun itself (`--max-restarts`), a killed group by this program. Rounds take turns in how they begin:

    auto        in an empty directory
    none        the same, with --checkpoint.resume none
    DIR         from a checkpoint of the undisturbed run (--checkpoint.resume DIR)
    overwrite   where an unfinished run left its checkpoints (--checkpoint.overwrite true)

In every other round another run is started in the same directory meanwhile, which must be refused. The final weights and the
loss of every step must be those of an undisturbed run. Prints a table; the exit code says whether all rounds were identical.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from fsdp_train.settings import fail
from llama import InputError

EVERY = 4  # steps between checkpoints
MODES = ("auto", "none", "DIR", "overwrite")
Result = tuple[dict[str, torch.Tensor], list[tuple[int, float]]]  # trained tensors; (step, loss) of each step
SECONDS = 300  # after which a start that does not end is a failure


@dataclass
class Round:
    """What was done to one run, and what came of it."""

    number: int
    mode: str
    kills: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    second: str = ""  # how another run in the same directory was answered
    identical: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run all rounds, print their table."""
    parser = argparse.ArgumentParser(prog="python -m tools.fault_test", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=3, help="at most this many in a round (at least one)")
    parser.add_argument("--steps", type=int, default=24, help="of each run; there is a checkpoint every 4")
    parser.add_argument("--seed", type=int, default=0, help="of when and whom to kill")
    parser.add_argument("flags", nargs="*", help="more settings of the run, after --")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.processes, options.kills) < 1 or options.steps <= EVERY:
        fail(InputError(f"rounds, processes and kills: expected at least 1 each; steps: more than {EVERY}"))
    with tempfile.TemporaryDirectory(prefix="fault_test_") as directory:
        rounds = run_rounds(options, Path(directory))
    good = sum(r.identical for r in rounds)
    print(f"{good} of {len(rounds)} rounds bit-identical, {sum(len(r.kills) for r in rounds)} kills")
    sys.exit(good < len(rounds))


def run_rounds(options: argparse.Namespace, directory: Path) -> list[Round]:
    """The undisturbed run, then all rounds, a line for each."""
    chance = random.Random(options.seed)
    undisturbed = Job(options, directory / "undisturbed", ("--checkpoint.keep", 99))
    if undisturbed.start().wait(SECONDS):
        raise RuntimeError(f"the undisturbed run failed:\n{undisturbed.output()}")
    wanted = undisturbed.result()
    print(f"{'round':>5}  {'begins':<9}  {'identical':<9}  kills (resumed from step), second run", flush=True)
    rounds = []
    for number in range(1, options.rounds + 1):
        done = Round(number, MODES[(number - 1) % len(MODES)])
        job = prepared(options, directory, done, undisturbed)
        try:
            disturb(job, done, chance, chance.randint(1, options.kills))
            done.identical = _same(job.result(), wanted, EVERY if done.mode == "DIR" else 0)
        finally:
            job.kill()
        done.resumed = [int(step) for step in re.findall(r"resumed from \S+: (\d+) steps", job.output())]
        resumed = ", ".join(map(str, done.resumed)) or "none"
        answer = "yes" if done.identical else "NO"
        print(f"{number:>5}  {done.mode:<9}  {answer:<9}  {'; '.join(done.kills)} ({resumed}){done.second}", flush=True)
        rounds.append(done)
    return rounds


def prepared(options: argparse.Namespace, directory: Path, done: Round, undisturbed: Job) -> Job:
    """The round's job, and what its directory holds at the beginning."""
    checkpoint = undisturbed.out / "checkpoints" / f"step_{EVERY:08d}"
    flags: dict[str, tuple[object, ...]] = {
        "auto": (),
        "none": ("--checkpoint.resume", "none"),
        "DIR": ("--checkpoint.resume", checkpoint),
        "overwrite": ("--checkpoint.overwrite", "true"),
    }
    job = Job(options, directory / str(done.number), flags[done.mode])
    if done.mode == "overwrite":
        shutil.copytree(undisturbed.out / "checkpoints", job.out / "checkpoints")
    return job


class Job:
    """One run of the program, started as often as it takes."""

    def __init__(self, options: argparse.Namespace, directory: Path, more: Sequence[object]) -> None:
        directory.mkdir()
        self.out, self._log = directory / "out", directory / "log.txt"
        self._command = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={options.processes}", "--standalone"),
            *("--max-restarts", "3", "--monitor-interval", "0.1", "-m", "fsdp_train.main", "--train.output_dir", self.out),
            *("--train.max_steps", options.steps, "--train.batch_size", 8, "--train.exact_match", 0, "--train.samples", 0),
            *("--checkpoint.every", EVERY, "--log.every", 1, "--optim.warmup_steps", 2, *more, *options.flags),
        ]
        self.steps = options.steps
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(list(map(str, self._command)), stdout=log, stderr=log)
        return self._process

    def start_another(self) -> subprocess.Popen[str]:
        """A run of other settings in the same directory, once there is a checkpoint in it."""
        command = [sys.executable, "-m", "fsdp_train.main", "--train.output_dir", str(self.out), "--train.seed", "1"]
        command += ["--checkpoint.resume", "none"]
        return subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def kill(self) -> None:
        """Everything at once: torchrun, and the processes that it started in sessions of their own."""
        if self._process is not None and self._process.poll() is None:
            for pid in (self._process.pid, *self.workers()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Process ids of the latest start, by rank, from what the run tells about itself."""
        found = re.findall(r"rank \d+: \S+ pid (\d+) ", self.output().rpartition(" processes:\n")[2])
        return [int(pid) for pid in found]

    def starts(self) -> int:
        """How often the processes have told who they are."""
        return self.output().count(" processes:\n")

    def step(self) -> int:
        """The last step of which the run has told."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return max((int(found[1]) for line in lines if (found := re.search(r'"step": (\d+)', line))), default=0)

    def has_checkpoint(self) -> bool:
        return any((self.out / "checkpoints").glob("step_*"))

    def is_writing(self) -> bool:
        return any((self.out / "checkpoints").glob(".step_*.tmp"))

    def result(self) -> Result:
        """The trained tensors and (step, loss) of each step."""
        tensors = load_file(next(self.out.glob("*/*.safetensors")))
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return tensors, [(row["step"], row["loss"]) for row in rows if "loss" in row]


def disturb(job: Job, done: Round, chance: random.Random, kills: int) -> None:
    """Start, kill `kills` times on the way, wait for the end.

    Raises:
        RuntimeError: it ends with an error that nobody caused, or not at all.
    """
    process, starts = job.start(), 1
    another = None
    for _ in range(kills):
        while_writing, one, at = chance.random() < 0.5, chance.random() < 0.5, chance.randint(1, job.steps - 1)
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and not (
            job.starts() == starts and job.step() >= at and (job.is_writing() or not while_writing)
        ):
            if time.monotonic() > deadline:
                raise RuntimeError(f"round {done.number} hangs:\n{job.output()}")
            if done.number % 2 == 0 and another is None and job.step() > EVERY and job.has_checkpoint():
                another = job.start_another()
            time.sleep(0.002)
        if process.poll() is not None:
            break  # it was faster
        rank = chance.randrange(len(job.workers()))
        done.kills.append(f"{f'rank {rank}' if one else 'all'} at step {job.step()}{', writing' * job.is_writing()}")
        if one:
            with contextlib.suppress(ProcessLookupError):  # torchrun starts it again, unless it had just ended
                os.kill(job.workers()[rank], signal.SIGKILL)
            while process.poll() is None and job.starts() == starts and time.monotonic() < deadline:
                time.sleep(0.01)
        else:
            job.kill()
            process = job.start()
        starts += 1
    if process.wait(SECONDS):
        raise RuntimeError(f"round {done.number} failed:\n{job.output()}")
    if another is not None:
        said = another.communicate(timeout=SECONDS)[1]
        if another.returncode != 2 or said.count("\n") != 1:
            raise RuntimeError(f"round {done.number}: another run in {job.out} was not refused:\n{said}")
        done.second = ", refused: in use" if "is writing here" in said else ", refused: not its own"


def _same(one: Result, other: Result, begins: int) -> bool:
    """Whether a run that began after step `begins` is the other one from there on."""
    (a, losses), (b, wanted) = one, other
    same_losses = losses == [(step, loss) for step, loss in wanted if step > begins]
    return same_losses and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


if __name__ == "__main__":
    main()
