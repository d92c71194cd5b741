"""Everything that knows of several processes: the process group, what is sharded, precision, checkpointing, gathering.

The only file that imports FSDP. Facts that shaped it (torch 2.11 to 2.13): on CPU FSDP wants `device_id=cpu`; one flat
parameter per unit has one `requires_grad`, hence a unit per adapter leaf; clipping and full tensors must go through FSDP.
"""

from __future__ import annotations

import datetime
import functools
import gc
import os
import socket
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import CustomPolicy

from fsdp_train.settings import option
from llama.errors import InputError
from llama.model import DecoderLayer
from peft_impl import count_parameters
from peft_impl.adapters import AdapterLeaf


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread, and in which precision."""

    strategy: Literal["auto", "none", "fsdp"] = option("auto", "auto: none for one process, fsdp for several")
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "of the computation; auto: bf16 where the hardware has it")
    activation_checkpointing: Literal["none", "full"] = option("none", "full: recompute each decoder layer in backward")
    timeout: int = option(1800, "seconds after which a process that waits for the others gives up")

    def __post_init__(self) -> None:
        if not 1 <= self.timeout < 2**31:
            raise InputError(f"--parallel.timeout {self.timeout}: expected at least 1 second, and less than 68 years")


# --- processes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among all of them. With one process every collective is the identity."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all processes, in float64."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def add(self, values: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)

    def barrier(self) -> None:
        self.sum(0.0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """An InputError inside, on any process, is raised on all of them: they end together, with one message."""
        error = None
        try:
            yield
        except InputError as found:
            error = str(found)
        first = next((e for e in self.gather(error) if e is not None), None)
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
    """
    env = os.environ
    rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    local_rank, local_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    if config.strategy == "none" and size > 1:
        raise InputError(
            f"--parallel.strategy none with {size} processes would train {size} models apart; use fsdp, or start one process"
        )
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"{local_size} processes on this host, but {torch.cuda.device_count()} GPUs; lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # torchrun sets one thread per process; share the cores of this host between its processes instead.
        torch.set_num_threads(max(1, _cores() // local_size))
    world = World(rank, size, local_rank, local_size, device)
    if chosen_strategy(config, world) == "none":
        yield world
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=config.timeout)
    if "WORLD_SIZE" in env:
        dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None)
    else:  # python -m fsdp_train.main
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield world
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # Sharded modules refer to the group, in cycles. Only when they are gone does destroying it join gloo's threads, one of
        # which would otherwise let go of its last tensor while the interpreter ends, and abort the process.
        gc.collect()
        dist.destroy_process_group()


def chosen_strategy(config: ParallelConfig, world: World) -> str:
    """What "auto" means for this number of processes."""
    if config.strategy != "auto":
        return config.strategy
    return "none" if world.size == 1 else "fsdp"


def _cores() -> int:
    """Cores that this process may use (macOS does not restrict them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """The dtype that `--parallel.precision` means on this device."""
    if config.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


# --- what is sharded ----------------------------------------------------------------------------------------------------


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """The modules that are sharded as units of their own; the root has what is left (final norm, head, a tied embedding).

    A unit is each decoder layer, the embedding, and each maximal module whose parameters all train inside a frozen parent (an
    adapter's leaf, a projection), or are all frozen inside a parent that trains (the norm beside a tied weight): trained and
    frozen parameters of one unit would share a flat parameter, whose gradient is as large as all of it.
    `ModuleList` and `ModuleDict` are never units: a unit gathers when its forward runs, and theirs never does. A weight that
    two modules share stays in the root, which is gathered for both.
    """
    owners = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    shared = {p for p, modules in owners.items() if modules > 1}
    units = []

    def visit(parent: nn.Module, unit_trains: bool) -> None:
        for child in parent.children():
            called = not isinstance(child, nn.ModuleList | nn.ModuleDict)
            required = {p.requires_grad for p in child.parameters()}
            differs = called and required == {not unit_trains}
            always = isinstance(child, DecoderLayer | nn.Embedding)
            is_unit = (always or differs) and shared.isdisjoint(child.parameters())
            if is_unit:
                units.append(child)
            visit(child, required == {True} if is_unit else unit_trains)

    visit(model, any(p.requires_grad for p in shared) or all(p.requires_grad for p in model.parameters()))
    return units


def shard(model: nn.Module, world: World, dtype: torch.dtype) -> nn.Module:
    """Wrap in `FullyShardedDataParallel`: parameters, gradients and optimizer state of each unit spread over all processes.

    Computes in `dtype`; parameters keep their own dtype in the shards (fp32 masters), gradients are reduced in fp32. An
    adapter's leaf stays in fp32 when gathered, too, and casts where it computes, as without sharding: it is small, and DoRA's
    magnitudes, near one, would lose the training to bf16.

    Raises:
        InputError: a unit would mix trainable and frozen parameters.
    """
    units = set(sharding_units(model))
    trainable, _ = count_parameters(model)
    # Inputs are left alone: the model computes in the dtype of its embedding, and labels may be numbers.
    uncast: dict[str, Any] = {"cast_forward_inputs": False, "cast_root_forward_inputs": False}
    computing = MixedPrecision(param_dtype=dtype, reduce_dtype=torch.float32, buffer_dtype=torch.float32, **uncast)
    as_stored = MixedPrecision(reduce_dtype=torch.float32, **uncast)

    def policy(module: nn.Module) -> bool | dict[str, Any]:
        if module in units and isinstance(module, AdapterLeaf):
            return {"mixed_precision": as_stored}
        return module in units

    try:
        wrapped = FSDP(
            model,
            auto_wrap_policy=CustomPolicy(policy),
            sharding_strategy=ShardingStrategy.FULL_SHARD,
            mixed_precision=computing,
            device_id=world.device,
            use_orig_params=False,
            limit_all_gathers=True,
        )
    except ValueError as error:
        if "requires_grad" not in str(error):
            raise
        raise InputError(f"a sharding unit would mix trainable and frozen parameters: {error}") from None
    flat: list[Any] = [p for p in wrapped.parameters() if p.requires_grad]
    sharded = sum(p._unpadded_unsharded_size.numel() for p in flat)
    assert sharded == trainable, f"units hold {sharded} trainable elements, the model {trainable}"
    return wrapped


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute each decoder layer in backward instead of storing its activations; call after `shard`.

    Non-reentrant: the reentrant kind needs inputs that require gradients, and a frozen embedding's output does not.
    """
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
        check_fn=lambda module: isinstance(module, DecoderLayer),
    )


# --- gradients and full tensors -----------------------------------------------------------------------------------------


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradients to a global L2 norm of at most `largest`; return the norm before, over all processes' shards."""
    if isinstance(model, FSDP):
        return model.clip_grad_norm_(largest)
    return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], largest)


_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def trained_tensors(model: nn.Module, world: World) -> Iterator[tuple[str, Tensor]]:
    """(plain name, whole tensor) of all that trains, on rank 0; the other processes exhaust it too, and get nothing.

    A unit is gathered when its turn comes, and each tensor leaves it as a copy on the CPU: memory peaks at one unit more.
    """

    def pairs(module: nn.Module, prefix: str, gathered: bool) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and "_flat_param" not in name and world.rank == 0:
                # Under FSDP the storage is freed when the unit is sharded again.
                yield plain_name(prefix + name), parameter.detach().to("cpu", copy=gathered)

    if not isinstance(model, FSDP):
        yield from pairs(model, "", False)
        return
    for name, module in model.named_modules():
        # A unit's own parameters, not those of units within it. The root comes first in any case: a unit that is gathered
        # before it would take itself for the root.
        if isinstance(module, FSDP) and (module is model or any(p.requires_grad for p in module.params)):
            with FSDP.summon_full_params(module, recurse=False, writeback=False):
                yield from pairs(module, f"{name}." if name else "", True)


def full_trainable_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Copies of all trained tensors, whole, on the CPU, by plain name; on rank 0 (elsewhere empty). All must call it."""
    return {name: tensor.clone() for name, tensor in trained_tensors(model, world)}


def frozen_checksum(model: nn.Module, world: World) -> str:
    """The sum, modulo 2^64, of the bit patterns of all frozen elements, the same for every sharding (which pads with zeros).
    Equal before and after training, or something wrote where nothing may. All processes must call it."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    mine = 0
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.numel():
            bits = parameter.detach().view(integers[parameter.element_size()])
            mine += int(bits.sum(dtype=torch.int64))
    return f"{sum(world.gather(mine)) % 2**64:016x}"
