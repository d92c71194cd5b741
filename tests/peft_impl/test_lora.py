"""LoRA's start, its masters, what trains and what does not, checkpointed and copied models, parameter counts."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llama import PRESETS, Llama
from peft_impl import LoraConfig, add_adapter, count_parameters, load_adapter, save_adapter, trainable_table
from peft_impl.adapters import AdapterLeaf
from peft_impl.lora import LoRALinear, LowRank
from tests.oracle import SHAPES
from tests.peft_impl.common import CASES, IDS, adapted, assert_same, lora_config, perturb, snapshot, tiny

BASE_NAMES = set(dict(tiny().named_parameters()))


def leaves(model: nn.Module) -> dict[str, LowRank]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRank)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_the_start_is_exactly_the_base(shape: str, case: str, dtype: torch.dtype) -> None:
    """DoRA too: m starts as the norm of the very sum that divides it, so c is one and (c - 1) y is zero."""
    model = tiny(shape, dtype).train()
    logits, before = model(IDS), snapshot(model)
    add_adapter(model, lora_config(**CASES[case]))
    after = snapshot(model)
    assert_same({name: after[name] for name in after if name in before}, before)
    assert torch.equal(model(IDS), logits)
    assert len(after) > len(before)


@pytest.mark.parametrize("case", CASES)
def test_all_of_the_adapter_trains_and_nothing_of_the_base(case: str) -> None:
    model = tiny()
    add_adapter(model, lora_config(**CASES[case]))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name not in BASE_NAMES), name


def test_the_start_is_kaimings_uniform_and_zero() -> None:
    """A in +-1/sqrt(in), of variance 1 / (3 in); B zero."""
    model = tiny(hidden_size=256, intermediate_size=1024, num_hidden_layers=1)
    add_adapter(model, LoraConfig(r=64, target_modules="all-linear"))
    assert len(leaves(model)) == 7
    for path, leaf in leaves(model).items():
        bound = 1 / math.sqrt(model.get_submodule(path.partition(".lora.")[0]).in_features)
        assert leaf.A.abs().max() <= bound
        assert leaf.A.abs().max() > 0.999 * bound  # 16384 draws or more: the odds of a smaller maximum are e^-16
        assert abs(leaf.A.var() / (bound**2 / 3) - 1) < 0.05  # standard error 0.9 sqrt(1 / 16384) = 0.7 %
        assert abs(leaf.A.mean()) < 0.05 * bound  # standard error 0.6 / 128 = 0.5 %
        assert not leaf.B.any()


def test_the_start_depends_on_seed_and_path_only() -> None:
    def start(seed: int, *others: dict[str, Any], name: str = "x") -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed())  # the global generator plays no part
        model = tiny()
        for index, other in enumerate(others):
            add_adapter(model, lora_config(**other), f"other{index}", seed=9)
        add_adapter(model, lora_config(target_modules="all-linear"), name, seed)
        return {path.partition(".lora.")[0]: leaf.A for path, leaf in leaves(model).items() if path.endswith(f".{name}")}

    first = start(0)
    for again in (start(0), start(0, {}, {"target_modules": ["down_proj"], "modules_to_save": ["norm"]}), start(0, name="y")):
        assert again.keys() == first.keys()
        assert all(torch.equal(again[path], first[path]) for path in first)
    another = start(1)
    assert not any(torch.equal(another[path], first[path]) for path in first)
    squares = [A.reshape(-1)[:64] for A in first.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(squares) for b in squares[:i])


@pytest.mark.parametrize("case", ["default", "dora", "embedding", "head"])
@pytest.mark.parametrize(("base", "master"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_masters_are_wide(case: str, base: str, master: str) -> None:
    model = tiny(dtype=getattr(torch, base))
    add_adapter(model, lora_config(**CASES[case]))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == getattr(torch, base if name in BASE_NAMES else master), name


@pytest.mark.parametrize("case", CASES)
def test_one_step_moves_every_trainable_and_nothing_else(case: str) -> None:
    model = adapted(**CASES[case]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = snapshot(model)
    every_token = torch.arange(97)[None]  # so that each row of an embedding has a gradient
    model(every_token, every_token).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert gradients[name].any(), name
            assert not torch.equal(parameter, before[name]), name
        else:
            assert gradients[name] is None, name
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("case", ["default", "dora"])
@pytest.mark.parametrize("training", [True, False])
def test_leaves_own_trainables_only_and_return_fresh_tensors(case: str, training: bool) -> None:
    """Else FSDP gathers frozen weights with them, or frees what their forward has returned."""
    model = adapted(**CASES[case], lora_dropout=0.1).train(training)
    found = [module for module in model.modules() if isinstance(module, AdapterLeaf)]
    owned = {id(parameter) for leaf in found for parameter in leaf.parameters()}
    assert owned == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for leaf in found:
        assert not list(leaf.buffers())
        x = torch.randn(2, 3, leaf.A.shape[1])
        weight = torch.randn(leaf.B.shape[0], leaf.A.shape[1])
        update = leaf(x, x @ weight.T, weight)
        storages = {parameter.untyped_storage().data_ptr() for parameter in leaf.parameters()}
        assert update.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("case", ["default", "dora"])
def test_reset_parameters_fills_everything(case: str) -> None:
    """As after `to_empty`, where memory holds anything."""
    model = tiny()
    add_adapter(model, lora_config(**CASES[case]))
    for leaf in leaves(model).values():
        for parameter in leaf.parameters():
            parameter.data.fill_(math.nan)
        leaf.reset_parameters(torch.Generator().manual_seed(0))
        assert all(torch.isfinite(parameter).all() for parameter in leaf.parameters())
    assert torch.equal(model(IDS), tiny()(IDS))


@pytest.mark.parametrize("training", [True, False])
def test_a_new_adapter_drops_out_only_if_the_model_trains(training: bool) -> None:
    model = tiny().train(training)
    add_adapter(model, LoraConfig(lora_dropout=0.5, modules_to_save=("norm",)))
    perturb(model)
    assert torch.equal(model(IDS), model(IDS)) != training


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(settings: dict[str, Any], dropout: float) -> None:
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = adapted(**settings, lora_dropout=dropout).train()
        for layer in model.model.layers if checkpointed else ():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        torch.manual_seed(3)
        model(IDS, IDS).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    assert_same(gradients(True), gradients(False))


@pytest.mark.parametrize("case", ["default", "dora", "head"])
def test_a_deep_copy_is_a_model_of_its_own(case: str) -> None:
    model = adapted(**CASES[case])
    logits = model(IDS)
    other = copy.deepcopy(model)
    assert torch.equal(other(IDS), logits)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.adapters.active = None
    assert torch.equal(model(IDS), logits)
    assert not torch.equal(other(IDS), logits)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    modules = [module for module in other.modules() if isinstance(module, LoRALinear)]
    assert all(module.adapters is other.adapters for module in modules)


def test_modules_to_save_masters_are_copies(tmp_path: Any) -> None:
    """Training the copy of a tied head changes neither the base's head nor its embedding; it survives a file."""
    model = adapted("tied", modules_to_save=["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tiny("tied").lm_head.weight)
    assert not torch.equal(model.lm_head.copies["default"].weight, model.lm_head.weight)
    save_adapter(model, tmp_path / "adapter")
    again = tiny("tied")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(IDS), model(IDS))


COUNTS = [
    ("llama2-7b", {}, 4_194_304),
    ("llama2-13b", {}, 6_553_600),
    ("llama2-70b", {}, 16_384_000),
    ("llama2-7b", {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}, 8_388_608),
    ("llama2-7b", {"target_modules": "all-linear"}, 19_988_480),
    ("llama2-7b", {"target_modules": "all-linear", "r": 64}, 159_907_840),
    ("llama2-7b", {"use_dora": True}, 4_456_448),
]
SIZES = {"llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192}


@pytest.mark.parametrize(("preset", "settings", "count"), COUNTS)
def test_parameter_counts_of_the_real_models(preset: str, settings: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = Llama(PRESETS[preset])
    add_adapter(model, LoraConfig(**settings))
    assert count_parameters(model) == (count, SIZES[preset] + count)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_an_adapter_can_be_added_under_a_default_device() -> None:
    """The start is drawn on the CPU, whatever device new tensors have by default."""
    model = tiny()
    with torch.device("meta"):
        add_adapter(model, LoraConfig())
    wanted = tiny()
    add_adapter(wanted, LoraConfig())
    assert_same(snapshot(model), snapshot(wanted))


def test_the_table_of_trainables() -> None:
    model = tiny()
    add_adapter(model, LoraConfig(r=2, modules_to_save=("lm_head",)))
    lines = [line.split() for line in trainable_table(model).splitlines()]
    C, kv = SHAPES["gqa"].hidden_size, SHAPES["gqa"].hidden_size // 2
    assert lines == [
        ["model.layers.*.self_attn.q_proj.lora.default.A", "3", "x", str(3 * 2 * C), "parameters"],
        ["model.layers.*.self_attn.q_proj.lora.default.B", "3", "x", str(3 * 2 * C), "parameters"],
        ["model.layers.*.self_attn.v_proj.lora.default.A", "3", "x", str(3 * 2 * C), "parameters"],
        ["model.layers.*.self_attn.v_proj.lora.default.B", "3", "x", str(3 * 2 * kv), "parameters"],
        ["lm_head.copies.default.weight", "1", "x", f"{97 * C:,}", "parameters"],
    ]
