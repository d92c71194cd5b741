"""Several adapters on one backbone: add, choose, remove; and a refused adapter leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llama import Llama
from llama.errors import InputError
from peft_impl import LoraConfig, add_adapter, load_adapter, remove_adapter, save_adapter, set_adapter
from peft_impl.adapters import adapters_of
from peft_impl.lora import LowRank
from tests.peft_impl.common import CASES, IDS, adapted, assert_same, lora_config, perturb, snapshot, tiny

RESIDENT: dict[str, dict[str, Any]] = {
    "low": {},
    "dora": {"use_dora": True, "target_modules": "all-linear", "r": 3},
    "head": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"target_modules": r".*mlp\..*", "modules_to_save": ["norm", "lm_head"]},
}


def with_all(shape: str = "gqa") -> Llama:
    model = tiny(shape)
    for name, settings in RESIDENT.items():
        add_adapter(model, lora_config(**settings), name)
    perturb(model)
    return model


def alone(model: Llama, name: str, shape: str = "gqa") -> Llama:
    """The adapter `name` of a model with several, by itself on a fresh base."""
    single = tiny(shape)
    add_adapter(single, lora_config(**RESIDENT[name]), name)
    own = snapshot(model)
    with torch.no_grad():
        for key, parameter in single.named_parameters():
            parameter.copy_(own[key])
    return single


def anatomy(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_each_resident_adapter_is_as_if_alone(shape: str) -> None:
    model = with_all(shape)
    base = tiny(shape)(IDS)
    for name in ("dora", "low", None, "norms", "head", None):
        set_adapter(model, name)
        wanted = base if name is None else alone(model, name, shape)(IDS)
        assert torch.equal(model(IDS), wanted), name


def test_only_the_active_adapter_gets_gradients() -> None:
    model = with_all()
    set_adapter(model, "dora")
    model(IDS, IDS).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".dora." in name}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_removing_the_adapter_gives_the_base_back(shape: str, case: str) -> None:
    model = tiny(shape)
    parts, before, attributes = anatomy(model), snapshot(model), {p: set(vars(m)) for p, m in model.named_modules()}
    add_adapter(model, lora_config(**CASES[case]))
    perturb(model)
    remove_adapter(model, "default")
    assert anatomy(model) == parts
    assert_same(snapshot(model), before)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert not hasattr(model, "adapters")
    assert torch.equal(model(IDS), tiny(shape)(IDS))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (shape == "tied")


@pytest.mark.parametrize("gone", RESIDENT)
def test_removing_one_leaves_the_others(gone: str) -> None:
    model = with_all()
    remove_adapter(model, gone)
    assert not any(f".{gone}." in name for name, _ in model.named_parameters())
    for name in RESIDENT.keys() - {gone}:
        set_adapter(model, name)
        assert torch.equal(model(IDS), alone(model, name)(IDS)), name


def test_removing_the_active_adapter_leaves_the_base_active() -> None:
    model = with_all()
    set_adapter(model, "low")
    remove_adapter(model, "low")
    assert adapters_of(model).active is None
    assert torch.equal(model(IDS), tiny()(IDS))
    set_adapter(model, "dora")
    remove_adapter(model, "head")
    assert adapters_of(model).active == "dora"


@pytest.mark.parametrize("order", [("norm", "q_proj", "self_attn"), ("self_attn", "norm", "q_proj")])
def test_targets_never_reach_into_another_adapter(order: tuple[str, ...]) -> None:
    """Not even for adapters that are called like modules, or for patterns that match everything below a module."""
    settings = {
        "norm": {"modules_to_save": ["mlp"], "target_modules": r".*self_attn\..*"},
        "q_proj": {"modules_to_save": ["norm"], "target_modules": "all-linear"},
        "self_attn": {"target_modules": r".*\.self_attn\..*|.*\.gate_proj"},
    }
    model = tiny()
    for name in order:
        if name == "norm" and name != order[0]:
            settings[name]["modules_to_save"] = ["lm_head"]  # its copy of an adapted mlp would be refused
        add_adapter(model, lora_config(**settings[name]), name)
        single = tiny()
        add_adapter(single, lora_config(**settings[name]), name)
        own = {key for key, parameter in single.named_parameters() if parameter.requires_grad}
        assert own == {key for key, _ in model.named_parameters() if f".lora.{name}." in key or f".copies.{name}." in key}


CONFLICTS = [
    ({"target_modules": ["q_proj"]}, {"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]}, "holds parts of a"),
    ({"target_modules": ["gate_proj"]}, {"modules_to_save": ["mlp"]}, "holds parts of a"),
    ({"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]}, {"target_modules": ["q_proj"]}, "trained whole by a"),
]


@pytest.mark.parametrize(("first", "second", "message"), CONFLICTS)
def test_a_module_is_not_both_copied_and_updated(first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    model = tiny()
    add_adapter(model, lora_config(**first), "a")
    perturb(model)
    before, logits, parts = snapshot(model), model(IDS), anatomy(model)
    with pytest.raises(InputError, match=message):
        add_adapter(model, lora_config(**second), "b")
    assert_same(snapshot(model), before)
    assert anatomy(model) == parts
    assert adapters_of(model).active == "a"
    assert torch.equal(model(IDS), logits)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=("q_proj", "qproj")),
        LoraConfig(target_modules=".*embed.*"),
        LoraConfig(layers_to_transform=(3,)),
        LoraConfig(rank_pattern={"k_proj": 4}),
        LoraConfig(modules_to_save=("score",)),
        LoraConfig(modules_to_save=("mlp", "gate_proj")),
        LoraConfig(r=65),
    ],
)
def test_a_refused_adapter_leaves_no_trace(config: LoraConfig, resident: bool) -> None:
    model = tiny()
    if resident:
        add_adapter(model, LoraConfig(), "a")
        perturb(model)
        model.model.norm.weight.requires_grad_(True)  # whatever the caller chose
    before, logits, parts = snapshot(model), model(IDS), anatomy(model)
    training = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(InputError):
        add_adapter(model, config, "b")
    assert_same(snapshot(model), before)
    assert anatomy(model) == parts
    assert [parameter.requires_grad for parameter in model.parameters()] == training
    assert hasattr(model, "adapters") == resident
    assert torch.equal(model(IDS), logits)


@pytest.mark.parametrize("name", ["", "a.b", "a b", "../x", "items", "forward", "training"])
def test_unusable_names_are_refused(name: str) -> None:
    model = tiny()
    with pytest.raises(InputError, match="adapter name"):
        add_adapter(model, LoraConfig(), name)
    assert not hasattr(model, "adapters")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrong_names_are_refused() -> None:
    model = tiny()
    with pytest.raises(InputError, match="no adapter 'math'; it has none"):
        set_adapter(model, "math")
    add_adapter(model, LoraConfig(), "maths")
    with pytest.raises(InputError, match="already has an adapter 'maths'"):
        add_adapter(model, LoraConfig(), "maths")
    for action in (set_adapter, remove_adapter, lambda m, n: save_adapter(m, "never", n)):
        with pytest.raises(InputError, match="it has maths - did you mean 'maths'"):
            action(model, "math")
    with pytest.raises(InputError, match="dict is not the configuration of an adapter; expected LlamaAdapterConfig, Lo"):
        add_adapter(model, {"r": 8}, "other")
    assert list(adapters_of(model).configs) == ["maths"]


def test_a_loaded_adapter_is_frozen_unless_it_is_to_train(tmp_path: Any) -> None:
    save_adapter(adapted(modules_to_save=["lm_head"]), tmp_path / "adapter")
    model = tiny()
    load_adapter(model, tmp_path / "adapter", "fixed")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    load_adapter(model, tmp_path / "adapter", "on", trainable=True)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".on." in n
    }
    assert adapters_of(model).active == "on"


def test_running_out_of_memory_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    before, logits, parts = snapshot(model), model(IDS), anatomy(model)
    made = LowRank.__init__

    def exhausted(self: LowRank, linear: nn.Module, *settings: Any) -> None:
        if linear is model.model.layers[1].self_attn.v_proj:
            raise RuntimeError("no memory")
        made(self, linear, *settings)

    monkeypatch.setattr(LowRank, "__init__", exhausted)
    with pytest.raises(RuntimeError, match="no memory"):
        add_adapter(model, LoraConfig())
    assert_same(snapshot(model), before)
    assert anatomy(model) == parts
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(IDS), logits)
