"""Sharding: the same gradients however the batch is split, units that never mix, full tensors back, uneven evaluation."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from fsdp_train import parallel
from fsdp_train.build import wrap_model
from fsdp_train.data import Dataset, collate
from fsdp_train.optim import OptimConfig
from fsdp_train.order import Plan
from fsdp_train.parallel import frozen_checksum, full_trainable_state
from fsdp_train.step import train_step
from fsdp_train.strategy import ParallelConfig, Precision
from fsdp_train.train import evaluate, step_seed
from fsdp_train.units import sharding_units
from fsdp_train.world import process_group
from llama.errors import InputError
from peft_impl import count_parameters
from tests.fsdp_train.common import build, compare, samples, step_gradients, whole_batch_gradients
from tests.launch import spawn

FSDP1 = ParallelConfig(strategy="fsdp")
BF16_CURVE = 5e-3  # other batch shapes take other bf16 kernels, and each half's gradient is rounded before they are added
SPLITS = ((8, 1), (4, 2), (1, 8))  # samples per step and process x micro-batches, for 8 samples in all


def two_process_gradients(rank: int, method: str, checkpointing: str, count: int) -> list[dict[str, Tensor]]:
    with process_group(ParallelConfig()) as world:
        halves = [(batch // 2 or 1, max(1, 4 // (batch // 2 or 1))) for batch, _ in SPLITS]
        return [step_gradients(world, method, batch, accum, checkpointing, count) for batch, accum in halves]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_do_not_depend_on_the_split(method: str, tmp_path: Path) -> None:
    for count in (8, 7):  # 7: the last micro-batch is short, a process may have nothing
        expected = whole_batch_gradients(method, samples(count))
        for (batch, accum), checkpointing in zip(SPLITS, ("none", "full", "none"), strict=True):
            with process_group(ParallelConfig()) as world:
                compare(step_gradients(world, method, batch, accum, checkpointing, count), expected)
    for rows in spawn(2, two_process_gradients, method, "full", 7, tmp_path=tmp_path)[0]:
        compare(rows, expected)


def test_a_process_without_samples_takes_part() -> None:
    plan = Plan(3, 2, 2, 2, 1, 0, shuffle=False)
    assert plan.micro_batches(0) == [[2], []]
    batch = collate([], torch.device("cpu"))
    model = build("lora")
    loss = model(batch.inputs["input_ids"], batch.labels)
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# --- units --------------------------------------------------------------------------------------------------------------


def test_units_are_layers_and_maximal_trainable_modules() -> None:
    model = build("full")
    assert sharding_units(model) == [model.model.embed_tokens, *model.model.layers]
    model = build("lora")
    names = {module: name for name, module in model.named_modules()}
    found = {names[unit] for unit in sharding_units(model)}
    layers = {f"model.layers.{i}" for i in range(3)}
    leaves = {name for name in names.values() if name.endswith(".lora.default")}
    assert found == layers | leaves | {"lm_head.copies.default", "model.embed_tokens"}
    assert len(leaves) == 21
    assert not any(isinstance(unit, nn.ModuleList | nn.ModuleDict) for unit in sharding_units(model))


def shards(rank: int) -> dict[str, Any]:
    """What each process holds after sharding, and what the whole looks like from inside."""
    found: dict[str, Any] = {}
    with process_group(ParallelConfig(strategy="fsdp")) as world:
        for method in ("lora", "full"):
            model = build(method)
            trainable, total = count_parameters(model)
            plain = frozen_checksum(model, world) if world.size == 1 else None
            state = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            wrapped = parallel.shard(model, FSDP1, world, Precision(torch.float32))
            mine = {p: p.numel() for p in wrapped.parameters()}
            whole = full_trainable_state(wrapped, world)
            found[method] = {
                "trainable": trainable,
                "total": total,
                "mine trainable": sum(n for p, n in mine.items() if p.requires_grad),
                "mine": sum(mine.values()),
                "units": sum(isinstance(m, FSDP) for m in wrapped.modules()),
                "state": world.rank != 0 or (set(whole) == set(state) and all(torch.equal(whole[n], state[n]) for n in state)),
                "empty elsewhere": world.rank == 0 or not whole,
                "checksum": frozen_checksum(wrapped, world),
                "plain": plain,
            }
        # A policy of layers only leaves trained and frozen weights in one flat parameter.
        patch = pytest.MonkeyPatch()
        patch.setattr(parallel, "sharding_units", lambda model: list(model.model.layers))
        try:
            parallel.shard(build("lora"), FSDP1, world, Precision(torch.float32))
            found["bad policy"] = "accepted"
        except InputError as error:
            found["bad policy"] = str(error)
        patch.undo()
        # Uneven evaluation: 5 samples, batches of 2, on any number of processes.
        data = Dataset(Path("x"), "tokens", {}, samples(5))
        wrapped = parallel.shard(build("lora"), FSDP1, world, Precision(torch.float32))
        found["eval"] = evaluate(wrapped, data, 2, world)
    return found


def test_shards_units_and_whole_tensors(tmp_path: Path) -> None:
    one, (first, second) = shards(0), spawn(2, shards, tmp_path=tmp_path)
    for method, units in (("lora", 1 + 1 + 3 + 21 + 1), ("full", 1 + 1 + 3)):
        for found in (one, first, second):
            assert found[method]["units"] == units
            assert found[method]["state"]
            assert found[method]["empty elsewhere"]
            assert found[method]["checksum"] == one[method]["checksum"]
        halves = first[method]["mine trainable"], second[method]["mine trainable"]
        assert halves[0] == halves[1]
        padding = sum(halves) - first[method]["trainable"]
        assert 0 <= padding <= units  # at most one element per unit makes it even
        assert first[method]["mine"] + second[method]["mine"] - first[method]["total"] <= 2 * units
    assert one["lora"]["checksum"] == one["lora"]["plain"] != "0" * 16
    for found in (one, first, second):
        assert "mix trainable and frozen" in found["bad policy"]
    model, total, targets = build("lora"), 0.0, 0
    for sample in samples(5):
        with torch.no_grad():
            total += model(torch.tensor(sample.ids)[None].long(), torch.tensor(sample.labels)[None].long()).item()
        targets += int((sample.labels[1:] != -100).sum())
    for found in (one, first, second):
        assert abs(found["eval"] - total / targets) < 1e-6


def bf16_losses(rank: int) -> list[float]:
    """A bf16 base with fp32 masters beside it, trained."""
    with process_group(ParallelConfig()) as world:
        model = build("lora", dtype=torch.bfloat16)
        model.model.compute_dtype = torch.bfloat16
        wrapped, optimizer = wrap_model(model, ParallelConfig(precision="bf16"), OptimConfig(lr=2e-3), world)
        data = samples(8)
        plan = Plan(8, 4 // world.size, 2, world.size, world.rank, 0, shuffle=False)
        batches = [collate([data[i] for i in indices], world.device) for indices in plan.micro_batches(0)]
        losses = [train_step(wrapped, optimizer, batches, world, 1.0, step).loss for step in range(12)]
        assert all(p.dtype == torch.float32 for p in wrapped.parameters() if p.requires_grad)
        assert all(s.dtype == torch.float32 for state in optimizer.state.values() for s in state.values())
        assert all(p.dtype == torch.bfloat16 for p in wrapped.parameters() if not p.requires_grad)
    return losses


def dora_gradients(rank: int) -> dict[str, torch.Tensor]:
    """What a bf16 step does to DoRA's magnitudes, which stand close to one."""
    with process_group(ParallelConfig(strategy="fsdp")) as world:
        model = build("dora", dtype=torch.bfloat16)
        model.model.compute_dtype = torch.bfloat16
        wrapped = parallel.shard(model, FSDP1, world, Precision(torch.bfloat16))
        with torch.no_grad():
            return {"logits": wrapped(torch.arange(20)[None])}


def test_adapters_compute_in_fp32_where_they_do_without_sharding(tmp_path: Path) -> None:
    model = build("dora", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(torch.arange(20)[None])
    for found in spawn(2, dora_gradients, tmp_path=tmp_path):
        assert torch.equal(found["logits"], expected)


def test_the_checksum_sees_a_single_bit() -> None:
    model = build("lora", dtype=torch.bfloat16)
    with process_group(ParallelConfig()) as world:
        before = frozen_checksum(model, world)
        weight = model.model.layers[1].mlp.up_proj.weight.data.view(torch.int16)
        weight[3, 5] ^= 1
        assert frozen_checksum(model, world) != before
        weight[3, 5] ^= 1
        assert frozen_checksum(model, world) == before


def test_fp32_masters_beside_a_bf16_base(tmp_path: Path) -> None:
    one, two = bf16_losses(0), spawn(2, bf16_losses, tmp_path=tmp_path)[0]
    assert one[-1] < one[0] - 0.1
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < BF16_CURVE


def test_randomness_differs_between_steps_and_processes_and_repeats() -> None:
    seeds = [step_seed(seed, step, rank) for seed, step, rank in itertools.product(range(3), range(50), range(8))]
    assert len(set(seeds)) == len(seeds)
    assert seeds[:3] == [step_seed(0, 0, 0), step_seed(0, 0, 1), step_seed(0, 0, 2)]
