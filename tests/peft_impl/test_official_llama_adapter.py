"""Files of the official LLaMA-Adapter repository: the function of its own forward pass, and refusals."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import llama
from llama.errors import InputError
from peft_impl import LoraConfig, add_adapter, load_adapter, load_official, save_adapter, to_peft_form
from peft_impl.adapters import adapters_of
from tests.llama.meta_files import MODELS, ROWS, meta_forward, meta_tensors, write_meta
from tests.oracle import hf_model, largest
from tests.peft_impl.common import assert_same, snapshot

FP64_ROUNDING = 1e-10  # as in tests/llama/test_meta.py
IDS = torch.randint(ROWS, (2, 11), generator=torch.Generator().manual_seed(0))
LAYERS, WIDTH, HEADS = 3, 64, 8  # of the model "mha" there
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "identity": lambda gate: gate}


def official(layers: int = 2, per_head: bool = True) -> dict[str, Tensor]:
    """The tensors of such a file: prompts of length 10 for the upper `layers`, gates in all layers."""
    generator = torch.Generator().manual_seed(2)
    gates = torch.randn(LAYERS, HEADS if per_head else 1, generator=generator).expand(LAYERS, HEADS)
    return {
        "adapter_query.weight": torch.randn(10 * layers, WIDTH, generator=generator),
        **{f"layers.{i}.attention.gate": gates[i].clone().view(1, HEADS, 1, 1) for i in range(LAYERS)},
    }


def base(tmp_path: Path, dtype: torch.dtype = torch.float64) -> llama.Llama:
    directory = tmp_path / "meta"
    return llama.load(directory if directory.exists() else write_meta(directory, "mha"), dtype)


def wrapped(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the training code saves: everything, with the base's tensors and its arguments."""
    return {"model": {**tensors, **meta_tensors("mha")}, "epoch": 4, "args": argparse.Namespace(blr=9e-3)}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("form", ["plain", "wrapped"])
def test_logits_are_the_repositorys(form: str, layers: int, activation: str, tmp_path: Path) -> None:
    tensors = official(layers)
    torch.save(tensors if form == "plain" else wrapped(tensors), tmp_path / "adapter.pth")
    model = base(tmp_path)
    load_official(model, tmp_path / "adapter.pth", activation)  # type: ignore[arg-type]
    wanted = meta_forward(MODELS["mha"][0], meta_tensors("mha"), IDS, tensors, ACTIVATIONS[activation])
    assert largest(model(IDS), wanted) <= FP64_ROUNDING
    other = ACTIVATIONS["identity" if activation == "tanh" else "tanh"]
    assert largest(wanted, meta_forward(MODELS["mha"][0], meta_tensors("mha"), IDS, tensors, other)) > 1e-3
    # Our own directory keeps the form of the gates.
    save_adapter(model, tmp_path / "ours")
    again = base(tmp_path)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(again(IDS), model(IDS))
    with pytest.raises(KeyError, match="LLAMA_ADAPTER"):  # PEFT, which would compute something else, refuses it
        peft.PeftConfig.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equal_gates_become_pefts(activation: str, tmp_path: Path) -> None:
    torch.save(official(per_head=False), tmp_path / "adapter.pth")
    model = base(tmp_path, torch.float32)
    load_official(model, tmp_path / "adapter.pth", activation, trainable=True)  # type: ignore[arg-type]
    before = model(IDS)
    to_peft_form(model)
    assert largest(model(IDS), before) <= 1e-6
    assert all(p.requires_grad for n, p in model.named_parameters() if ".prompts." in n)
    save_adapter(model, tmp_path / "peft")
    llama.save(base(tmp_path, torch.float32), tmp_path / "hf")
    theirs = peft.PeftModel.from_pretrained(hf_model(tmp_path / "hf"), tmp_path / "peft").eval()
    assert largest(theirs(IDS).logits, before) <= 1e-5 * before.abs().max()


def test_different_gates_do_not(tmp_path: Path) -> None:
    torch.save(official(), tmp_path / "adapter.pth")
    model = base(tmp_path)
    load_official(model, tmp_path / "adapter.pth", "tanh")
    before, logits = snapshot(model), model(IDS)
    with pytest.raises(InputError, match=r"layer 1: gates of its heads run from .* PEFT has one gate per layer"):
        to_peft_form(model)
    assert_same(snapshot(model), before)
    assert torch.equal(model(IDS), logits)
    add_adapter(model, LoraConfig(), "lora")
    with pytest.raises(InputError, match="'lora' is no LLaMA-Adapter"):
        to_peft_form(model, "lora")


def change(**tensors: Tensor | None) -> dict[str, Tensor]:
    merged = {**official(), **{key.replace("__", "."): value for key, value in tensors.items()}}
    return {key: value for key, value in merged.items() if value is not None}


REFUSED: list[tuple[Any, str]] = [
    (change(adapter_query__weight=None), "no tensor adapter_query.weight"),
    (change(adapter_query__weight=torch.ones(25, WIDTH)), r"shape \(25, 64\); expected a multiple of adapter_len = 10 rows"),
    (change(adapter_query__weight=torch.ones(20, 32)), r"shape \(20, 32\); .*of hidden_size 64"),
    (change(adapter_query__weight=torch.ones(40, WIDTH)), "adapter_layers = 4; the model has 3 layers"),
    (change(layers__2__attention__gate=None), r"gates are not one per layer of this base: layers\.2\.attention\.gate"),
    (
        change(layers__3__attention__gate=torch.ones(1, HEADS, 1, 1)),
        r"gates are not one per layer .*layers\.3\.attention\.gate",
    ),
    (change(layers__0__attention__gate=torch.ones(1)), r"gate has shape \(1,\); expected \(1, 8, 1, 1\)"),
    (change(layers__0__attention__gate=torch.full((1, HEADS, 1, 1), torch.nan)), r"layers\.0\.attention\.gate holds NaN"),
    (change(visual_query__weight=torch.ones(1)), r"no part of LLaMA-Adapter v1: visual_query\.weight"),
    ([1, 2], "something other than a dictionary"),
    ({"adapter_query.weight": 3}, "no tensor adapter_query.weight"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "adapter.pth")
    model = base(tmp_path)
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        load_official(model, tmp_path / "adapter.pth", "tanh")
    assert_same(snapshot(model), before)
    assert not hasattr(model, "adapters")


def test_nothing_is_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({**official(), "model": Trap()}, tmp_path / "adapter.pth")
    with pytest.raises(InputError, match="damaged or holds more than tensors"):
        load_official(base(tmp_path), tmp_path / "adapter.pth", "tanh")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "adapter.pth").read_bytes()[:100])
    with pytest.raises(InputError, match=r"cut\.pth is damaged"):
        load_official(base(tmp_path), tmp_path / "cut.pth", "tanh")
    assert not (tmp_path / "executed").exists()
    assert not adapters_of(base(tmp_path)).configs
