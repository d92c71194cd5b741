"""Adapter directories hold what PEFT writes, are read strictly, and appear complete or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import llama
import peft_impl.peft_files
from llama.errors import InputError
from peft_impl import LlamaAdapterConfig, LoraConfig, add_adapter, load_adapter, read_adapter, save_adapter
from peft_impl.adapters import adapters_of
from tests.oracle import SHAPES
from tests.peft_impl.common import (
    ANY_METHOD,
    CASES,
    IDS,
    adapted,
    assert_same,
    lora_config,
    peft_keys,
    peft_model,
    perturb,
    snapshot,
    tiny,
)

A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B2 = "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A good adapter of the small model."""
    save_adapter(adapted(modules_to_save=["lm_head"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(path: Path, **changes: object) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


# --- what is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_keys_shapes_and_dtypes_are_pefts(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    peft_model(bases["gqa"], **CASES[case]).save_pretrained(tmp_path / "theirs")
    size = save_adapter(adapted(**CASES[case]), tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {key: (t.shape, t.dtype) for key, t in theirs.items()}
    assert size == sum(tensor.numel() * 4 for tensor in theirs.values())
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("case", CASES)
def test_settings_are_pefts(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    """Each that we write says what PEFT's own file says; all that a reader needs are there."""
    theirs = peft_model(bases["gqa"], **CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(adapted(**CASES[case]), tmp_path / "ours", base=str(bases["gqa"]))
    ours, wanted = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    needed = {
        *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules", "bias"),
        *("use_rslora", "use_dora", "fan_in_fan_out", "init_lora_weights", "modules_to_save", "rank_pattern", "alpha_pattern"),
        *("inference_mode", "layers_to_transform"),
    }
    assert needed <= ours.keys() <= wanted.keys()
    for settings in (ours, wanted):
        if isinstance(settings["target_modules"], list):
            settings["target_modules"] = sorted(settings["target_modules"])  # a set, on PEFT's side
    assert ours == {key: wanted[key] for key in ours}


def test_the_exact_keys() -> None:
    saved = ["lm_head", "embed_tokens"]
    model = adapted(target_modules=["v_proj"], layers_to_transform=[1], use_dora=True, modules_to_save=saved)
    assert set(peft_keys(model)) == {
        "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight",
        "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight",
        "base_model.model.model.layers.1.self_attn.v_proj.lora_magnitude_vector",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.weight",
    }


def test_the_adapters_name_is_not_in_the_file(tmp_path: Path) -> None:
    model = tiny()
    add_adapter(model, LoraConfig(), "maths")
    model.model.layers[0].self_attn.q_proj.lora["maths"].B.data.fill_(1)
    save_adapter(model, tmp_path / "adapter", "maths")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert not any("maths" in key for key in file.keys())  # noqa: SIM118
    load_adapter(model, tmp_path / "adapter", "again")
    assert torch.equal(model.model.layers[0].self_attn.q_proj.lora["again"].B.unique(), torch.ones(1))


def test_float32_masters_of_a_bfloat16_base_are_kept(tmp_path: Path) -> None:
    model = adapted(dtype=torch.bfloat16)
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert_same(tensors, {key: peft_keys(model)[key].detach() for key in tensors})
    assert tensors[A0].dtype == torch.float32


def test_tensors_can_come_from_elsewhere(tmp_path: Path) -> None:
    """As from an FSDP model's gathered state: the model's own parameters are not read."""
    model = adapted()
    state = {name: tensor + 1 for name, tensor in snapshot(model).items() if ".lora." in name}
    save_adapter(model, tmp_path / "adapter", state=state)
    _, tensors = read_adapter(tmp_path / "adapter")
    assert torch.equal(tensors[A0], peft_keys(model)[A0] + 1)


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_again_is_what_was_written(tmp_path: Path, case: str) -> None:
    model = adapted(**CASES[case])
    save_adapter(model, tmp_path / "adapter")
    again = tiny()
    load_adapter(again, tmp_path / "adapter")
    assert_same(snapshot(again), snapshot(model))
    config = lora_config(**CASES[case])
    if config.target_modules == "all-linear":  # written as names, so that no reader adapts the head
        names = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
        config = dataclasses.replace(config, target_modules=names)
    assert read_adapter(tmp_path / "adapter")[0] == config


# --- saving that fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    model = adapted()
    model.model.layers[2].self_attn.v_proj.lora["default"].B.data[3, 1] = value
    with pytest.raises(InputError, match=f"'default' is not finite and is not saved: {B2}"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", ANY_METHOD, ids=repr)
def test_an_untrained_adapter_warns(config: Any, tmp_path: Path) -> None:
    model = tiny()
    add_adapter(model, config, seed=7)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="'default' was never trained"):
        save_adapter(model, tmp_path / "adapter")
    assert_same(snapshot(model), before)  # the start was drawn again to compare, and taken back
    perturb(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "trained")


@pytest.mark.parametrize("failure", ["weights", "config", "damaged"])
@pytest.mark.parametrize("replace", [False, True])
def test_a_failing_write_leaves_the_disk_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, replace: bool
) -> None:
    if replace:
        save_adapter(adapted(seed=2), tmp_path / "adapter")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    def damaged(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file({**tensors, A0: tensors[A0] + 1}, file, metadata=metadata)

    if failure == "config":
        monkeypatch.setattr(peft_impl.peft_files, "write_json", full)
    else:
        monkeypatch.setattr(peft_impl.peft_files, "save_file", full if failure == "weights" else damaged)
    with pytest.raises(InputError, match=r"no space left|adapter_model\.safetensors does not hold what was in memory"):
        save_adapter(adapted(), tmp_path / "adapter", replace=replace)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if replace else [])


def test_an_existing_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    save_adapter(adapted(seed=2), tmp_path / "adapter")
    with pytest.raises(InputError, match="exists and is not empty"):
        save_adapter(adapted(), tmp_path / "adapter")
    save_adapter(adapted(), tmp_path / "adapter", replace=True)
    assert torch.equal(read_adapter(tmp_path / "adapter")[1][A0], peft_keys(adapted())[A0])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- reading -------------------------------------------------------------------------------------------------------------


def test_the_legacy_file_is_read(written: Path) -> None:
    wanted = tiny()
    load_adapter(wanted, written)
    torch.save(load_file(written / "adapter_model.safetensors"), written / "adapter_model.bin")
    (written / "adapter_model.safetensors").unlink()
    model = tiny()
    load_adapter(model, written)
    assert_same(snapshot(model), snapshot(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_into_the_masters(written: Path, dtype: torch.dtype) -> None:
    edit_weights(written, lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))
    model = tiny()
    load_adapter(model, written)
    for key, tensor in load_file(written / "adapter_model.safetensors").items():
        assert peft_keys(model)[key].dtype == torch.float32
        assert torch.equal(peft_keys(model)[key], tensor.float())


def truncate(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def as_pickle(path: Path, value: object) -> None:
    (path / "adapter_model.safetensors").unlink()
    torch.save(value, path / "adapter_model.bin")


def half_a_pickle(path: Path) -> None:
    as_pickle(path, {A0: torch.ones(8, 64)})
    (path / "adapter_model.bin").write_bytes((path / "adapter_model.bin").read_bytes()[:200])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "is not a directory; expected a PEFT adapter with adapter_config.json and"),
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
    "config is no JSON": (lambda path: (path / "adapter_config.json").write_text('{\n"r": 8,,}'), "config.json:2:8: not JSON"),
    "config is a list": (lambda path: (path / "adapter_config.json").write_text("[]"), "holds a list; expected a JSON object"),
    "no weights": (
        lambda path: (path / "adapter_model.safetensors").unlink(),
        "has neither adapter_model.safetensors nor adapter_model.bin",
    ),
    "truncated": (truncate, "adapter_model.safetensors is damaged or not a safetensors file"),
    "empty": (lambda path: (path / "adapter_model.safetensors").write_bytes(b""), "is damaged or not a safetensors file"),
    "truncated pickle": (half_a_pickle, "adapter_model.bin is damaged or holds more than tensors"),
    "pickled code": (lambda path: as_pickle(path, {A0: shutil.rmtree}), "adapter_model.bin is damaged or holds more than"),
    "pickled list": (lambda path: as_pickle(path, [torch.ones(1)]), "something other than a flat dictionary of tensors"),
    "a missing tensor": (lambda path: edit_weights(path, lambda t: t.pop(B2)), f"1 of 13 tensors are missing: {B2}"),
    "an extra tensor": (
        lambda path: edit_weights(path, lambda t: t.update({A0.replace("q_proj", "k_proj"): torch.ones(8, 64)})),
        f"1 tensors have no place in this model under adapter_config.json: {A0.replace('q_proj', 'k_proj')}"
        f" - did you mean '{A0.replace('q_proj', 'v_proj')}'?",
    ),
    "a renamed tensor": (
        lambda path: edit_weights(path, lambda t: t.update({B2.replace(".weight", ".default.weight"): t.pop(B2)})),
        f"1 of 13 tensors are missing: {B2}",
    ),
    "a wrong shape": (
        lambda path: edit_weights(path, lambda t: t.update({A0: torch.ones(4, 64)})),
        f"{A0} has shape (4, 64); this model needs (8, 64)",
    ),
    "an empty slice": (
        lambda path: edit_weights(path, lambda t: t.update({B2: torch.ones(0)})),
        f"{B2} has shape (0,); this model needs (32, 8)",
    ),
    "NaN": (lambda path: edit_weights(path, lambda t: t[A0].view(-1)[7:8].fill_(torch.nan)), f"{A0} holds NaN or infinity"),
    "infinity": (lambda path: edit_weights(path, lambda t: t[B2].fill_(torch.inf)), f"{B2} holds NaN or infinity"),
    "whole numbers": (
        lambda path: edit_weights(path, lambda t: t.update({A0: t[A0].to(torch.int8)})),
        f"{A0} holds torch.int8; expected floating-point numbers",
    ),
    "another rank in the config": (
        lambda path: edit_config(path, r=4),
        f"{A0} has shape (8, 64); this model needs (4, 64)",
    ),
    "a target less in the config": (
        lambda path: edit_config(path, target_modules=["q_proj"]),
        "6 tensors have no place in this model under adapter_config.json: base_model.model.model.layers.0.self_attn.v_proj",
    ),
    "a target more in the config": (
        lambda path: edit_config(path, target_modules=["q_proj", "v_proj", "up_proj"]),
        "6 of 19 tensors are missing: base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
    ),
    "DoRA in the config": (lambda path: edit_config(path, use_dora=True), "6 of 19 tensors are missing"),
    "a module that is not there": (
        lambda path: edit_config(path, modules_to_save=["score"]),
        "modules_to_save: 'score' matches no module",
    ),
    "a layer that is not there": (
        lambda path: edit_config(path, layers_to_transform=[3]),
        "layers_to_transform: no targeted module in layer 3",
    ),
}


def traits(model: nn.Module) -> list[object]:
    """All by which one could tell that something had been there."""
    state = adapters_of(model)
    return [
        [(path, type(module), module.training) for path, module in model.named_modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        hasattr(model, "adapters"),
        (state.active, list(state.configs)),
    ]


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_directory_is_refused_and_leaves_the_model_alone(written: Path, fault: str, resident: bool) -> None:
    damage, message = BAD[fault]
    damage(written)
    model = adapted(use_dora=True) if resident else tiny()
    before, was, logits = snapshot(model), traits(model), model(IDS)
    with pytest.raises(InputError) as error:
        load_adapter(model, written, "new")
    assert message in str(error.value)
    assert str(written) in str(error.value)
    assert_same(snapshot(model), before)
    assert traits(model) == was
    assert torch.equal(model(IDS), logits)


def test_an_adapter_of_another_base_is_refused_with_the_shapes(written: Path) -> None:
    other = tiny(hidden_size=SHAPES["gqa"].hidden_size * 2)
    with pytest.raises(InputError) as error:
        load_adapter(other, written)
    assert f"{A0} has shape (8, 64); this model needs (8, 128)" in str(error.value)
    with pytest.raises(InputError, match=r"4 of 17 tensors are missing: base_model\.model\.model\.layers\.3"):
        load_adapter(tiny(num_hidden_layers=4), written)
    with pytest.raises(InputError, match="4 tensors have no place in this model"):
        load_adapter(tiny(num_hidden_layers=2), written)


def test_a_taken_name_is_refused(written: Path) -> None:
    model = adapted()
    before = snapshot(model)
    with pytest.raises(InputError, match="already has an adapter 'default'"):
        load_adapter(model, written)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("config", [LoraConfig(), LlamaAdapterConfig(4, 2)], ids=repr)
def test_loading_an_adapter_without_effect_warns(config: Any, tmp_path: Path) -> None:
    model = tiny()
    add_adapter(model, config)
    with pytest.warns(UserWarning, match="never trained"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"the adapter has no effect: every (lora_B|gate) is zero"):
        load_adapter(tiny(), tmp_path / "adapter")


def test_names_of_modules_trained_whole_are_no_mistake(tmp_path: Path) -> None:
    """PEFT expands all-linear to the names of every projection, those inside modules_to_save included."""
    theirs = peft_model_with_mlp(tmp_path)
    model = tiny()
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(IDS), theirs(IDS).logits)


def peft_model_with_mlp(tmp_path: Path) -> nn.Module:
    llama.save(tiny(), tmp_path / "base")
    theirs = peft_model(tmp_path / "base", target_modules="all-linear", modules_to_save=["mlp"])
    theirs.save_pretrained(tmp_path / "adapter")
    return theirs
