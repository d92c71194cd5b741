"""Settings that are out of range, of another type, or of a kind that PEFT has and we do not: refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from llama.errors import InputError
from peft_impl import LoraConfig, load_adapter, read_adapter, save_adapter
from tests.peft_impl.common import IDS, adapted, tiny

VALUES = [
    ({"r": 0}, "r = 0; expected a positive integer"),
    ({"r": 8.0}, "r = 8.0; expected a positive integer"),
    ({"r": True}, "r = True; expected a positive integer"),
    ({"rank_pattern": {"q_proj": -1}}, "q_proj = -1; expected a positive integer"),
    ({"lora_alpha": 0}, "lora_alpha = 0; expected a positive number"),
    ({"lora_alpha": float("nan")}, "lora_alpha = nan; expected a positive number"),
    ({"lora_alpha": "16"}, "lora_alpha = '16'; expected a positive number"),
    ({"alpha_pattern": {"v_proj": float("inf")}}, "v_proj = inf; expected a positive number"),
    ({"lora_dropout": 1.0}, "lora_dropout = 1.0; expected a probability in [0, 1)"),
    ({"lora_dropout": -0.1}, "lora_dropout = -0.1; expected a probability in [0, 1)"),
    ({"target_modules": ()}, "target_modules is empty"),
    ({"target_modules": ""}, "target_modules is empty"),
    ({"target_modules": ("q_proj", "")}, "target_modules = ('q_proj', ''); expected a list of str"),
    ({"target_modules": (3,)}, "target_modules = (3,); expected a list of str"),
    ({"target_modules": {"q_proj": 1}}, "target_modules = {'q_proj': 1}; expected a list of str"),
    ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head'; expected a list of str"),
    ({"modules_to_save": ("",)}, "modules_to_save = ('',); expected a list of str"),
    ({"layers_to_transform": (0.5,)}, "layers_to_transform = (0.5,); expected a list of int"),
    ({"layers_to_transform": "0"}, "layers_to_transform = '0'; expected a list of int"),
    ({"use_dora": "yes"}, "use_dora = 'yes'; expected true or false"),
    ({"use_rslora": 1}, "use_rslora = 1; expected true or false"),
    ({"target_modules": ".*q_proj", "layers_to_transform": (0,)}, "cannot restrict a regular expression"),
]


@pytest.mark.parametrize(("settings", "message"), VALUES)
def test_a_wrong_value_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        LoraConfig(**settings)
    assert message in str(error.value)


def test_peft_refuses_layers_beside_an_expression_too() -> None:
    """So such an adapter could not be read there; all-linear is written as names, and can."""
    with pytest.raises(ValueError, match="layers_to_transform"):
        peft.LoraConfig(target_modules=".*q_proj", layers_to_transform=[0])
    LoraConfig(target_modules="all-linear", layers_to_transform=(0,))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "adapter"
    save_adapter(adapted(), path)
    return path


def with_settings(good: Path, **changes: Any) -> Path:
    """The good adapter with other settings; `...` for none."""
    settings = {**json.loads((good / "adapter_config.json").read_text()), **changes}
    path = good.parent / "changed"
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({key: v for key, v in settings.items() if v is not ...}))
    (path / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes())
    return path


UNSUPPORTED: dict[str, list[Any]] = {  # what PEFT's own fields may hold beyond what is implemented here
    "bias": ["all", "lora_only"],
    "lora_bias": [True],
    "fan_in_fan_out": [True],
    "init_lora_weights": ["pissa", "pissa_niter_16", "olora", "eva", "corda", "loftq", "orthogonal", "lora_ga"],
    "layer_replication": [[[0, 2], [1, 3]]],
    "layers_pattern": ["h", ["blocks"], ["layers", "h"]],
    "trainable_token_indices": [[0], {"embed_tokens": [1]}],
    "target_parameters": [["mlp.experts"]],
    "exclude_modules": [["v_proj"], ".*v_proj"],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "alora_invocation_tokens": [[1, 2]],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"beta": 1e-4}],
    "velora_config": [{"num_groups": 64}],
    "monteclora_config": [{"num_samples": 8}],
    "corda_config": [{"corda_method": "ipm"}],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "megatron_config": [{"tp": 2}],
    "ensure_weight_tying": [True],
    "a_field_of_the_future": [True, "x", 3, [0], {"x": None}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in UNSUPPORTED.items() for value in values])
def test_what_is_not_implemented_is_refused(good: Path, field: str, value: Any) -> None:
    path = with_settings(good, **{field: value})
    with pytest.raises(InputError) as error:
        read_adapter(path)
    assert str(path / "adapter_config.json") in str(error.value)
    assert f"{field} = {value!r} is not supported" in str(error.value)


def test_every_field_of_peft_is_either_read_or_refused_or_harmless(good: Path) -> None:
    """A field that a new version of PEFT brings shows up here."""
    ours = set(LoraConfig.__dataclass_fields__)
    harmless = {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("megatron_core", "qalora_group_size", "runtime_config"),  # of use only with fields that are refused, or at run time
        *("loftq_config", "eva_config"),  # of use only for initialisation
    }
    assert peft.LoraConfig.__dataclass_fields__.keys() == ours | harmless | UNSUPPORTED.keys() - {"a_field_of_the_future"}


def test_pefts_defaults_are_accepted(good: Path) -> None:
    written = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]).to_dict()
    config, _ = read_adapter(with_settings(good, **json.loads(json.dumps(written, default=sorted))))
    assert config == LoraConfig(lora_alpha=8)


def test_silent_fields_mean_pefts_defaults(good: Path) -> None:
    silent = dict.fromkeys(json.loads((good / "adapter_config.json").read_text()), ...)
    config, _ = read_adapter(with_settings(good, **{**silent, "peft_type": "LORA"}))
    theirs = peft.LoraConfig()
    assert config == LoraConfig(r=theirs.r, lora_alpha=theirs.lora_alpha, lora_dropout=theirs.lora_dropout)
    assert config.lora_alpha == 8


@pytest.mark.parametrize(
    "harmless",
    [
        {"init_lora_weights": False},  # the start; the file holds what became of it
        {"init_lora_weights": "gaussian"},
        {"layers_pattern": "layers", "layers_to_transform": [0, 1, 2]},
        {"layers_pattern": ["layers"], "layers_to_transform": [0, 1, 2]},
        {"layers_pattern": []},
        {"exclude_modules": None, "trainable_token_indices": None, "use_qalora": False, "target_parameters": []},
        {"qalora_group_size": 16, "megatron_core": "megatron.core", "peft_version": "9.9", "revision": "main"},
    ],
)
def test_harmless_settings_are_accepted(good: Path, harmless: dict[str, Any]) -> None:
    model = tiny()
    load_adapter(model, with_settings(good, **harmless))
    assert torch.equal(model(IDS), adapted()(IDS))


def test_one_layer_may_be_a_number(good: Path) -> None:
    config, _ = read_adapter(with_settings(good, layers_to_transform=1))
    assert config.layers_to_transform == (1,)


@pytest.mark.parametrize("kind", [..., None, "LOHA", "lora", 3, ["LORA"], {"LORA": 1}])
def test_another_method_is_refused(good: Path, kind: Any) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json: peft_type is .*; expected ADAPTION_PROMPT, LLAMA_AD"):
        read_adapter(with_settings(good, peft_type=kind))


STRANGE: list[Any] = [-1, 0.5, "", "x", [[1]], [None], {"q_proj": "x"}, {"q_proj": None}]
OF_THE_TYPE = [("lora_alpha", 0.5), ("lora_dropout", 0.5), ("target_modules", "x"), ("layers_to_transform", -1)]
PAIRS = [(f, v) for f in LoraConfig.__dataclass_fields__ for v in STRANGE if (f, v) not in OF_THE_TYPE]


@pytest.mark.parametrize(("field", "value"), PAIRS)
def test_settings_of_any_other_type_are_refused(good: Path, field: str, value: Any) -> None:
    """By us, not by whatever would stumble over them later."""
    with pytest.raises(InputError, match=r"adapter_config\.json: "):
        read_adapter(with_settings(good, **{field: value}))
