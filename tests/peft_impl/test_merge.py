"""Merging equals PEFT's, reports what rounding cost, and is undone bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llama
from llama import Llama
from llama.errors import InputError
from peft_impl import (
    LoraConfig,
    add_adapter,
    load_adapter,
    merge,
    merge_and_unload,
    remove_adapter,
    save_adapter,
    set_adapter,
    unmerge,
)
from peft_impl.adapters import adapters_of
from tests.oracle import hf_model, largest
from tests.peft_impl.common import (
    CASES,
    IDS,
    adapted,
    adapted_paths,
    assert_same,
    peft_keys,
    peft_model,
    perturb,
    snapshot,
    tiny,
)

# (W + s B A) x against W x + s B A x: fp32 roundings (6e-8) of sums of 64 terms, three layers deep, logits up to 4.
MERGED = 1e-5

Q0 = "model.layers.0.self_attn.q_proj"


def base_weights(model: Llama) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in snapshot(model).items() if ".lora." not in name and ".copies." not in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_pefts(bases: dict[str, Path], tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    theirs = peft_model(bases["gqa"], dtype, **CASES[case])
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama.load(bases["gqa"], dtype)
    load_adapter(model, tmp_path / "adapter")
    before = base_weights(model)
    touched = adapted_paths(model) | {path for path, module in model.named_modules() if hasattr(module, "copies")}
    merge_and_unload(model)
    wanted = {name: parameter.detach() for name, parameter in theirs.merge_and_unload().named_parameters()}
    assert_same({name: wanted[name] for name in before}, after := snapshot(model))
    assert {f"{path}.weight" for path in touched} == {name for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_computes_the_same(case: str) -> None:
    model = adapted(**CASES[case])
    wanted = model(IDS)
    assert largest(wanted, tiny()(IDS)) > 1e4 * MERGED
    merge(model)
    assert largest(model(IDS), wanted) <= MERGED


def test_any_adapter_can_be_merged_whichever_is_active() -> None:
    model = tiny()
    for name in "ab":
        add_adapter(model, LoraConfig(modules_to_save=("norm", "lm_head")), name)
    perturb(model)
    set_adapter(model, "a")
    wanted = model(IDS)
    for active in ("b", None):
        set_adapter(model, active)
        other = model(IDS)
        merge(model, "a")
        assert largest(model(IDS), wanted) <= MERGED
        unmerge(model)
        assert torch.equal(model(IDS), other)


def test_bfloat16_is_rounded_once() -> None:
    """W in bf16 plus the update in fp32, then one rounding; rounding the update first would give other bits."""
    model = adapted(dtype=torch.bfloat16, r=3, lora_alpha=7)
    linear = model.get_submodule(Q0)
    leaf, before = linear.lora["default"], linear.weight.detach().clone()
    update = (leaf.B.detach() @ leaf.A.detach()) * (7 / 3)
    merge(model)
    assert torch.equal(linear.weight, (before.float() + update).bfloat16())
    assert not torch.equal(linear.weight, before + update.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_unmerging_restores_every_bit(case: str, dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype, **CASES[case])
    before, logits = snapshot(model), model(IDS)
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    merge(model)
    merged = base_weights(model)
    assert any(not torch.equal(merged[name], before[name]) for name in merged)
    unmerge(model)
    assert_same(snapshot(model), before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == storages
    assert torch.equal(model(IDS), logits)
    assert merge(model) is not None  # and it can be merged again


@pytest.mark.parametrize("case", ["default", "dora", "head"])
def test_the_report_is_the_rounding_error(case: str) -> None:
    """max |merged - exact| and ||merged - exact|| / ||exact - base||, from the formulas, in fp64."""
    model = adapted(dtype=torch.bfloat16, **CASES[case])
    exact = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora"):
            leaf = module.lora["default"]
            W = module.weight.detach().double() + leaf.scale * (leaf.B.double() @ leaf.A.double()).detach()
            if hasattr(leaf, "magnitude"):
                W *= (leaf.magnitude.detach().double() / W.norm(dim=1))[:, None]
            exact[f"{path}.weight"] = W
        if hasattr(module, "copies"):
            exact[f"{path}.weight"] = module.copies["default"].weight.detach().double()
    before = base_weights(model)
    report = merge(model)
    after = base_weights(model)
    errors = {name: after[name].double() - exact[name] for name in exact}
    lost = sum(error.pow(2).sum() for error in errors.values())
    wanted = sum((exact[name] - before[name].double()).pow(2).sum() for name in exact)
    in_fp32 = 1e-4  # the report's exact values are fp32: 6e-8 of W, against errors of 2e-3 of W
    assert report.modules == len(exact)
    assert report.max_error == pytest.approx(max(error.abs().max().item() for error in errors.values()), rel=in_fp32)
    assert report.relative_error == pytest.approx((lost / wanted).sqrt().item(), rel=in_fp32)
    assert 0 < report.relative_error < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_lost_where_the_base_is_as_wide_as_the_masters(dtype: torch.dtype) -> None:
    report = merge(adapted(dtype=dtype, use_dora=True, modules_to_save=["lm_head"]))
    assert (report.modules, report.max_error, report.relative_error) == (7, 0.0, 0.0)


def test_an_untrained_adapter_merges_to_the_base() -> None:
    model = tiny(dtype=torch.bfloat16)
    before = snapshot(model)
    add_adapter(model, LoraConfig())
    report = merge_and_unload(model)
    assert (report.max_error, report.relative_error) == (0.0, 0.0)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda model, path: merge(model, "a"), "'a' is merged already; a second merge would add its update twice"),
        (lambda model, path: merge(model, "b"), "'a' is merged already"),
        (lambda model, path: merge_and_unload(model, "a"), "remove them first"),
        (lambda model, path: set_adapter(model, "b"), "'a' is merged into the base; unmerge it before choosing"),
        (lambda model, path: set_adapter(model, None), "'a' is merged into the base; unmerge it before choosing"),
        (lambda model, path: add_adapter(model, LoraConfig(), "c"), "'a' is merged into the base; unmerge it before adding"),
        (lambda model, path: load_adapter(model, path, "c"), "'a' is merged into the base; unmerge it before adding"),
        (lambda model, path: remove_adapter(model, "a"), "'a' is merged into the base; unmerge it before removing"),
        (lambda model, path: remove_adapter(model, "b"), "'a' is merged into the base; unmerge it before removing"),
    ],
)
def test_a_merged_model_is_left_alone(tmp_path: Path, action: Callable[[Llama, Path], object], message: str) -> None:
    model = tiny()
    for name in "ab":
        add_adapter(model, LoraConfig(modules_to_save=("norm",)), name)
    perturb(model)
    save_adapter(model, tmp_path / "adapter", "a")
    before = snapshot(model)
    merge(model, "a")
    merged, logits = snapshot(model), model(IDS)
    with pytest.raises(InputError, match=message):
        action(model, tmp_path / "adapter")
    assert_same(snapshot(model), merged)
    assert torch.equal(model(IDS), logits)
    unmerge(model)
    assert_same(snapshot(model), before)
    assert adapters_of(model).active == "b"


def test_a_merged_adapter_can_still_be_saved(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    wanted = {key: parameter.detach().clone() for key, parameter in peft_keys(model).items()}
    merge(model)
    save_adapter(model, tmp_path / "adapter")
    again = tiny()
    load_adapter(again, tmp_path / "adapter")
    assert_same({key: parameter.detach() for key, parameter in peft_keys(again).items()}, wanted)


def test_unmerging_what_is_not_merged_is_refused() -> None:
    for model in (tiny(), adapted()):
        with pytest.raises(InputError, match="no adapter is merged"):
            unmerge(model)
    with pytest.raises(InputError, match="no adapter 'maths'; it has default"):
        merge(adapted(), "maths")


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_copy_of_a_tied_weight_is_not_merged(module: str) -> None:
    model = adapted("tied", modules_to_save=[module])
    before, logits = snapshot(model), model(IDS)
    for attempt in (merge, merge_and_unload):
        with pytest.raises(InputError, match=rf"{module} of adapter 'default' cannot be merged: the base ties"):
            attempt(model)
        assert_same(snapshot(model), before)
        assert torch.equal(model(IDS), logits)


def test_an_overflow_is_refused_before_anything_changes() -> None:
    model = adapted(dtype=torch.float16)
    model.get_submodule("model.layers.2.self_attn.v_proj").lora["default"].B.data[0, 0] = 1e8
    before = snapshot(model)
    with pytest.raises(InputError, match=r"merging 'default' gives non-finite weights in model\.layers\.2\.self_attn\.v_proj"):
        merge(model)
    assert_same(snapshot(model), before)
    assert adapters_of(model).merged is None


def test_a_deep_copy_of_a_merged_model_unmerges_by_itself() -> None:
    model = adapted()
    before = snapshot(model)
    merge(model)
    merged = snapshot(model)
    other = copy.deepcopy(model)
    unmerge(other)
    assert_same(snapshot(other), before)
    assert_same(snapshot(model), merged)


def test_merge_and_unload_refuses_to_leave_other_adapters_on_another_base() -> None:
    model = adapted()
    add_adapter(model, LoraConfig(), "other")
    before = snapshot(model)
    with pytest.raises(InputError, match=r"also has \['other'\]; remove them first"):
        merge_and_unload(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(("shape", "case"), [("mha", "all-linear"), ("gqa", "head"), ("mqa", "norms"), ("tied", "dora")])
def test_the_merged_model_is_a_plain_llama_that_hf_opens(bases: dict[str, Path], tmp_path: Path, shape: str, case: str) -> None:
    theirs = peft_model(bases[shape], **CASES[case])
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama.load(bases[shape])
    load_adapter(model, tmp_path / "adapter")
    merge_and_unload(model)
    assert [(path, type(m)) for path, m in model.named_modules()] == [(p, type(m)) for p, m in tiny(shape).named_modules()]
    assert not hasattr(model, "adapters")
    llama.save(model, tmp_path / "model")
    opened = hf_model(tmp_path / "model", attention="sdpa")
    wanted = theirs.merge_and_unload()(IDS).logits
    assert torch.equal(opened(IDS).logits, wanted)
    assert torch.equal(model(IDS), wanted)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_model_with_an_adapter_is_not_saved_as_a_plain_one(tmp_path: Path, settings: dict[str, Any], merged: bool) -> None:
    model = adapted(**settings)
    if merged:
        merge(model)
    with pytest.raises(InputError, match=r"not a plain Llama: .*merge_and_unload"):
        llama.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    expected = model(IDS)
    merge_and_unload(model)  # what the message says to do, whether it was merged already or not
    llama.save(model, tmp_path / "model")
    assert largest(llama.load(tmp_path / "model")(IDS), expected) <= MERGED
