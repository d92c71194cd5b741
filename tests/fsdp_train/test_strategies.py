"""Every strategy, whatever the method, trains like the plain model in a plain loop, on one process, two and four; every process
holds what the arithmetic says; and the options change nothing but how it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsdp_train.build import wrap_model
from fsdp_train.data import collate
from fsdp_train.optim import OptimConfig
from fsdp_train.order import Plan
from fsdp_train.parallel import frozen_checksum, full_trainable_state, held_bytes, local_part
from fsdp_train.parts import pieces
from fsdp_train.step import train_step
from fsdp_train.strategy import ParallelConfig, replicas_and_shards
from fsdp_train.units import shares, total_bytes
from fsdp_train.world import World, process_group
from llama import generate
from tests.fsdp_train.common import ADAPTERS, build, samples
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
OPTIONS: dict[str, dict[str, Any]] = {
    "ddp no_sync": {"strategy": "ddp", "no_sync": True},
    "fsdp no_sync": {"strategy": "fsdp", "no_sync": True},
    "fsdp2 no_sync": {"strategy": "fsdp2", "no_sync": True},
    "fsdp ahead": {"strategy": "fsdp", "backward_prefetch": "post", "limit_all_gathers": False},
    "fsdp last": {"strategy": "fsdp", "keep_last_layer": True, "backward_prefetch": "none"},
    "fsdp2 last": {"strategy": "fsdp2", "keep_last_layer": True},
    "hsdp last": {"strategy": "hsdp", "replicas": 2, "keep_last_layer": True},
    "fsdp2 partly": {"strategy": "fsdp2", "reshard_to": 2},
}
IDS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(0))
SAME = 1e-6  # relative, fp32: other orders of summation, and a gathered weight may take another kernel
COUNT, STEPS, RATE = 7, 2, 0.2  # samples in each step: uneven; plain SGD, whose steps are the gradients themselves


def sizes(model: nn.Module, config: ParallelConfig, world: World) -> dict[str, tuple[int, int, int]]:
    """Bytes of parameters, gradients and AdamW's state on this process: by the arithmetic, and counted after one step."""
    shards = replicas_and_shards(config, world.size, world.local_size)[1]
    expected = total_bytes(shares(model, shards, config.strategy == "fsdp2", world.rank % shards))
    placed, optimizer = wrap_model(model, config, OptimConfig(), world)
    inputs = collate(samples(2), world.device)
    placed(**inputs.inputs, labels=inputs.labels).backward()
    gradients = [local_part(p.grad) for p in placed.parameters() if p.grad is not None]
    optimizer.step()
    state = [local_part(v) for s in optimizer.state.values() for key, v in s.items() if key != "step"]
    counted = [held_bytes(placed), *(sum(t.numel() * t.itemsize for t in tensors) for tensors in (gradients, state))]
    return {"expected": expected, "counted": tuple(counted)}  # type: ignore[dict-item]


def trained(method: str, config: ParallelConfig, world: World) -> dict[str, Any]:
    model, _ = wrap_model(build(method), config, OptimConfig(), world)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    found: dict[str, Any] = {"checksum": frozen_checksum(model, world), "before": full_trainable_state(model, world)}
    with torch.no_grad():
        found["logits"] = model.eval()(IDS)
    found["checksum after a forward pass"] = frozen_checksum(model, world)
    found["rows"] = [(p.name, p.size, p.start, p.of(p.held.detach()).clone()) for p in pieces(model)]
    if method == "full":
        found["tokens"] = generate(model, [IDS[0, :7].tolist()], 3, fixed_steps=True)  # type: ignore[arg-type]
    plan = Plan(COUNT, 4 // world.size, 2, world.size, world.rank, 0, shuffle=True)
    results = []
    for step in range(STEPS):
        batches = [collate([samples(COUNT)[i] for i in indices], world.device) for indices in plan.micro_batches(step)]
        results.append(train_step(model.train(), optimizer, batches, world, 0.0, step, no_sync=config.no_sync))
    found["losses"] = torch.tensor([[r.loss, r.grad_norm] for r in results])
    return {**found, "after": full_trainable_state(model, world)}


def everything(rank: int, checkpointing: str, methods: list[str], options: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with process_group(ParallelConfig(strategy="fsdp")) as world:
        for name, settings in chosen(world.size, options).items():
            config = ParallelConfig(precision="fp32", activation_checkpointing=checkpointing, **settings)  # type: ignore[arg-type]
            for method in methods if name in STRATEGIES else (methods[1],):
                found[f"{name}, {method}"] = trained(method, config, world)
            for method in sized(methods, checkpointing):
                found[f"sizes of {name}, {method}"] = sizes(build(method), config, world)
    return found


def sized(methods: list[str], checkpointing: str) -> list[str]:
    """An adapter's prompt with its gate is an odd number of elements."""
    return [*methods[:2], *(["llama_adapter"] * ("llama_adapter" in methods))] if checkpointing == "none" else []


def chosen(processes: int, options: bool) -> dict[str, dict[str, Any]]:
    """A replica of FSDP has two processes at least, and only part of four is a part. Options run where they just fit."""

    def fits(settings: dict[str, Any]) -> bool:
        least = 4 if settings["strategy"] == "hsdp" or "reshard_to" in settings else settings.get("replicas", 1)
        return processes >= least and (settings in STRATEGIES.values() or processes == max(2, least))

    every = STRATEGIES | (OPTIONS if options else {})
    return {name: settings for name, settings in every.items() if fits(settings)}


def plain(method: str) -> dict[str, Any]:
    """The oracle: all samples at once, no code of the program but the model."""
    model = build(method).eval()
    found: dict[str, Any] = {"logits": model(IDS).detach(), "tokens": generate(model, [IDS[0, :7].tolist()], 3)}
    found["all"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found["before"], losses = {name: p.detach().clone() for name, p in trains.items()}, []
    model.train()
    for _ in range(STEPS):
        loss, targets = torch.zeros(()), 0
        for sample in samples(COUNT):
            ids, labels = torch.tensor(sample.ids)[None].long(), torch.tensor(sample.labels)[None].long()
            logits = model(ids)[0, :-1]
            loss = loss + nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
            targets += int((labels[0, 1:] != -100).sum())
        (loss / targets).backward()
        norm = torch.stack([p.grad.pow(2).sum() for p in trains.values() if p.grad is not None]).sum().sqrt()
        losses.append([loss.item() / targets, norm.item()])
        with torch.no_grad():
            for parameter in trains.values():
                assert parameter.grad is not None
                parameter -= RATE * parameter.grad
                parameter.grad = None
    return {**found, "losses": torch.tensor(losses), "after": {name: p.detach() for name, p in trains.items()}}


def rows_put_together(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Whole parameters, flat, out of the parts that the processes say they hold; every element must be there."""
    whole: dict[str, Tensor] = {}
    for one in found:
        for name, size, start, values in one["rows"]:
            whole.setdefault(name, torch.full((size,), float("nan")))[start : start + len(values)] = values
    return whole


CASES = [
    (1, "none", ["full", "lora"], False),
    (2, "none", ["full", *ADAPTERS], True),
    (2, "full", ["full", "lora", "prefix", "llama_adapter"], False),
    (2, "selective", ["full", "lora", "prefix"], False),
    (4, "none", ["full", "lora q,v", "prefix", "llama_adapter"], True),
]


@pytest.mark.parametrize(("processes", "checkpointing", "methods", "options"), CASES, ids=lambda v: str(v) if v != [] else "")
def test_every_strategy_trains_like_the_plain_model(
    processes: int, checkpointing: str, methods: list[str], options: bool, tmp_path: Path
) -> None:
    ranks = spawn(processes, everything, checkpointing, methods, options, tmp_path=tmp_path)
    compared = 0
    for method in methods:
        wanted = plain(method)
        with process_group(ParallelConfig()) as world:
            checksum = frozen_checksum(build(method), world)
        for strategy in chosen(processes, options):
            case = f"{strategy}, {method}"
            if case not in ranks[0]:
                continue
            found = ranks[0][case]
            assert largest(found["logits"], wanted["logits"]) <= SAME * max(1, wanted["logits"].abs().max().item()), case
            assert found["checksum"] == found["checksum after a forward pass"] == checksum, case
            assert found.get("tokens") in (None, wanted["tokens"]), case
            for moment in ("before", "after"):
                assert found[moment].keys() == wanted[moment].keys(), case
            assert all(torch.equal(found["before"][name], wanted["before"][name]) for name in wanted["before"]), case
            together = rows_put_together([one[case] for one in ranks])
            assert together.keys() == wanted["all"].keys(), case
            assert all(torch.equal(together[name], tensor.flatten()) for name, tensor in wanted["all"].items()), case
            assert largest(found["losses"], wanted["losses"]) <= SAME * max(1, wanted["losses"].max().item()), case
            worst = max(largest(found["after"][name], wanted["after"][name]) for name in wanted["after"])
            assert worst <= SAME, (case, worst)
            moved = max(largest(wanted["before"][name], wanted["after"][name]) for name in wanted["after"])
            assert moved > 1000 * SAME, case
            compared += 1
    assert compared >= len(methods) * len([s for s in STRATEGIES if s in chosen(processes, False)])
    for strategy, settings in chosen(processes, options).items():
        for method in sized(methods, checkpointing):
            check_sizes([one[f"sizes of {strategy}, {method}"] for one in ranks], build(method), settings, processes)


def check_sizes(found: list[dict[str, Any]], model: nn.Module, settings: dict[str, Any], processes: int) -> None:
    """Each process counts what the arithmetic says, and that is the whole over the processes that share it, plus padding."""
    parameters = list(model.parameters())
    trains = sum(p.numel() for p in parameters if p.requires_grad)
    whole = 4 * sum(p.numel() for p in parameters), 4 * trains, 8 * trains
    spread = settings["strategy"] != "ddp" and settings.get("sharding") != "no_shard"
    shards = processes // settings.get("replicas", 1) if spread else 1
    for one in found:
        assert one["counted"] == one["expected"], settings
    replica = [one["counted"] for one in found[:shards]]
    for kind in range(3):
        padding = sum(sizes[kind] for sizes in replica) - whole[kind]
        assert 0 <= padding <= 8 * shards * len(parameters), settings  # less than one element per unit and process
        if settings["strategy"] == "fsdp2":
            assert padding == 0  # rows are spread as they are


def test_ddp_holds_four_times_what_fsdp_holds_on_four() -> None:
    """The well-known claim, by the arithmetic that the test above proves: 16 bytes for a parameter that trains, over four."""
    model = build("full")
    alone, spread = (sum(total_bytes(shares(model, shards, by_row=False))) for shards in (1, 4))
    assert 3.9 < alone / spread <= 4
