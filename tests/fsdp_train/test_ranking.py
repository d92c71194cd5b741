"""Choosing decoder layers by their gradients: the same norms as plain autograd finds, the same choice on any processes."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fsdp_train.data import Dataset
from fsdp_train.main import main
from fsdp_train.order import Plan
from fsdp_train.parallel import local_part, place_model
from fsdp_train.partial import PartialConfig, RankedLayer, rank_layers, show_ranking
from fsdp_train.strategy import ParallelConfig
from fsdp_train.world import World, process_group
from llama import Llama
from llama.errors import InputError
from peft_impl import train_only
from tests.fsdp_train.common import build, samples
from tests.launch import spawn

NORM = 1e-5  # relative; fp32, other orders of summation
BATCH, PROBES, COUNT = 4, 3, 9  # the third batch has one sample: of two processes one has none


def data() -> Dataset:
    return Dataset(Path("x"), "tokens", {}, samples(COUNT))


def ready(shape: str = "gqa", scale: float = 1.0) -> Llama:
    """Only layers require gradients. The first has large weights, with attention too sharp to learn from."""
    model = build("full", shape)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight *= 100
        model.model.layers[0].self_attn.k_proj.weight *= 100
        for parameter in model.parameters():
            parameter *= scale
    train_only(model, [name for name, _ in model.named_parameters() if ".layers." in name])
    return model


def ranked(world: World, model: nn.Module, select: str, **parallel: Any) -> list[RankedLayer]:
    config = ParallelConfig(precision="fp32", **parallel)
    placed = place_model(model, config, world)
    plan = Plan(COUNT, BATCH // world.size, 1, world.size, world.rank, 3, shuffle=True)
    sharded = world.size > 1 or parallel.get("strategy") == "fsdp"
    before = [local_part(p.detach()).clone() for p in placed.parameters()]
    if not sharded:  # a hook that runs before the program's own

        def alone(parameter: Tensor) -> None:
            assert [p is parameter for p in placed.parameters() if p.grad is not None] == [True]

        for parameter in (p for p in placed.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(alone)
    found = rank_layers(placed, data(), plan, world, PartialConfig(select=select, probe_batches=PROBES))
    assert all(torch.equal(a, local_part(b)) for a, b in zip(before, placed.parameters(), strict=True))
    assert all(p.grad is None for p in placed.parameters())
    return found


def expected(shape: str = "gqa") -> Tensor:
    """(2, layers): root mean square over batches of the norm of the mean loss's gradient, and that over the weights' norm."""
    model, plan = ready(shape), Plan(COUNT, BATCH, 1, 1, 0, 3, shuffle=True)
    everything = samples(COUNT)
    layers = [list(layer.parameters()) for layer in model.model.layers]
    squares = torch.zeros(PROBES, len(layers), dtype=torch.float64)
    for probe in range(PROBES):
        batch = [everything[index] for index in plan.micro_batches(probe)[0]]
        logits = torch.cat([model(torch.tensor(sample.ids)[None].long())[0, :-1] for sample in batch])
        labels = torch.cat([torch.tensor(sample.labels)[1:].long() for sample in batch])
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100)  # the mean over labels
        for index, layer in enumerate(layers):
            gradients = torch.autograd.grad(loss, layer, retain_graph=True)
            squares[probe, index] = sum(g.double().pow(2).sum() for g in gradients)
    weights = torch.tensor([sum(p.detach().double().pow(2).sum() for p in layer) for layer in layers]).sqrt()
    norms = squares.mean(0).sqrt()
    return torch.stack((norms, norms / weights))


def agrees(found: list[RankedLayer], wanted: Tensor, chosen: set[int]) -> None:
    assert [row.layer for row in found] == [0, 1, 2]
    numbers = torch.tensor([[row.gradient_norm, row.relative_gradient_norm] for row in found]).double().T
    assert ((numbers - wanted).abs() <= NORM * wanted).all()
    assert {row.layer for row in found if row.trains} == chosen


def top(values: Tensor, count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda layer: -values[layer].item())[:count])


CRITERIA = ("gradient_norm", "relative_gradient_norm")


@pytest.mark.parametrize("shape", ["gqa", "tied"])
@pytest.mark.parametrize("parallel", [{}, {"strategy": "fsdp"}, {"activation_checkpointing": "full"}], ids=str)
def test_the_norms_are_those_of_plain_autograd(shape: str, parallel: dict[str, Any]) -> None:
    wanted = expected(shape)
    assert top(wanted[0], 1) != top(wanted[1], 1)  # the criteria differ here
    for values, criterion in zip(wanted, CRITERIA, strict=True):
        for count in (1, 2, 3):
            with process_group(ParallelConfig(**parallel)) as world:
                found = ranked(world, ready(shape), f"{criterion}:{count}", **parallel)
            agrees(found, wanted, top(values, count))


def on_two(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with process_group(ParallelConfig()) as world:
        for criterion in CRITERIA:
            found[criterion] = ranked(world, ready(), f"{criterion}:2")
        for strategy in ("ddp", "fsdp2"):
            found[strategy] = ranked(world, ready(), "gradient_norm:2", strategy=strategy)
        found["checkpointed"] = ranked(world, ready("tied"), "gradient_norm:1", activation_checkpointing="full")
        for name, model, select in (("many", ready(), "gradient_norm:4"), ("broken", ready(scale=1e30), "gradient_norm:2")):
            try:
                found[name] = ranked(world, model, select)
            except InputError as error:
                found[name] = str(error)
    return found


MANY = "--finetune.partial.select gradient_norm:4: the model has 3 decoder layers"
BROKEN = "--finetune.partial.select gradient_norm:2: the probe batches give gradients that are not finite"


def test_two_processes_find_the_same_and_refuse_the_same(tmp_path: Path) -> None:
    wanted = expected()
    for found in spawn(2, on_two, tmp_path=tmp_path):
        for values, criterion in zip(wanted, CRITERIA, strict=True):
            agrees(found[criterion], wanted, top(values, 2))
        for strategy in ("ddp", "fsdp2"):
            agrees(found[strategy], wanted, top(wanted[0], 2))
        agrees(found["checkpointed"], expected("tied"), top(expected("tied")[0], 1))
        assert (found["many"], found["broken"]) == (MANY, BROKEN)


@pytest.mark.parametrize(
    ("select", "scale", "message"), [("gradient_norm:4", 1.0, MANY), ("gradient_norm:2", 1e30, BROKEN)], ids=["many", "broken"]
)
def test_too_many_layers_and_gradients_that_are_not_finite_are_refused(select: str, scale: float, message: str) -> None:
    with process_group(ParallelConfig()) as world, pytest.raises(InputError, match=f"^{message}$"):
        ranked(world, ready(scale=scale), select)


def test_the_bars_are_as_long_as_the_norms() -> None:
    ranking = [RankedLayer(0, 2.0, 0.1, True), RankedLayer(1, 1.0, 0.2, False), RankedLayer(2, 0.0, 0.0, False)]
    lines = show_ranking(ranking).splitlines()
    assert [line.count("#") for line in lines] == [30, 15, 0]
    assert ["trains" in line for line in lines] == [True, False, False]
    assert show_ranking(ranking[2:]).count("#") == 0  # all of them zero


def test_a_run_trains_the_layers_that_it_chose_and_says_so(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            *("--model.path", str(model_dir), "--data.path", str(alpaca_file), "--train.output_dir", str(tmp_path / "out")),
            *("--finetune.method", "partial", "--finetune.partial.select", "gradient_norm:2", "--train.max_steps", "2"),
            *("--finetune.partial.train", "norm", "--finetune.partial.probe_batches", "2", "--train.samples", "0"),
        ]
    )  # fmt: skip
    said = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "layer_ranking.csv").read_text().splitlines()))
    assert list(rows[0]) == ["layer", "gradient_norm", "relative_gradient_norm", "trains"]
    assert [row["layer"] for row in rows] == ["0", "1", "2"]
    chosen = {int(row["layer"]) for row in rows if row["trains"] == "true"}
    assert chosen == top(torch.tensor([float(row["gradient_norm"]) for row in rows]), 2)
    assert re.findall(r"layer +(\d+) .* trains ", said) == [str(layer) for layer in sorted(chosen)]
    assert (tmp_path / "out" / "layer_ranking.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "checkpoints", "config.toml", "layer_ranking.csv", "layer_ranking.png", "metrics.jsonl", "model"
    }  # fmt: skip
    before, after = (load_file(path / "model.safetensors") for path in (model_dir, tmp_path / "out" / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if n == "model.norm.weight" or any(f".layers.{i}." in n for i in chosen)}
