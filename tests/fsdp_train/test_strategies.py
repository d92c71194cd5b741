"""Every strategy gives the plain model's logits and gradients, whatever the method, on two processes and on four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_train.build import wrap_model
from fsdp_train.optim import OptimConfig
from fsdp_train.parallel import frozen_checksum, full_trainable_state
from fsdp_train.strategy import ParallelConfig
from fsdp_train.world import process_group
from llama import generate
from tests.fsdp_train.common import ADAPTERS, build, compare, samples, step_gradients, whole_batch_gradients
from tests.launch import spawn
from tests.oracle import largest

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
    "fsdp grad": {"strategy": "fsdp", "sharding": "shard_grad_op"},
    "fsdp none": {"strategy": "fsdp", "sharding": "no_shard"},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2 grad": {"strategy": "fsdp2", "sharding": "shard_grad_op"},
    "hsdp": {"strategy": "hsdp", "replicas": 2},
    "hsdp grad": {"strategy": "hsdp", "replicas": 2, "sharding": "shard_grad_op"},
    "fsdp2 in replicas": {"strategy": "fsdp2", "replicas": 2},
}
METHODS = ("full", *ADAPTERS)
IDS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))
LOGITS = 1e-6  # fp32: the same operations; a gathered weight may take another kernel
COUNT = 7  # samples: uneven


def chosen(processes: int) -> dict[str, dict[str, Any]]:
    """A replica of FSDP has two processes at least."""
    return {name: s for name, s in STRATEGIES.items() if processes > 2 or s["strategy"] != "hsdp"}


def everything(rank: int, checkpointing: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with process_group(ParallelConfig(strategy="fsdp")) as world:
        for strategy, settings in chosen(world.size).items():
            for method in METHODS:
                config = ParallelConfig(precision="fp32", activation_checkpointing=checkpointing, **settings)  # type: ignore[arg-type]
                model, _ = wrap_model(build(method), config, OptimConfig(), world)
                with torch.no_grad():
                    logits = model.eval()(IDS)
                found[f"{strategy}, {method}"] = {
                    "logits": logits,
                    "tokens": generate(model, [IDS[0, :7].tolist()], 4, fixed_steps=True),  # type: ignore[arg-type]
                    "checksum": frozen_checksum(model, world),
                    "state": full_trainable_state(model, world),
                    "gradients": step_gradients(world, method, 4 // world.size, 2, checkpointing, COUNT, **settings),
                }
    return found


@pytest.mark.parametrize(("processes", "checkpointing"), [(2, "none"), (2, "full"), (4, "full")])
def test_every_strategy_equals_the_plain_model(processes: int, checkpointing: str, tmp_path: Path) -> None:
    first = spawn(processes, everything, checkpointing, tmp_path=tmp_path)[0]
    with process_group(ParallelConfig()) as world:
        for method in METHODS:
            plain = build(method).eval()
            checksum = frozen_checksum(plain, world)
            state = {name: p for name, p in plain.named_parameters() if p.requires_grad}
            gradients = whole_batch_gradients(method, samples(COUNT))
            for strategy in chosen(processes):
                found = first[f"{strategy}, {method}"]
                assert largest(found["logits"], plain(IDS)) <= LOGITS, (strategy, method)
                assert found["tokens"] == generate(plain, [IDS[0, :7].tolist()], 4), (strategy, method)
                assert found["checksum"] == checksum, (strategy, method)
                assert found["state"].keys() == state.keys(), (strategy, method)
                assert all(torch.equal(found["state"][name], state[name]) for name in state), (strategy, method)
                compare(found["gradients"], gradients)
