"""Loading a model that is never whole: each unit is read just before it is spread, with the values of an ordinary load."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llama
from fsdp_train.build import FinetuneConfig, ModelConfig, build_model, trained_names
from fsdp_train.heads import HeadConfig
from fsdp_train.parallel import frozen_checksum, full_trainable_state, place_model
from fsdp_train.strategy import ParallelConfig
from fsdp_train.units import sharding_units
from fsdp_train.world import World, process_group
from llama import LlamaConfig
from llama.weight_files import open_weights
from peft_impl import LoraConfig, PrefixTuningConfig, add_adapter, save_adapter
from tests.fsdp_train.conftest import saved_model
from tests.launch import spawn

STRATEGIES = ("ddp", "fsdp", "fsdp2")
WAYS = {
    "full": FinetuneConfig(method="full"),
    "lora": FinetuneConfig(method="lora"),
    "lora with a head": FinetuneConfig(lora=LoraConfig(modules_to_save=("lm_head",))),
    "lora with an embedding": FinetuneConfig(lora=LoraConfig(modules_to_save=("embed_tokens",))),
    "dora": FinetuneConfig(lora=LoraConfig(use_dora=True)),
    "prefix": FinetuneConfig(method="prefix", prefix=PrefixTuningConfig(num_virtual_tokens=4)),
    "deep head": FinetuneConfig(method="head", head=HeadConfig(hidden=(16,))),
}


def placed(base: Path, finetune: FinetuneConfig, strategy: str, world: World) -> dict[str, Any]:
    """Checksum and trained state of a model that is loaded as the program does it."""
    config = llama.load(base).config
    target = (
        dataclasses.replace(config, head_hidden=finetune.head.hidden, tie_word_embeddings=False)
        if finetune.head.hidden
        else config
    )
    names = trained_names(finetune, config, target)
    model, fill = build_model(open_weights(base), ModelConfig(path=str(base)), finetune, target, names, 3, torch.float32)
    on_meta = any(p.is_meta for p in model.parameters())
    model = place_model(model, ParallelConfig(strategy=strategy, precision="fp32"), world, fill)  # type: ignore[arg-type]
    assert not any(p.is_meta for p in model.parameters())
    return {
        "checksum": frozen_checksum(model, world), "state": full_trainable_state(model, world), "on meta": on_meta
    }  # fmt: skip


def everything(rank: int, bases: dict[str, Path], adapter: Path) -> dict[str, Any]:
    found = {}
    with process_group(ParallelConfig(strategy="fsdp")) as world:
        for shape, base in bases.items():
            ways = {**WAYS, "from adapter": FinetuneConfig(from_adapter=str(adapter / shape))}
            for way, finetune in ways.items():
                for strategy in STRATEGIES:
                    found[f"{shape}, {way}, {strategy}"] = placed(base, finetune, strategy, world)
    return found


def test_the_values_are_those_of_an_ordinary_load(tokenizer_dir: Path, tmp_path: Path) -> None:
    bases = {shape: saved_model(shape, tokenizer_dir, tmp_path / shape) for shape in ("gqa", "tied")}
    for shape, base in bases.items():  # an adapter with a head of its own, trained a little
        model = llama.load(base)
        add_adapter(model, LoraConfig(r=4, modules_to_save=("lm_head",)))
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        save_adapter(model, tmp_path / "adapters" / shape)
    found = spawn(2, everything, bases, tmp_path / "adapters", tmp_path=tmp_path)[0]
    for shape, base in bases.items():
        for way in (*WAYS, "from adapter"):
            wanted = ordinary(base, WAYS.get(way), tmp_path / "adapters" / shape)
            for strategy in STRATEGIES:
                one = found[f"{shape}, {way}, {strategy}"]
                assert one["on meta"] == (way != "dora"), way
                trains = {name: p for name, p in wanted.named_parameters() if p.requires_grad}
                assert one["state"].keys() == trains.keys(), (way, strategy)
                assert all(torch.equal(one["state"][name], trains[name]) for name in trains), (shape, way, strategy)
                with process_group(ParallelConfig()) as world:
                    assert one["checksum"] == frozen_checksum(wanted, world), (shape, way, strategy)


def ordinary(base: Path, finetune: FinetuneConfig | None, adapter: Path) -> nn.Module:
    """The same model, from what the libraries offer."""
    import peft_impl

    model = llama.load(base)
    if finetune is None:
        peft_impl.load_adapter(model, adapter, trainable=True)
    elif finetune.method == "head":
        llama.replace_head(model, hidden=(16,), seed=3)
        peft_impl.train_only(model, [name for name, _ in model.named_parameters() if not name.startswith("model.")])
    elif finetune.method != "full":
        add_adapter(model, getattr(finetune, finetune.method), seed=3)
    return model


# --- memory -------------------------------------------------------------------------------------------------------------


WIDE = LlamaConfig(512, 128, 344, 8, 4, 4, 64)


def alive() -> int:
    """Bytes of all tensors that Python sees, each storage once."""
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and t.device.type == "cpu" and type(t) in (torch.Tensor, nn.Parameter)
    }
    return sum(storages.values())


def most_alive(rank: int, base: Path) -> dict[str, tuple[int, int]]:
    """For each way: the most bytes alive after a unit is filled, and those of what the process keeps."""
    found = {}
    gc.freeze()  # what is there already is not looked through again and again
    with process_group(ParallelConfig(strategy="fsdp")) as world:
        for method in ("full", "lora"):
            finetune = FinetuneConfig(method=method)  # type: ignore[arg-type]
            for strategy in STRATEGIES:
                gc.collect()
                before, seen = alive(), [0]
                names = trained_names(finetune, WIDE, WIDE)
                weights, settings = open_weights(base), ModelConfig(path=str(base))
                model, fill = build_model(weights, settings, finetune, WIDE, names, 0, torch.float32)

                def watched(module: nn.Module, fill: Any = fill, seen: list[int] = seen) -> None:
                    fill(module)
                    seen.append(alive())

                config = ParallelConfig(strategy=strategy, precision="fp32")  # type: ignore[arg-type]
                model = place_model(model, config, world, watched)
                gc.collect()
                found[f"{method}, {strategy}"] = max(seen) - before, alive() - before
                del model
        world.barrier("the end")  # the first process holds the store, which the second may still be asking for a group
    return found


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_no_more_than_a_unit_is_whole(processes: int, tmp_path: Path) -> None:
    model = llama.Llama(WIDE)
    llama.save(model, tmp_path / "base")
    unit = max(sum(4 * p.numel() for p in unit.parameters()) for unit in sharding_units(model))
    whole = sum(4 * p.numel() for p in model.parameters())
    assert whole > 6 * unit
    for one in spawn(processes, most_alive, tmp_path / "base", tmp_path=tmp_path):
        for way, (most, kept) in one.items():
            shards = processes if not way.endswith("ddp") else 1
            assert kept <= whole / shards * 1.1, (way, processes)
            assert most <= whole / shards * 1.1 + (unit if shards > 1 else 0), (way, processes, most / whole)
