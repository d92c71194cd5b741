"""The program on one process is the loop that is written out in float64, method by method."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import llama
from fsdp_train.main import main
from tests.combinations.oracle import Model, Recipe, Sample, attach, train, train_base
from tests.oracle import SHAPES, randomise

STEPS, BATCH, RATE = 3, 4, 1e-3
LOSS = 2e-6  # fp32 has steps of 6e-8, relative; a loss is some 30 operations deep
WEIGHTS = 4e-3  # of the update's norm, twice the root of the gradient's error: Adam makes whole steps of gradients near zero
LORA = "--finetune.lora."
PARTIAL = ("--finetune.partial.train", "last:3", "--finetune.partial.unfreeze_every", "1")
METHODS = {
    "lora": (),
    "rslora": (LORA + "use_rslora", "true"),
    "patterns": (LORA + "rank_pattern", "v_proj=4", LORA + "alpha_pattern", "layers.0.self_attn.q_proj=4"),
    "dora": (LORA + "use_dora", "true", LORA + "target_modules", "all-linear"),
    "modules_to_save": (LORA + "modules_to_save", "norm,lm_head"),
    "llama_adapter": ("--finetune.method", "llama_adapter", "--finetune.llama_adapter.adapter_layers", "2"),
    "prefix": ("--finetune.method", "prefix"),
    "full": ("--finetune.method", "full"),
    "head, 16 more": ("--finetune.method", "head", "--finetune.head.hidden", "16"),
    "gradual": ("--finetune.method", "partial", *PARTIAL),
}
WHOLE = {"full": "", "head, 16 more": "lm_head.", "gradual": "model.layers."}  # a model is left: what trains begins so


def layer_by_layer(name: str, step: int) -> bool:
    """From the top of three decoder layers, one more in each step."""
    return int(name.split(".")[2]) >= 2 - step


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = llama.Llama(dataclasses.replace(SHAPES["gqa"]))
    randomise(model)
    path = tmp_path_factory.mktemp("oracle") / "base"
    llama.save(model, path)
    return path


def samples() -> list[Sample]:
    """Ten of 3 to 12 tokens, the first ones of which are not learned."""
    generator = torch.Generator().manual_seed(4)
    found: list[Sample] = []
    for length in torch.randint(3, 13, (10,), generator=generator).tolist():
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        found.append((ids, [-100, *ids[1:]]))
    return found


def written(out: Path) -> dict[str, Tensor]:
    return {name: tensor for path in out.glob("*/*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_program_is_the_loop_in_float64(method: str, base: Path, tmp_path: Path) -> None:
    data, rows = tmp_path / "data.jsonl", samples()
    data.write_text("".join(json.dumps({"input_ids": ids, "labels": labels}) + "\n" for ids, labels in rows))

    def run(out: str, *more: object) -> Path:
        common = [
            *("--model.path", base, "--data.path", data, "--data.format", "tokens", "--data.shuffle", "false"),
            *("--train.batch_size", BATCH, "--train.samples", 0, "--parallel.precision", "fp32", "--log.every", 1),
            *("--optim.weight_decay", 0.1, "--checkpoint.every", 0, "--train.output_dir", tmp_path / out, *METHODS[method]),
        ]
        main(list(map(str, [*common, *more])))
        return tmp_path / out

    start = run("start", "--train.max_steps", 1, "--optim.lr", 1e-30)  # what the run begins with: no weight changes
    ended = run("ended", "--train.max_steps", STEPS, "--optim.lr", RATE)

    whole = WHOLE.get(method)
    model = Model(base if whole is None else start / "model")
    if whole is None:
        trained = attach(model, start / "adapter")
    else:
        trained = train_base(model, [name for name in model.tensors if name.startswith(whole)])
    before = {name: tensor.detach().clone() for name, tensor in trained.items()}
    batches = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]  # an epoch, the last one of two samples
    recipe = Recipe(batches, RATE, weight_decay=0.1, **({"trains": layer_by_layer} if method == "gradual" else {}))
    losses, norms = train(model, trained, recipe)

    lines = [json.loads(line) for line in (ended / "metrics.jsonl").read_text().splitlines()]
    found = [(row["loss"], row["grad_norm"]) for row in lines if "loss" in row]
    assert len(found) == STEPS == len(batches)
    for (loss, norm), wanted, wanted_norm in zip(found, losses, norms, strict=True):
        assert abs(loss - wanted) < LOSS * wanted
        assert abs(norm - wanted_norm) < 10 * LOSS * wanted_norm
    tensors = written(ended)
    assert tensors.keys() == (trained if whole is None else model.tensors).keys()
    moved = sum((trained[name] - before[name]).pow(2).sum().item() for name in trained) ** 0.5
    apart = sum((trained[name] - tensors[name]).pow(2).sum().item() for name in trained) ** 0.5
    assert moved > 0
    assert apart < WEIGHTS * moved
