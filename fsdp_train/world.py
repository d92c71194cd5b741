"""The processes of a run: who this one is, the few things they say to each other, and how they all end when one fails."""

from __future__ import annotations

import datetime
import gc
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fsdp_train.strategy import ParallelConfig, chosen_strategy, replicas_and_shards
from llama.errors import InputError


class PeerError(RuntimeError):
    """Another process failed or went away; the message is what that one said first, if it said anything."""


@dataclass(frozen=True)
class World:
    """This process among all of them. With one process every collective is the identity.

    Attributes:
        quiet: a second group of the same processes (gloo, on the CPU), for what goes on beside training; None for one process.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    timeout: int = 1800
    quiet: Any = None

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all processes, in float64. Numbers are summed on the CPU, without waiting for a GPU."""
        on_device = any(isinstance(v, Tensor) for v in values)
        if self.size == 1 and not on_device:
            return [float(v) for v in values]
        device = self.device if on_device else "cpu"
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group)
        return values

    def add(self, values: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)

    def barrier(self, name: str) -> None:
        """Wait for all processes.

        Raises:
            InputError: some did not come within the timeout; the message has the barrier's name and their ranks.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(self.quiet, datetime.timedelta(seconds=self.timeout), wait_all_ranks=True)
        except RuntimeError as error:
            raise InputError(f"waited {self.timeout} s (--parallel.timeout) for all processes, {name}: {error}") from None

    @contextmanager
    def together(self, group: Any = None) -> Iterator[None]:
        """An InputError inside, on any process, is raised on all of them: they end together, with one message."""
        error = None
        try:
            yield
        except InputError as found:
            error = str(found)
        first = next((e for e in self.gather(error, group) if e is not None), None)
        if first is not None:
            raise InputError(first)

    def table(self) -> str:
        """Ranks, hosts and devices, one line each."""
        rows = self.gather((socket.gethostname(), os.getpid(), str(self.device)))
        return "\n".join(f"  rank {rank}: {host} pid {pid} {device}" for rank, (host, pid, device) in enumerate(rows))


@contextmanager
def process_group(config: ParallelConfig) -> Iterator[World]:
    """Join the processes that `torchrun` started, on the GPU if there is one; a single process needs no group, unless for FSDP.

    Raises:
        InputError: a strategy that cannot work with this number of processes, or more processes than GPUs.
        PeerError: inside, another process failed or went away.
    """
    env = os.environ
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_rank, local_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    strategy = chosen_strategy(config, size)
    replicas_and_shards(config, size, local_size)
    device = _device(local_rank, local_size)
    if config.cpu_offload and device.type == "cpu":
        raise InputError("--parallel.cpu_offload true moves shards from a GPU to the host; here there is no GPU")
    if config.activation_checkpointing == "offload" and device.type == "cpu":
        raise InputError("--parallel.activation_checkpointing offload moves activations from a GPU to the host; here is no GPU")
    if strategy == "none":
        yield World(rank, size, local_rank, local_size, device, config.timeout)
        return
    timeout = datetime.timedelta(seconds=config.timeout)
    if "WORLD_SIZE" in env:
        # torchrun keeps one store for all its restarts: without a prefix, processes meet at addresses of the ones before them.
        attempt = f"attempt {env.get('TORCHELASTIC_RESTART_COUNT', 0)} of {size}"
        store: dist.Store = dist.PrefixStore(attempt, next(rendezvous("env://", timeout=timeout))[0])
    else:  # python -m fsdp_train.main
        store = dist.HashStore()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device if device.type == "cuda" else None
    )
    quiet = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
    world = World(rank, size, local_rank, local_size, device, config.timeout, quiet)
    try:
        yield world
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise _as_all_see_it(store, world, error) from None
    finally:
        # Sharded modules refer to the group, in cycles. Only when they are gone does destroying it join gloo's threads, one of
        # which would otherwise let go of its last tensor while the interpreter ends, and abort the process.
        gc.collect()
        dist.destroy_process_group()


def _device(local_rank: int, local_size: int) -> torch.device:
    """This process's GPU; or the CPU, whose cores the processes of this host share (torchrun gives each one thread)."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, _cores() // local_size))
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(f"{local_size} processes on this host, but {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _cores() -> int:
    """Cores that this process may use (macOS does not restrict them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_LOST = ("closed by peer", "connection reset", "timed out", "timeout", "broken pipe", "connection refused")


def _as_all_see_it(store: dist.Store, world: World, error: BaseException) -> BaseException:
    """The error to end with. Only that of the process that failed first is printed (attribute `prints`).

    A process that loses another one, inside a collective, ends with the other's words; a killed one leaves none.
    """
    if world.size == 1:
        return error
    lost = isinstance(error, dist.DistError | RuntimeError) and any(words in str(error).lower() for words in _LOST)
    said = f"rank {world.rank}: {error or type(error).__name__}"
    if lost:
        time.sleep(0.5)  # the one that failed may be about to say why
        said = f"rank {world.rank} lost another process, or waited for it longer than --parallel.timeout: {error}"
    first = [said]

    def ask() -> None:
        with suppress(RuntimeError):  # the store went away with the process that held it
            first[0] = store.compare_set("first cause", "", said).decode()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(5)  # the host that is gone may be the store's, which answers no more: its own timeouts do not end this
    found = PeerError(first[0]) if lost else error
    found.prints = first[0] == said  # type: ignore[attr-defined]
    return found
