"""Every method under FSDP and activation checkpointing: logits, generation and every gradient of the plain model; what each
process holds; and processes whose rows go through different adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import llama
from fsdp_train import parallel
from fsdp_train.build import wrap_model
from fsdp_train.optim import OptimConfig
from fsdp_train.parallel import full_trainable_state
from fsdp_train.strategy import ParallelConfig, Precision
from fsdp_train.world import World, process_group
from llama import KVCache, Llama, generate
from llama.errors import InputError
from peft_impl import add_adapter, count_parameters, set_adapter
from tests.fsdp_train.common import (
    ADAPTERS,
    build,
    compare,
    samples,
    step_gradients,
    whole_batch_gradients,
)
from tests.launch import spawn
from tests.oracle import SHAPES, largest, randomise

IDS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))
PROMPTS = [IDS[0, :7].tolist(), IDS[1, :3].tolist()]
GRID = [(method, shape) for method in ADAPTERS for shape in ("mha", "gqa", "mqa")]
LOGITS = 1e-6  # of the largest, 8 eps of fp32: the same operations; a gathered weight may take another kernel
HALVES = (2, 2)  # of 8 samples: rows per micro-batch and process, micro-batches, for two processes


def outputs(model: Any) -> dict[str, Any]:
    """Logits with and without the cache, and what is generated with and without it."""
    with torch.no_grad():
        cache = KVCache(3, IDS.shape[1])
        parts = [model(IDS[:, :6], cache=cache), *(model(IDS[:, i : i + 1], cache=cache) for i in range(6, IDS.shape[1]))]
        logits = model(IDS)
    tokens = [generate(model, PROMPTS, 6, use_cache=use, fixed_steps=True) for use in (True, False)]
    return {"logits": logits, "cached": torch.cat(parts, 1), "tokens": tokens}


def wrapped(world: World, method: str, shape: str, checkpointing: str) -> Any:
    config = ParallelConfig(precision="fp32", activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    return wrap_model(build(method, shape), config, OptimConfig(), world)[0].eval()


def everything(rank: int, checkpointing: str) -> dict[str, Any]:
    with process_group(ParallelConfig()) as world:
        return {
            f"{method} {shape}": {
                **outputs(wrapped(world, method, shape, checkpointing)),
                "gradients": step_gradients(world, method, *HALVES, checkpointing, 7, shape),
            }
            for method, shape in GRID
        }


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_two_processes_equal_the_plain_model(checkpointing: str, tmp_path: Path) -> None:
    ranks = spawn(2, everything, checkpointing, tmp_path=tmp_path)
    for method, shape in GRID:
        plain = outputs(build(method, shape).eval())
        scale = plain["logits"].abs().max().item()
        for found in (rank[f"{method} {shape}"] for rank in ranks):
            assert largest(found["logits"], plain["logits"]) <= LOGITS * scale
            assert largest(found["cached"], plain["logits"]) <= 10 * LOGITS * scale
            assert found["tokens"] == plain["tokens"]
        assert plain["tokens"][0] == plain["tokens"][1]
        compare(ranks[0][f"{method} {shape}"]["gradients"], whole_batch_gradients(method, samples(7), shape))


@pytest.mark.parametrize(("method", "shape"), GRID)
def test_checkpointing_in_one_process_changes_no_bit(method: str, shape: str) -> None:
    with process_group(ParallelConfig()) as world:
        plain = step_gradients(world, method, 4, 2, "none", 7, shape)
        recomputed = step_gradients(world, method, 4, 2, "full", 7, shape)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    compare(plain, whole_batch_gradients(method, samples(7), shape))


# --- what each process holds --------------------------------------------------------------------------------------------


def holdings(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with process_group(ParallelConfig()) as world:
        for method in ADAPTERS:
            model = build(method)
            state = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            model, optimizer = wrap_model(model, ParallelConfig(precision="fp32"), OptimConfig(), world)
            model(IDS, IDS).backward()
            optimizer.step()
            trained = [p for p in model.parameters() if p.requires_grad]
            units = [m for m in model.modules() if isinstance(m, FSDP) and any(p.requires_grad for p in m.params)]
            found[method] = {
                "trainable": sum(p.numel() for p in state.values()),
                "units": [sum(p._unpadded_unsharded_size.numel() for p in unit.params) for unit in units],
                "parameters": sum(p.numel() for p in trained),
                "gradients": sum(p.grad.numel() for p in trained),
                "frozen gradients": sum(p.grad is not None for p in model.parameters() if not p.requires_grad),
                "states": [sum(s[key].numel() for s in optimizer.state.values()) for key in ("exp_avg", "exp_avg_sq")],
                "names": world.rank != 0 or full_trainable_state(model, world).keys() == state.keys(),
            }
            if world.rank:
                full_trainable_state(model, world)
            # A unit per layer and nothing else would hold frozen and trained weights in one flat parameter.
            patch = pytest.MonkeyPatch()
            patch.setattr(parallel, "sharding_units", lambda model: list(model.model.layers))
            try:
                parallel.shard(build(method), ParallelConfig(strategy="fsdp"), world, Precision(torch.float32))
                found[method]["bad policy"] = "accepted"
            except InputError as error:
                found[method]["bad policy"] = str(error)
            patch.undo()
    return found


def test_each_process_holds_its_part_of_what_trains(tmp_path: Path) -> None:
    """Counted: gradients and both Adam moments are as large as the trained parameters / 2, a unit of odd size rounded up."""
    for found in spawn(2, holdings, tmp_path=tmp_path):
        for method in ADAPTERS:
            held = found[method]
            assert held["trainable"] == count_parameters(build(method))[0] == sum(held["units"])
            share = sum((size + 1) // 2 for size in held["units"])
            assert (held["parameters"], held["gradients"], *held["states"]) == (share,) * 4, method
            assert 0 <= 2 * share - held["trainable"] <= len(held["units"])
            assert held["frozen gradients"] == 0
            assert held["names"]
            assert "mix trainable and frozen" in held["bad policy"], method


# --- rows that go through different adapters on different processes -----------------------------------------------------

ROWS = (["lora", "prefix", None], ["projected", "heads", "heads"])  # of rank 0, of rank 1
ROW_IDS = torch.randint(97, (6, 9), generator=torch.Generator().manual_seed(1))


def with_all() -> Llama:
    model = llama.Llama(SHAPES["gqa"])
    randomise(model)
    for name, config in ADAPTERS.items():
        add_adapter(model, config, name)
    generator = torch.Generator().manual_seed(5)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def routed(rank: int) -> dict[str, Tensor]:
    with process_group(ParallelConfig()) as world:
        config = ParallelConfig(precision="fp32", activation_checkpointing="full")
        model = wrap_model(with_all(), config, OptimConfig(), world)[0]
        before = full_trainable_state(model, world)
        set_adapter(model.module, ROWS[rank])  # type: ignore[arg-type]
        ids = ROW_IDS[3 * rank : 3 * rank + 3]
        with torch.no_grad():
            logits = model(ids)
        (model(ids, ids) * world.size).backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
        after = full_trainable_state(model, world)
        return {"logits": logits, **{name: before[name] - after[name] for name in before}}


def test_each_process_may_route_its_rows_differently(tmp_path: Path) -> None:
    first, second = spawn(2, routed, tmp_path=tmp_path)
    model = with_all()
    set_adapter(model, ROWS[0] + ROWS[1])
    logits = model(ROW_IDS)
    assert largest(torch.cat((first["logits"], second["logits"])), logits) <= LOGITS * logits.abs().max().item()
    model(ROW_IDS, ROW_IDS).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = max(1.0, parameter.grad.abs().max().item())
            assert largest(first[name], parameter.grad) <= 1e-5 * scale, name
