"""How a model is spread over processes, and how it is gathered again. The only file that imports FSDP.

Facts that shaped it (torch 2.11 to 2.13): on CPU FSDP wants `device_id=cpu`; one flat parameter per unit has one
`requires_grad`, hence a unit per adapter leaf; clipping and full tensors must go through FSDP; HYBRID_SHARD with one process
per replica does not average over replicas; `fully_shard` that keeps parameters leaves them gathered after a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fsdp_train.recompute import checkpoint_activations, compile_layers, wrappers
from fsdp_train.strategy import ParallelConfig, Precision, chosen_strategy, precision_of, replicas_and_shards
from fsdp_train.units import sharding_units
from fsdp_train.world import World
from llama.errors import InputError
from llama.model import DecoderLayer
from peft_impl import count_parameters
from peft_impl.adapters import AdapterLeaf

Fill = Callable[[nn.Module], None]  # gives a module's meta parameters their values


def nothing_to_fill(module: nn.Module) -> None:
    """A `Fill` for a model that has its values."""


def place_model(model: nn.Module, config: ParallelConfig, world: World, fill: Fill = nothing_to_fill) -> nn.Module:
    """The model on its device, spread as the settings say, its decoder layers recomputed in backward if they say so.

    Args:
        fill: called on each unit just before it is spread, so that no more than one unit is whole at a time.

    Raises:
        InputError: a unit would mix trainable and frozen parameters, or replicas that do not divide the processes.
    """
    strategy, precision = chosen_strategy(config, world.size), precision_of(config, world.device)
    kind = config.activation_checkpointing
    if strategy in ("fsdp", "hsdp"):
        model = shard(model, config, world, precision, fill)
        if kind != "none":
            checkpoint_activations(model, kind)
        return model
    if kind != "none":
        checkpoint_activations(model, kind, config.compile)
    if config.compile:
        compile_layers(model)
    if strategy == "fsdp2":
        return shard_in_place(model, config, world, precision, fill)
    fill(model)
    model = model.to(world.device)
    if strategy == "ddp" and any(p.requires_grad for p in model.parameters()):
        return Replicated(model, device_ids=[world.device] if world.device.type == "cuda" else None)
    return model


class Replicated(DistributedDataParallel):
    """A whole model on every process, gradients averaged; the model's own attributes show through, as with FSDP."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


# --- FullyShardedDataParallel -------------------------------------------------------------------------------------------


_SHARDING = {  # within one replica, and with several
    "full_shard": (ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD),
    "shard_grad_op": (ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy._HYBRID_SHARD_ZERO2),
    "no_shard": (ShardingStrategy.NO_SHARD, ShardingStrategy.NO_SHARD),
}
_PREFETCH = {"pre": BackwardPrefetch.BACKWARD_PRE, "post": BackwardPrefetch.BACKWARD_POST, "none": None}


def shard(
    model: nn.Module, config: ParallelConfig, world: World, precision: Precision, fill: Fill = nothing_to_fill
) -> nn.Module:
    """Wrap in `FullyShardedDataParallel`: parameters, gradients and optimizer state of each unit spread over processes.

    Computes in the precision's dtype; parameters keep their own dtype in the shards (fp32 masters). An adapter's leaf stays in
    fp32 when gathered, too, and casts where it computes, as without sharding: it is small, and DoRA's magnitudes, near one,
    would lose the training to bf16.

    Raises:
        InputError: a unit would mix trainable and frozen parameters.
    """
    units = set(sharding_units(model))
    last = _last_layer(model) if config.keep_last_layer else None
    trainable, _ = count_parameters(model)
    replicas, shards = replicas_and_shards(config, world.size, world.local_size)
    hybrid = chosen_strategy(config, world.size) == "hsdp"
    # Neighbours share a replica, so that it stays on one host where it can.
    mesh = init_device_mesh(world.device.type, (replicas, shards), mesh_dim_names=("replica", "shard")) if hybrid else None
    # Inputs are left alone: the model computes in the dtype of its embedding, and labels may be numbers.
    kept: dict[str, Any] = {"reduce_dtype": precision.reduce, "buffer_dtype": precision.buffer}
    kept |= {"cast_forward_inputs": False, "cast_root_forward_inputs": False}
    as_stored = MixedPrecision(**kept)

    def policy(module: nn.Module) -> bool | dict[str, Any]:
        if module in units and isinstance(module, AdapterLeaf):
            return {"mixed_precision": as_stored}
        if module is last:
            return {"sharding_strategy": _SHARDING["shard_grad_op"][hybrid]}
        return module in units

    try:
        wrapped = FSDP(
            model,
            auto_wrap_policy=CustomPolicy(policy),
            sharding_strategy=_SHARDING[config.sharding][hybrid],
            device_mesh=mesh,
            mixed_precision=MixedPrecision(param_dtype=precision.param, **kept),
            cpu_offload=CPUOffload(offload_params=True) if config.cpu_offload else None,
            backward_prefetch=_PREFETCH[config.backward_prefetch],
            limit_all_gathers=config.limit_all_gathers,
            param_init_fn=fill,
            device_id=world.device,
            use_orig_params=False,
        )
    except ValueError as error:
        if "requires_grad" not in str(error):
            raise
        raise InputError(f"a sharding unit would mix trainable and frozen parameters: {error}") from None
    flat: list[Any] = [p for p in wrapped.parameters() if p.requires_grad]
    sharded = sum(p._unpadded_unsharded_size.numel() for p in flat)
    assert sharded == trainable, f"units hold {sharded} trainable elements, the model {trainable}"
    return wrapped


def _last_layer(model: nn.Module) -> nn.Module | None:
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    return layers[-1] if layers else None


# --- fully_shard --------------------------------------------------------------------------------------------------------


def shard_in_place(
    model: nn.Module, config: ParallelConfig, world: World, precision: Precision, fill: Fill = nothing_to_fill
) -> nn.Module:
    """`fully_shard` on the same units, from the inside out: each parameter becomes a `DTensor` spread over the mesh.

    As `shard`; a unit that is recomputed in backward is sharded together with its wrapper. Parameters of a unit need not agree
    on `requires_grad` here; the units are the same all the same.
    """
    replicas, shards = replicas_and_shards(config, world.size, world.local_size)
    names = ("replica", "shard")
    mesh = init_device_mesh(world.device.type, (replicas, shards), mesh_dim_names=names)
    last, wrapper_of = _last_layer(model) if config.keep_last_layer else None, wrappers(model)
    after_forward: bool | int = config.reshard_to or config.sharding == "full_shard"
    kept: dict[str, Any] = {"reduce_dtype": precision.reduce, "cast_forward_inputs": False}
    for unit in (*reversed(sharding_units(model, whole_layers=config.compile)), model):
        fill(unit)
        # What trains beside frozen weights is gathered as it is, and cast where it computes: see `shard`.
        leaf = isinstance(unit, AdapterLeaf)
        adapted = leaf or (config.compile and unit is not model and any(isinstance(m, AdapterLeaf) for m in unit.modules()))
        computing = None if adapted else precision.param
        fully_shard(
            wrapper_of.get(unit, unit),
            mesh=mesh if replicas > 1 else mesh["shard"],
            reshard_after_forward=False if unit in (last, model) else after_forward,  # the root's backward begins at once
            mp_policy=MixedPrecisionPolicy(param_dtype=computing, **kept),
            offload_policy=CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
        )
    return model


# --- gradients ----------------------------------------------------------------------------------------------------------


@contextmanager
def gradients_stay(model: nn.Module) -> Iterator[None]:
    """Backward passes inside add to whole gradients on this process, and the first one after it adds them up over processes."""
    if isinstance(model, FSDP | Replicated):
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
        return
    yield


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale the gradients to a global L2 norm of at most `largest`; return the norm before, over all processes' shards."""
    if isinstance(model, FSDP):
        return model.clip_grad_norm_(largest)
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# --- what each process holds --------------------------------------------------------------------------------------------


def is_spread(model: nn.Module) -> bool:
    """Whether several processes (or FSDP's machinery) share the model: gradients are complete only after backward."""
    return isinstance(model, FSDP | FSDPModule | Replicated)


def sum_over_model(mine: Tensor, model: nn.Module, world: World) -> float:
    """What each process has summed over its part of the model, over the whole model, counting each element once."""
    return world.sum(mine)[0] * _holders(model, world) / world.size


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def held_bytes(model: nn.Module) -> int:
    """Bytes of parameters on this process, counted from the tensors, padding included."""
    spread_again(model)
    parts = [local_part(p) for p in model.parameters()]
    return sum(part.numel() * part.itemsize for part in parts)


def spread_again(model: nn.Module) -> None:
    """Spread again what `fully_shard` may have left gathered after a forward pass without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained_tensors(model: nn.Module, world: World) -> Iterator[tuple[str, Tensor]]:
    """(plain name, whole tensor) of all that trains, on rank 0; the other processes exhaust it too, and get nothing.

    A unit is gathered when its turn comes, and each tensor leaves it as a copy on the CPU: memory peaks at one unit more.
    """
    if isinstance(model, FSDP):
        for name, module in model.named_modules():
            # A unit's own parameters, not those of units within it. The root comes first in any case: a unit that is gathered
            # before it would take itself for the root.
            if isinstance(module, FSDP) and (module is model or any(p.requires_grad for p in module.params)):
                with FSDP.summon_full_params(module, recurse=False, writeback=False):
                    for own, parameter in module.named_parameters(name):
                        if parameter.requires_grad and "_flat_param" not in own and world.rank == 0:
                            # The storage is freed when the unit is spread again.
                            yield plain_name(own), parameter.detach().to("cpu", copy=True)
        return
    spread_again(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.detach()
            if isinstance(parameter, DTensor):
                whole = cast(DTensor, whole.to(world.device)).full_tensor()
            if world.rank == 0:
                yield plain_name(name), whole.cpu()
            del whole


def full_trainable_state(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Copies of all trained tensors, whole, on the CPU, by plain name; on rank 0 (elsewhere empty). All must call it."""
    return {name: tensor.clone() for name, tensor in trained_tensors(model, world)}


def frozen_checksum(model: nn.Module, world: World) -> str:
    """The sum, modulo 2^64, of the bit patterns of all frozen elements, the same for every sharding (which pads with zeros).
    Equal before and after training, or something wrote where nothing may. All processes must call it."""
    spread_again(model)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    mine = 0
    for parameter in model.parameters():
        part = local_part(parameter.detach())
        if not parameter.requires_grad and part.numel():
            mine += int(part.view(integers[part.element_size()]).sum(dtype=torch.int64))
    return f"{sum(world.gather(mine)[: _holders(model, world)]) % 2**64:016x}"


def _holders(model: nn.Module, world: World) -> int:
    """How many processes, from the first, hold the whole model together."""
    if isinstance(model, FSDP):
        return 1 if model.sharding_strategy == ShardingStrategy.NO_SHARD else cast(Any, model.process_group).size()
    meshes = {p.device_mesh.size(-1) for p in model.parameters() if isinstance(p, DTensor)}
    return meshes.pop() if meshes else 1
