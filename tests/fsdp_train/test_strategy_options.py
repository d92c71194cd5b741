"""What cannot work together is refused, with the reason; fp16 scales its loss as torch does; updates in backward are AdamW."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsdp_train.build import wrap_model
from fsdp_train.config import RunConfig, parse_config
from fsdp_train.data import collate
from fsdp_train.optim import InBackward, LossScaler, OptimConfig
from fsdp_train.parallel import full_trainable_state, place_model
from fsdp_train.parts import pieces
from fsdp_train.step import NonFiniteError, train_step
from fsdp_train.strategy import ParallelConfig, chosen_strategy, precision_of, replicas_and_shards
from fsdp_train.world import process_group
from llama.errors import InputError
from tests.fsdp_train.common import build, samples
from tests.launch import spawn

CPU = torch.device("cpu")
UNFREEZING = ("--finetune.method", "partial", "--finetune.partial.unfreeze_every", "5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "ddp", "sharding": "shard_grad_op"}, "sharding shard_grad_op goes with .* not with ddp"),
        ({"strategy": "fsdp", "replicas": 2}, "replicas 2 goes with .* hsdp or fsdp2, not with fsdp"),
        ({"strategy": "fsdp2", "backward_prefetch": "post"}, "backward_prefetch post goes with .*orders its gathering"),
        ({"strategy": "fsdp2", "limit_all_gathers": False}, "limit_all_gathers false goes with .*never runs ahead"),
        ({"strategy": "none", "no_sync": True}, "no_sync true goes with .* not with none"),
        ({"strategy": "none", "cpu_offload": True}, "cpu_offload true goes with .* not with none"),
        ({"strategy": "fsdp", "optimizer_in_backward": True}, "optimizer_in_backward true goes with .*the others add up"),
        ({"strategy": "fsdp", "reshard_to": 2}, "reshard_to 2 goes with --parallel.strategy fsdp2, not with fsdp"),
        ({"strategy": "ddp", "keep_last_layer": True}, "keep_last_layer true goes with"),
        ({"strategy": "ddp", "reduce_dtype": "bf16"}, "reduce_dtype bf16 goes with"),
        ({"strategy": "fsdp2", "sharding": "no_shard"}, "sharding no_shard: fsdp2 has no such form"),
        ({"strategy": "hsdp", "sharding": "no_shard"}, "sharding no_shard: hsdp has no such form"),
        ({"strategy": "fsdp2", "sharding": "shard_grad_op", "reshard_to": 2}, "reshard_to: with --parallel.sharding"),
        ({"strategy": "fsdp", "sharding": "shard_grad_op", "keep_last_layer": True}, "keep_last_layer: with"),
        ({"optimizer_in_backward": True, "precision": "fp16", "strategy": "none"}, "fp16 must see all gradients"),
        ({"replicas": -1}, "replicas -1: expected at least 1"),
        ({"reshard_to": -1}, "reshard_to -1: expected at least 1"),
        ({"timeout": 0}, "timeout 0: expected at least 1 second"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"--parallel.{message}" if not message.startswith("fp16") else message):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "processes", "per_host", "message"),
    [
        ({"strategy": "none"}, 2, 2, "none with 2 processes would train 2 models apart"),
        ({"no_sync": True}, 1, 1, "no_sync true goes with .* not with auto, which is none for one process"),
        ({"strategy": "fsdp2", "replicas": 3}, 4, 4, "replicas 3 does not divide 4 processes"),
        ({"strategy": "hsdp", "replicas": 4}, 4, 4, "one to a replica is --parallel.strategy ddp"),
        ({"strategy": "hsdp"}, 4, 4, "all 4 processes are on one host, which makes one replica"),
        ({"strategy": "fsdp2", "reshard_to": 3}, 4, 4, "reshard_to 3: expected a divisor of 4, and less than it"),
        ({"strategy": "fsdp2", "reshard_to": 4}, 4, 4, "reshard_to 4: expected a divisor of 4, and less than it"),
    ],
    ids=str,
)
def test_numbers_of_processes_that_cannot_work_are_refused(
    settings: dict[str, Any], processes: int, per_host: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        replicas_and_shards(ParallelConfig(**settings), processes, per_host)


@pytest.mark.parametrize(
    ("settings", "processes", "per_host", "expected"),
    [
        ({}, 1, 1, ("none", 1, 1)),
        ({}, 8, 8, ("fsdp", 1, 8)),
        ({"strategy": "ddp"}, 8, 4, ("ddp", 8, 1)),
        ({"strategy": "fsdp", "sharding": "no_shard"}, 8, 4, ("fsdp", 8, 1)),
        ({"strategy": "hsdp"}, 16, 8, ("hsdp", 2, 8)),  # a replica per host
        ({"strategy": "hsdp", "replicas": 4}, 16, 8, ("hsdp", 4, 4)),
        ({"strategy": "fsdp2"}, 16, 8, ("fsdp2", 1, 16)),
        ({"strategy": "fsdp2", "replicas": 16}, 16, 8, ("fsdp2", 16, 1)),
    ],
    ids=str,
)
def test_what_a_strategy_means(settings: dict[str, Any], processes: int, per_host: int, expected: tuple[str, int, int]) -> None:
    config = ParallelConfig(**settings)
    assert (chosen_strategy(config, processes), *replicas_and_shards(config, processes, per_host)) == expected


def test_precision_is_one_description() -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        found = precision_of(ParallelConfig(precision=name), CPU)  # type: ignore[arg-type]
        assert (found.param, found.reduce, found.buffer) == (dtype, torch.float32, torch.float32)
        assert found.scales_loss == (name == "fp16")
    assert precision_of(ParallelConfig(strategy="fsdp", precision="bf16", reduce_dtype="bf16"), CPU).reduce == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel.optimizer_in_backward", "true"], "needs --finetune.method full, not lora and --optim.grad_clip 0"),
        (["--parallel.no_sync", "true"], "no_sync true has no effect: --train.grad_accum is 1"),
        (["--parallel.strategy", "ddp", *UNFREEZING], "not with ddp, which settles once"),
        (["--parallel.strategy", "fsdp3"], "fsdp3"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config(flags)
    assert isinstance(parse_config([]), RunConfig)


def test_offloading_needs_a_gpu() -> None:
    config = ParallelConfig(strategy="fsdp", cpu_offload=True)
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="here there is no GPU"), process_group(config):
        pass


# --- what options do ----------------------------------------------------------------------------------------------------


WAYS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "ddp no_sync": {"strategy": "ddp", "no_sync": True},
    "fsdp": {"strategy": "fsdp"},
    "fsdp no_sync": {"strategy": "fsdp", "no_sync": True},
    "fsdp grad": {"strategy": "fsdp", "sharding": "shard_grad_op"},
    "fsdp last": {"strategy": "fsdp", "keep_last_layer": True},
    "fsdp2": {"strategy": "fsdp2"},
    "fsdp2 no_sync": {"strategy": "fsdp2", "no_sync": True},
    "fsdp2 grad": {"strategy": "fsdp2", "sharding": "shard_grad_op"},
    "fsdp2 last": {"strategy": "fsdp2", "keep_last_layer": True},
    "fsdp2 bf16": {"strategy": "fsdp2", "reduce_dtype": "bf16"},
    "fsdp bf16": {"strategy": "fsdp", "reduce_dtype": "bf16"},
}


def traffic(rank: int) -> dict[str, tuple[int, int, list[torch.dtype]]]:
    """For each way: how often units are gathered and gradients added up in a step of two micro-batches, and in which dtypes."""
    found = {}
    with process_group(ParallelConfig(strategy="fsdp")) as world:
        for name, settings in WAYS.items():
            config = ParallelConfig(precision="fp32", **settings)
            model, optimizer = wrap_model(build("full"), config, OptimConfig(), world)
            batches = [collate(samples(2, seed), world.device) for seed in (0, 1)]
            train_step(model.train(), optimizer, batches, world, 0.0, 0, no_sync=config.no_sync)
            calls = Calls()
            with calls:
                train_step(model, optimizer, batches, world, 0.0, 1, no_sync=config.no_sync)
            kind = "allreduce" if config.strategy == "ddp" else "reduce_scatter"
            reductions = [dtype for call, dtype in calls.made if kind in call and dtype != torch.float64]
            found[name] = sum("gather" in call for call, _ in calls.made), len(reductions), sorted(set(reductions), key=str)
    return found


class Calls(TorchDispatchMode):
    """Notes the collectives, with the dtype of what they carry."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensor = next(t for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            self.made.append((function.name(), tensor.dtype))
        return function(*args, **(kwargs or {}))


def test_options_do_what_they_say(tmp_path: Path) -> None:
    """Three layers, an embedding and the root; two micro-batches."""
    found = spawn(2, traffic, tmp_path=tmp_path)[0]
    gathers, reductions = ({name: one[index] for name, one in found.items()} for index in (0, 1))
    assert gathers["ddp"] == gathers["ddp no_sync"] == 0
    assert reductions["ddp"] == 2 * reductions["ddp no_sync"] > 0
    for strategy in ("fsdp", "fsdp2"):
        # A unit is gathered for forward, and again for backward; the root and what no gradient passes through stay as they are.
        assert gathers[f"{strategy} last"] == gathers[strategy] - 2  # one layer, twice
        assert gathers[f"{strategy} grad"] < gathers[f"{strategy} last"]
        assert reductions[strategy] >= 2 * 5
        assert reductions[f"{strategy} no_sync"] == reductions[strategy] // 2
        assert found[strategy][2] == [torch.float32]
        assert torch.bfloat16 in found[f"{strategy} bf16"][2]


def test_fsdp_gets_its_options() -> None:
    settings: dict[str, Any] = {"strategy": "fsdp", "precision": "fp32"}
    with process_group(ParallelConfig(strategy="fsdp")) as world:
        usual = place_model(build("full"), ParallelConfig(**settings), world)
        other = ParallelConfig(**settings, backward_prefetch="post", limit_all_gathers=False)
        changed = place_model(build("full"), other, world)
    assert (usual.backward_prefetch.name, usual.limit_all_gathers) == ("BACKWARD_PRE", True)  # type: ignore[union-attr]
    assert (changed.backward_prefetch.name, changed.limit_all_gathers) == ("BACKWARD_POST", False)  # type: ignore[union-attr]


# --- fp16 ---------------------------------------------------------------------------------------------------------------


def test_the_scale_follows_torchs_rule() -> None:
    """Against `torch.amp.GradScaler` with the same overflows."""
    ours, theirs = LossScaler(True), torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=LossScaler.INTERVAL)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for step in range(4200):
        finite = step not in (0, 1, 5, 2500)
        theirs.scale(torch.ones(()))
        parameter.grad = torch.full((2,), 1.0 if finite else math.inf)
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.scale == theirs.get_scale(), step
    again = LossScaler(True)
    again.load(ours.state())
    assert again.state() == ours.state()
    off = LossScaler(False)
    off.update(False)
    assert off.scale == 1


def fp16_steps(rank: int, strategy: str) -> dict[str, Any]:
    """A few steps in fp16, the first of which overflow: their scale is far too large."""
    with process_group(ParallelConfig(strategy=strategy)) as world:  # type: ignore[arg-type]
        model = build("lora", dtype=torch.float16)
        model.model.compute_dtype = torch.float16
        config = ParallelConfig(strategy=strategy, precision="fp16")  # type: ignore[arg-type]
        wrapped, optimizer = wrap_model(model, config, OptimConfig(lr=1e-3), world)
        scaler, results = LossScaler(True), []
        scaler.scale = 2.0**24
        before = full_trainable_state(wrapped, world)
        changed = []
        for step in range(12):
            batch = collate([samples(8)[i] for i in range(world.rank, 8, world.size)], world.device)
            results.append(train_step(wrapped.train(), optimizer, [batch], world, 1.0, step, scaler))
            now = full_trainable_state(wrapped, world)
            changed.append(any(not torch.equal(now[name], before[name]) for name in now))
            before = now
        return {"losses": [r.loss for r in results], "skipped": [r.skipped for r in results], "changed": changed,
                "scale": scaler.scale, "norms": [r.grad_norm for r in results]}  # fmt: skip


@pytest.mark.parametrize("strategy", ["none", "ddp", "fsdp", "fsdp2"])
def test_fp16_finds_its_scale_and_learns(strategy: str, tmp_path: Path) -> None:
    found = fp16_steps(0, "none") if strategy == "none" else spawn(2, fp16_steps, strategy, tmp_path=tmp_path)[0]
    skipped = found["skipped"]
    assert skipped[0]
    assert not any(skipped[skipped.index(False) :])  # too large, until it is not
    assert found["scale"] == 2.0**24 / 2 ** skipped.count(True)
    assert found["changed"] == [not s for s in skipped]
    assert found["losses"][-1] < found["losses"][0] - 0.02
    # Unscaled, the gradients are those of fp32.
    with process_group(ParallelConfig()) as world:
        model, optimizer = wrap_model(build("lora"), ParallelConfig(precision="fp32"), OptimConfig(lr=1e-3), world)
        norm = train_step(model, optimizer, [collate(samples(8), CPU)], world, 1.0, 0).grad_norm
    assert abs(found["norms"][skipped.index(False)] - norm) < 0.02 * norm  # fp16 has three digits


# --- the optimizer inside backward --------------------------------------------------------------------------------------


def in_backward(rank: int, strategy: str, inside: bool) -> dict[str, Any]:
    with process_group(ParallelConfig(strategy=strategy)) as world:  # type: ignore[arg-type]
        config = ParallelConfig(strategy=strategy, precision="fp32", optimizer_in_backward=inside)  # type: ignore[arg-type]
        model, optimizer = wrap_model(build("full"), config, OptimConfig(lr=1e-3, weight_decay=0.1), world)
        assert isinstance(optimizer, InBackward) == inside
        most = [0]
        for parameter in model.parameters():

            def count(p: nn.Parameter) -> None:
                held = sum(q.grad is not None for q in model.parameters())
                most[0] = max(most[0], held)

            parameter.register_post_accumulate_grad_hook(count)
        results = []
        for step in range(4):
            batch = collate([samples(8)[i] for i in range(world.rank, 8, world.size)], world.device)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (step + 1)
            results.append(train_step(model.train(), optimizer, [batch], world, 0.0, step))
        state = {p.name: p.of(optimizer.state[p.held]["exp_avg"]).clone() for p in pieces(model)}
        return {"losses": [(r.loss, r.grad_norm) for r in results], "after": full_trainable_state(model, world), "state": state,
                "most": most[0]}  # fmt: skip


@pytest.mark.parametrize("strategy", ["none", "fsdp2"])
def test_updates_inside_backward_are_the_same_updates(strategy: str, tmp_path: Path) -> None:
    found = []
    for inside in (True, False):
        path = tmp_path / str(inside)
        path.mkdir()
        found.append(
            in_backward(0, strategy, inside)
            if strategy == "none"
            else spawn(2, in_backward, strategy, inside, tmp_path=path)[0]
        )
    one, other = found
    for (loss, norm), (wanted, wanted_norm) in zip(one["losses"], other["losses"], strict=True):
        assert loss == wanted
        assert abs(norm - wanted_norm) < 1e-5 * wanted_norm
    assert all(torch.equal(one["after"][name], other["after"][name]) for name in other["after"])
    assert all(torch.equal(one["state"][name], other["state"][name]) for name in other["state"])
    if strategy == "none":
        assert one["most"] <= 1 < other["most"]  # gradients at once


def test_a_loss_that_is_not_finite_stops_before_any_update() -> None:
    with process_group(ParallelConfig()) as world:
        model = build("full")
        config = ParallelConfig(strategy="none", precision="fp32", optimizer_in_backward=True)
        wrapped, optimizer = wrap_model(model, config, OptimConfig(), world)
        before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
        with torch.no_grad():
            wrapped.get_parameter("model.norm.weight")[0] = before["model.norm.weight"][0] = math.nan
        with pytest.raises(NonFiniteError, match="the loss is nan"):
            train_step(wrapped, optimizer, [collate(samples(2), CPU)], world, 0.0, 0)
        assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in wrapped.named_parameters())
