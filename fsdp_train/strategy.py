"""Which strategy, which precision, which options: what the settings mean, and what cannot work together. No torch.distributed.

strategy   whole model on each process   parameters spread   gradients and optimizer spread
none       yes (one process)             -                   -
ddp        yes                           -                   -
fsdp       -                             FullyShardedDataParallel; by `sharding` not the parameters, or nothing
fsdp2      -                             fully_shard; several copies with `replicas`
hsdp       one per `replicas`            FullyShardedDataParallel within a replica
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fsdp_train.settings import option
from llama.errors import InputError

SHARDED = ("fsdp", "fsdp2", "hsdp")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """As the settings call it, or as torch does what they have no name for."""
    names = {known: name for name, known in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


GOES_WITH = {  # options that only some strategies have
    "sharding": SHARDED,
    "replicas": ("hsdp", "fsdp2"),
    "reduce_dtype": SHARDED,
    "cpu_offload": SHARDED,
    "backward_prefetch": ("fsdp", "hsdp"),
    "limit_all_gathers": ("fsdp", "hsdp"),
    "no_sync": ("ddp", *SHARDED),
    "optimizer_in_backward": ("none", "fsdp2"),
    "compile": ("none", "ddp", "fsdp2"),
    "reshard_to": ("fsdp2",),
    "keep_last_layer": SHARDED,
}
_OTHERWISE = {  # what to know where one does not fit
    "backward_prefetch": "fsdp2 orders its gathering itself",
    "limit_all_gathers": "fsdp2 never runs ahead of its memory",
    "compile": "torch compiles FullyShardedDataParallel only with use_orig_params=True; fsdp2 shards the same units",
    "optimizer_in_backward": "the others add up gradients over processes only after a whole bucket or unit",
}


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread, and in which precision."""

    strategy: Literal["auto", "none", "ddp", "fsdp", "fsdp2", "hsdp"] = option(
        "auto",
        "none for one process, else fsdp, or fsdp2 with compile; ddp: whole copies; fsdp2: fully_shard; hsdp: sharded copies",
    )
    sharding: Literal["full_shard", "shard_grad_op", "no_shard"] = option(
        "full_shard", "what is spread: everything, or not the parameters between forward and backward, or nothing"
    )
    replicas: int = option(
        0, "copies of the model with hsdp or fsdp2, each spread over its own processes (0: hsdp one per host, fsdp2 one)"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "of the computation; auto: bf16 where the hardware has it; fp16 scales its loss"
    )
    reduce_dtype: Literal["fp32", "bf16", "fp16"] = option("fp32", "in which gradients are added up over processes")
    activation_checkpointing: Literal["none", "full", "selective", "offload"] = option(
        "none",
        "recompute in backward: each decoder layer (offload: its input waits in the host's memory), or (selective) all of it"
        " but matrix products and attention",
    )
    compile: bool = option(
        False, "compile each decoder layer (torch.compile): faster steps and less memory, after a slow first step"
    )
    cpu_offload: bool = option(False, "shards of parameters, gradients and optimizer state live in the host's memory")
    backward_prefetch: Literal["pre", "post", "none"] = option(
        "pre", "gather the next unit before this one's gradients (fastest), after them, or when it is needed"
    )
    limit_all_gathers: bool = option(True, "at most two units are gathered ahead; false may be faster, and takes more memory")
    no_sync: bool = option(
        False, "add up gradients over processes once a step, not once a micro-batch: less traffic, whole gradients in memory"
    )
    optimizer_in_backward: bool = option(
        False, "update a parameter as soon as its gradient is there, and free that (full fine-tuning)"
    )
    reshard_to: int = option(0, "after its forward pass a unit is spread over this many processes only (0: over all)")
    keep_last_layer: bool = option(False, "the last decoder layer stays gathered from forward to backward, which begins there")
    timeout: int = option(1800, "seconds after which a process that waits for the others gives up")

    def __post_init__(self) -> None:
        if not 1 <= self.timeout < 2**31:
            raise InputError(f"--parallel.timeout {self.timeout}: expected at least 1 second, and less than 68 years")
        for name in ("replicas", "reshard_to"):
            if getattr(self, name) < 0:
                raise InputError(f"--parallel.{name} {getattr(self, name)}: expected at least 1, or 0 for the default")
        if self.compile and self.activation_checkpointing == "offload":
            raise InputError("--parallel.compile true: compiled layers keep what they store; leave out one of it and offload")
        if self.strategy != "auto":
            self.check_options(self.strategy, self.strategy)

    def check_options(self, strategy: str, called: str) -> None:
        """Whether the options can work with a strategy.

        Args:
            strategy: any but "auto".
            called: what to call it in an error.

        Raises:
            InputError: an option that this strategy does not have.
        """
        for name, strategies in GOES_WITH.items():
            value = getattr(self, name)
            if value != getattr(ParallelConfig, name) and strategy not in strategies:
                why = f" ({_OTHERWISE[name]})" if name in _OTHERWISE else ""
                raise InputError(
                    f"--parallel.{name} {str(value).lower()} goes with"
                    f" --parallel.strategy {' or '.join(strategies)}, not with {called}{why}"
                )
        if self.sharding == "no_shard" and strategy != "fsdp":
            raise InputError(f"--parallel.sharding no_shard: {called} has no such form; --parallel.strategy ddp is the same")
        for name in ("reshard_to", "keep_last_layer"):
            if getattr(self, name) and self.sharding != "full_shard":
                raise InputError(f"--parallel.{name}: with --parallel.sharding {self.sharding} nothing is spread after forward")
        if self.optimizer_in_backward and self.precision == "fp16":
            raise InputError("--parallel.optimizer_in_backward: fp16 must see all gradients before any of them is used")


def meant_strategy(config: ParallelConfig, processes: int) -> str:
    """What the setting means for this number of processes: "auto" becomes one of the others."""
    if config.strategy != "auto":
        return config.strategy
    if processes == 1:
        return "none"
    return "fsdp2" if config.compile else "fsdp"


def called(config: ParallelConfig, processes: int) -> str:
    """The strategy for people to read: "auto" with what it has become, and why."""
    if config.strategy != "auto":
        return config.strategy
    strategy = meant_strategy(config, processes)
    if processes == 1:
        return f"auto, which is {strategy} for one process"
    compiled = " with --parallel.compile true" if config.compile else ""
    return f"auto, which is {strategy} for {processes} processes{compiled}"


def chosen_strategy(config: ParallelConfig, processes: int) -> str:
    """What "auto" means for this number of processes.

    Raises:
        InputError: the strategy cannot work with this number of processes, or an option with what "auto" means.
    """
    strategy = meant_strategy(config, processes)
    config.check_options(strategy, called(config, processes))
    if strategy == "none" and processes > 1:
        raise InputError(
            f"--parallel.strategy none with {processes} processes would train {processes} models apart; use ddp or fsdp,"
            " or start one process"
        )
    return strategy


def replicas_and_shards(config: ParallelConfig, processes: int, per_host: int) -> tuple[int, int]:
    """How many copies of the model there are, and over how many processes each is spread.

    Raises:
        InputError: numbers that do not divide.
    """
    strategy = chosen_strategy(config, processes)
    if strategy in ("none", "ddp") or config.sharding == "no_shard":
        return processes, 1
    replicas = config.replicas or (max(1, processes // per_host) if strategy == "hsdp" else 1)
    if processes % replicas:
        raise InputError(f"--parallel.replicas {replicas} does not divide {processes} processes")
    shards = processes // replicas
    if strategy == "hsdp" and shards == 1:  # FSDP would not shard, and forget to average over replicas
        raise InputError(
            f"--parallel.replicas {replicas} with {processes} processes: one to a replica is --parallel.strategy ddp"
        )
    if strategy == "hsdp" and replicas == 1:
        raise InputError(
            f"--parallel.strategy hsdp: all {processes} processes are on one host, which makes one replica; give"
            " --parallel.replicas, or --parallel.strategy fsdp"
        )
    if config.reshard_to and (config.reshard_to >= shards or shards % config.reshard_to):
        raise InputError(f"--parallel.reshard_to {config.reshard_to}: expected a divisor of {shards}, and less than it")
    return replicas, shards


@dataclass(frozen=True)
class Precision:
    """One description for all strategies: the dtype that parameters are gathered and computed in, that gradients are added up
    in, and that of buffers, which is fp32 in every preset (positions turn by wrong angles in less). Masters are fp32."""

    param: torch.dtype
    reduce: torch.dtype = torch.float32
    buffer: torch.dtype = torch.float32

    @property
    def scales_loss(self) -> bool:
        """Whether small gradients would vanish: fp16 ends at 6e-8."""
        return self.param == torch.float16


def precision_of(config: ParallelConfig, device: torch.device) -> Precision:
    """What the settings mean on this device."""
    if config.precision != "auto":
        return Precision(DTYPES[config.precision], DTYPES[config.reduce_dtype])
    fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return Precision(torch.bfloat16 if fast else torch.float32, DTYPES[config.reduce_dtype])
