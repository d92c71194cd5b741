"""Runs of the program in groups of processes, forked with everything imported."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import traceback
from collections.abc import Sequence
from pathlib import Path

from tests.combinations.case import STEPS, Job
from tests.launch import environment, spawn


def run_jobs(rank: int, log: Path, jobs: Sequence[Sequence[Job]]) -> list[str]:
    """Several rows' runs in one group of processes. Returns an error or nothing for each row."""
    import torch._dynamo as dynamo

    from fsdp_train.config import parse_config
    from fsdp_train.main import complete, fine_tune
    from fsdp_train.run import Run
    from fsdp_train.strategy import ParallelConfig
    from fsdp_train.world import World, process_group

    def once(world: World | None, job: Job) -> None:
        config = parse_config(job.flags)
        if world is None:
            fine_tune(config)
        else:
            complete(Run(config, world))

    def run(world: World | None, job: Job) -> None:
        once(world, job)
        if job.resumed:  # as if it had been killed in its last step
            if world is not None:
                world.barrier("before files are removed")
            if rank == 0:
                shutil.rmtree(job.out / "checkpoints" / f"step_{STEPS:08d}")
                for result in ("adapter", "model"):
                    shutil.rmtree(job.out / result, ignore_errors=True)
            once(world, job)

    # What is imported is no garbage, and takes a quarter of a second to look through, five times a run.
    gc.freeze()
    gc.unfreeze = lambda: None  # type: ignore[assignment]
    alone = os.environ["WORLD_SIZE"] == "1"
    if alone:  # as with `python -m`: a group of one is opened anew for each run
        for name in environment(0, 1, 0):
            os.environ.pop(name)
    found = []
    with open(f"{log}.{rank}", "w", buffering=1) as text, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(text))
        stack.enter_context(contextlib.redirect_stderr(text))
        world = None if alone else stack.enter_context(process_group(ParallelConfig()))
        for row in jobs:
            dynamo.reset()
            error, before = "", compiler_settings()
            try:
                for job in row:
                    run(world, job)
                error = f"left behind: {left}" if (left := compiler_settings() ^ before) else ""
            except Exception:
                error = traceback.format_exc()
            if world is not None:
                error = next((e for e in world.gather(error) if e), "")
            found.append(error)
            gc.collect()
    return found


def compiler_settings() -> set[tuple[str, str]]:
    """All of them, which are the process's own: a run gives them back as it found them."""
    sections = ("_dynamo", "_functorch", "_inductor")
    configs = [importlib.import_module(f"torch.{section}.config") for section in sections]
    return {(name, repr(value)) for config in configs for name, value in config.get_config_copy().items()}


def run_together(processes: int, jobs: Sequence[Sequence[Job]], directory: Path, seconds: float) -> list[str]:
    """`run_jobs`; where the group does not come to an end, each row in a group of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        found: list[str] = spawn(
            processes, run_jobs, directory / "log", jobs, tmp_path=directory, seconds=seconds * len(jobs) + 60
        )[0]
        return found
    except Exception as error:
        if len(jobs) == 1:
            return [f"{type(error).__name__}: {error}"]
    return [run_together(processes, [row], directory, seconds)[0] for row in jobs]
