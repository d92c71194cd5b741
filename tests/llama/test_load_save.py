"""Hugging Face directories: read what HF writes, write what HF reads, and never leave half a directory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import llama
import llama.weight_writer
from llama import InputError, Llama
from llama.weight_files import load_pickled, open_weights
from tests.llama.common import differing, files_below, full_disk, tiny, tiny_hf, token_ids
from tests.oracle import SHAPES, STORIES, hf_model, needs_data

SMALL = 100_000  # bytes per shard: several shards for the tiny models
EVEN = dataclasses.replace(SHAPES["mha"], vocab_size=96)  # a vocabulary that two shards divide


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write_bin(model: torch.nn.Module, path: Path, shards: int = 1, zipped: bool = True) -> None:
    """The legacy layout, which today's HF reads and no longer writes."""
    path.mkdir()
    model.config.save_pretrained(path)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # old files repeat the tied weight
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # and carry tables
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return
    weight_map = {}
    for index in range(shards):
        file = f"pytorch_model-{index + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name] for name in list(state)[index::shards]}
        torch.save(part, path / file, _use_new_zipfile_serialization=zipped)
        weight_map.update(dict.fromkeys(part, file))
    index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index_file))


# reading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("shape", SHAPES)
def test_we_read_what_hf_writes(shape: str, shard_size: str, dtype: torch.dtype, tmp_path: Path) -> None:
    oracle = tiny_hf(SHAPES[shape]).to(dtype)
    oracle.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "100KB")
    ours = llama.load(tmp_path, dtype)
    assert differing(parameters(ours), parameters(oracle)) == []
    assert ours.config.tie_word_embeddings == (shape == "tied")
    assert ours.lm_head.weight.dtype == dtype


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_we_read_legacy_bin_files(shape: str, shards: int, zipped: bool, tmp_path: Path) -> None:
    oracle = tiny_hf(SHAPES[shape])
    write_bin(oracle, tmp_path / "bin", shards, zipped)
    assert differing(parameters(hf_model(tmp_path / "bin")), parameters(oracle)) == []  # HF opens what the helper writes
    assert differing(parameters(llama.load(tmp_path / "bin")), parameters(oracle)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loading_casts_like_to(dtype: torch.dtype, directories: dict[str, Path]) -> None:
    wanted = {name: tensor.to(dtype) for name, tensor in parameters(hf_model(directories["gqa"])).items()}
    assert differing(parameters(llama.load(directories["gqa"], dtype)), wanted) == []


def test_a_single_file_comes_before_an_index_as_in_hf(tmp_path: Path) -> None:
    tiny_hf(SHAPES["gqa"], seed=1).save_pretrained(tmp_path, max_shard_size="100KB")
    whole = tiny_hf(SHAPES["gqa"], seed=2)
    whole.save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path)
    assert differing(parameters(hf_model(tmp_path)), parameters(whole)) == []
    assert differing(parameters(llama.load(tmp_path)), parameters(whole)) == []


@needs_data
def test_the_real_model_is_read_to_the_bit() -> None:
    found = parameters(llama.load(STORIES))
    assert differing(found, load_file(STORIES / "model.safetensors")) == []


def test_the_loaded_model_does_not_alias_the_file(tmp_path: Path) -> None:
    """Overwriting the file in place, as a careless copy does, changes no weight."""
    oracle = tiny_hf(SHAPES["gqa"])
    oracle.save_pretrained(tmp_path / "safetensors")
    write_bin(oracle, tmp_path / "bin")
    llama.save_meta(llama.load(tmp_path / "safetensors"), tmp_path / "meta")
    for file in ("safetensors/model.safetensors", "bin/pytorch_model.bin", "meta/consolidated.00.pth"):
        model = llama.load((tmp_path / file).parent)
        with open(tmp_path / file, "r+b") as stream:
            stream.write(b"\x55" * (tmp_path / file).stat().st_size)
        assert differing(parameters(model), parameters(oracle)) == [], file


class Live(TorchDispatchMode):
    """The largest number of bytes in storages that operations have made and that are alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
        if isinstance(result, Tensor) and result.device.type == "cpu":
            storage = result.untyped_storage()
            if not any(isinstance(a, Tensor) and a.untyped_storage()._cdata == storage._cdata for a in args):  # not a view
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, sum(self.storages.values()))
        return result


@pytest.mark.parametrize("layout", ["safetensors", "bin", "meta", "meta in two shards"])
def test_loading_holds_the_model_and_one_tensor(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(EVEN)
    if layout == "safetensors":
        llama.save(model, tmp_path / "model", max_shard_bytes=SMALL)
    elif layout == "bin":
        write_bin(tiny_hf(EVEN), tmp_path / "model", shards=3)
    else:
        llama.save_meta(model, tmp_path / "model", shards=2 if "shards" in layout else 1)
    opened = open_weights(tmp_path / "model")
    monkeypatch.setattr("llama.io.open_weights", lambda path: opened)
    with Live() as live:
        llama.load(tmp_path / "model")
    sizes = [p.numel() * p.itemsize for p in model.parameters()]
    assert sum(sizes) <= live.peak <= sum(sizes) + max(sizes)


def test_opening_pickled_files_reads_no_tensor(tmp_path: Path) -> None:
    """They are mapped: what the file holds later is what the tensor shows."""
    torch.save({"x": torch.zeros(100_000)}, tmp_path / "x.pth")
    x = load_pickled(tmp_path / "x.pth")["x"]
    with open(tmp_path / "x.pth", "r+b") as stream:
        stream.write(b"\x55" * (tmp_path / "x.pth").stat().st_size)
    assert x.ne(0).all()


# writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, SMALL, 1], ids=["one file", "shards", "a shard per tensor"])
@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_hf_reads_what_we_write(shape: str, max_shard_bytes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing missing, nothing unexpected, the same bits and logits; and we read it back."""
    model = tiny(shape).to(dtype)
    llama.save(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    oracle, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype="auto", attn_implementation="sdpa", output_loading_info=True
    )
    assert {key: list(value) for key, value in report.items() if value} == {}
    assert oracle.dtype == dtype
    assert differing(parameters(oracle), parameters(model)) == []
    ids = token_ids(2, 9)
    assert torch.equal(oracle(ids).logits, model(ids))
    again = llama.load(tmp_path / "saved", dtype)
    assert differing(parameters(again), parameters(model)) == []
    assert again.config == model.config


@pytest.mark.parametrize("limit", [10**9, SMALL, 1])
def test_shards_and_index(limit: int, tmp_path: Path) -> None:
    """Every tensor once, no file beyond the limit unless one tensor is, and an index that says where."""
    model = tiny("gqa")
    llama.save(model, tmp_path / "saved", max_shard_bytes=limit)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    where: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        assert not where.keys() & tensors.keys()
        where.update(dict.fromkeys(tensors, file.name))
        assert len(tensors) == 1 or sum(t.numel() * t.itemsize for t in tensors.values()) <= limit
    assert where.keys() == parameters(model).keys()
    index = tmp_path / "saved" / "model.safetensors.index.json"
    if limit == 10**9:
        assert where == dict.fromkeys(where, "model.safetensors")
        assert not index.exists()
    else:
        assert [file.name for file in files] == [
            f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
        ]
        assert json.loads(index.read_text())["weight_map"] == where
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())


def test_a_tied_head_is_not_in_the_file(tmp_path: Path) -> None:
    for shape in ("tied", "gqa"):
        llama.save(tiny(shape), tmp_path / shape)
        assert ("lm_head.weight" in load_file(tmp_path / shape / "model.safetensors")) == (shape == "gqa")


def test_a_dtype_can_be_chosen(tmp_path: Path) -> None:
    model = tiny("gqa")
    llama.save(model, tmp_path / "saved", torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "saved" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert differing(parameters(llama.load(tmp_path / "saved", torch.bfloat16)), parameters(model.bfloat16())) == []


def test_tensors_from_elsewhere_are_written_one_at_a_time_in_any_order(tmp_path: Path) -> None:
    """Gathered shards, say; the model, on the meta device, only says which there are. None is held when the next comes."""
    wanted = parameters(tiny("tied", seed=5))
    held: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in reversed(wanted):
            assert all(reference() is None for reference in held), name
            tensor = wanted[name].clone()
            held.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    with torch.device("meta"):
        skeleton = Llama(SHAPES["tied"])
    llama.save(skeleton, tmp_path / "saved", tensors=stream(), max_shard_bytes=SMALL)
    assert len(held) == len(wanted)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert differing(parameters(llama.load(tmp_path / "saved")), wanted) == []
    assert differing(parameters(hf_model(tmp_path / "saved")), wanted) == []


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = tiny("gqa")
    own = list(parameters(model).items())
    for wrong, message in (
        (own[1:], "1 tensors to be saved are missing: model.embed_tokens.weight"),
        ([*own, own[0]], "model.embed_tokens.weight comes twice"),
        ([*own, ("model.head", own[0][1])], "model.head is no tensor of this model"),
        ([(own[0][0], own[0][1][1:]), *own[1:]], r"model.embed_tokens.weight has shape \(96, 64\); the model says \(97, 64\)"),
    ):
        with pytest.raises(InputError, match=message):
            llama.save(model, tmp_path / "saved", tensors=wrong)
        assert files_below(tmp_path) == []


def test_mixed_dtypes_keep_each_its_own(tmp_path: Path) -> None:
    model = tiny("gqa")
    model.model.norm.to(torch.float64)
    model.model.layers[0].to(torch.bfloat16)
    llama.save(model, tmp_path / "saved")
    assert differing(load_file(tmp_path / "saved" / "model.safetensors"), parameters(model)) == []
    assert differing(parameters(llama.load(tmp_path / "saved", None)), parameters(model)) == []


def test_transformers_rounds_nothing_of_several_dtypes(tmp_path: Path) -> None:
    """Without a word about the dtype it takes that of config.json, whatever the first tensor has."""
    model = tiny("gqa").to(torch.bfloat16)
    model.model.layers[1].to(torch.float32)
    for parameter in model.model.layers[1].parameters():
        parameter.data += 1e-4  # beyond what bf16 holds
    llama.save(model, tmp_path / "saved")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, parameter in opened.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.get_parameter(name).float())


@needs_data
def test_a_real_model_survives_the_round_trip(tmp_path: Path) -> None:
    llama.save(llama.load(STORIES), tmp_path / "copy", tokenizer_from=STORIES)
    assert differing(load_file(tmp_path / "copy" / "model.safetensors"), load_file(STORIES / "model.safetensors")) == []
    assert llama.load(tmp_path / "copy").config == llama.load(STORIES).config
    assert files_below(tmp_path / "copy") == ["config.json", "model.safetensors", "tokenizer.model"]
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == (STORIES / "tokenizer.model").read_bytes()
    ids = token_ids(1, 30, vocabulary=512)
    assert torch.equal(llama.load(tmp_path / "copy")(ids), hf_model(STORIES, attention="sdpa")(ids).logits)


# complete or not at all


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which no `except Exception` sees."""


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("culprit", ["weight_writer._digest", "io.write_json"])
def test_an_interrupted_save_leaves_everything_as_it_was(
    culprit: str, replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if replace:
        llama.save(tiny("gqa", seed=1), tmp_path / "saved")
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path) if (tmp_path / name).is_file()}
    module, name = sys.modules["llama." + culprit.partition(".")[0]], culprit.partition(".")[2]
    original, calls = getattr(module, name), []

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise Interrupted
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, second_fails)
    with pytest.raises(Interrupted):
        llama.save(tiny("gqa"), tmp_path / "saved", max_shard_bytes=SMALL, replace=replace)
    after = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path) if (tmp_path / name).is_file()}
    assert after == before
    assert files_below(tmp_path) == (["saved", "saved/config.json", "saved/model.safetensors"] if replace else [])


@pytest.mark.parametrize("exists", [False, True])
def test_a_failing_rename_restores_what_was_there(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if exists:
        llama.save(tiny("gqa", seed=1), tmp_path / "saved")
    before = files_below(tmp_path)
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("no space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(InputError, match=r"saved cannot be written: no space"):
        llama.save(tiny("gqa"), tmp_path / "saved", replace=True)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("save", [llama.save, llama.save_meta])
def test_a_full_disk_is_said_and_leaves_nothing(save: Callable[..., None], tmp_path: Path) -> None:
    model = tiny("gqa")
    with full_disk(), pytest.raises(InputError, match=r"saved cannot be written: .*File too large"):
        save(model, tmp_path / "saved")
    assert files_below(tmp_path) == []
    save(model, tmp_path / "saved")


def test_damage_on_the_way_to_the_disk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flips_a_bit(path: Path, framework: str) -> Any:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return safe_open(path, framework)

    monkeypatch.setattr(llama.weight_writer, "safe_open", flips_a_bit)
    with pytest.raises(
        InputError, match=r"saved cannot be written: model\.safetensors: \S+ was not written as it is in memory"
    ):
        llama.save(tiny("gqa"), tmp_path / "saved")
    assert files_below(tmp_path) == []


def test_an_existing_directory_is_kept_unless_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    llama.save(tiny("gqa"), tmp_path / "empty")  # nothing to lose
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"full exists and is not empty; choose another path or remove it"):
        llama.save(tiny("gqa"), tmp_path / "full")
    assert files_below(tmp_path / "full") == ["notes.txt"]
    llama.save(tiny("gqa"), tmp_path / "full", replace=True)
    assert files_below(tmp_path) == sorted(
        [name for d in ("empty", "full") for name in (d, f"{d}/config.json", f"{d}/model.safetensors")]
    )
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file exists and is not a directory"):
        llama.save(tiny("gqa"), tmp_path / "file", replace=True)
    with pytest.raises(InputError, match="file cannot be written: File exists"):
        llama.save(tiny("gqa"), tmp_path / "file" / "below")


def test_a_model_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    model = tiny("gqa")
    model.model.layers[0].self_attn.extra = torch.nn.Linear(2, 2, bias=False)
    for save in (llama.save, llama.save_meta):
        with pytest.raises(InputError, match=r"not a plain Llama: model\.layers\.0\.self_attn\.extra\.weight; call .*unload"):
            save(model, tmp_path / "saved")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("save", [llama.save, llama.save_meta])
def test_weights_that_are_not_finite_are_not_saved(save: Callable[..., None], tmp_path: Path) -> None:
    model = tiny("tied")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e30
    save(model, tmp_path / "finite")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN or infinity in float16"):
        save(model, tmp_path / "saved", dtype=torch.float16)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds NaN or infinity in float32"):
        save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        llama.save(llama.Llama(SHAPES["mha"]), tmp_path / "saved")
    finally:
        os.umask(before)
    assert (tmp_path / "saved").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {0o640}


def test_a_file_that_changes_while_it_is_in_use_is_refused(tmp_path: Path) -> None:
    """It is mapped anew for each tensor: a run must not end with other weights than it began with."""
    llama.save(Llama(SHAPES["gqa"]), tmp_path / "model")
    weights = open_weights(tmp_path / "model")
    weights.read("model.norm.weight")
    llama.save(Llama(SHAPES["gqa"]), tmp_path / "model", replace=True)
    with pytest.raises(InputError, match=r"model.safetensors has changed since it was opened"):
        weights.read("model.norm.weight")
