"""Which modules a configuration means: the same as in PEFT, or an error that names the nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from llama.errors import InputError
from peft_impl import LoraConfig, add_adapter
from peft_impl.modules_to_save import Replaceable
from tests.oracle import hf_model
from tests.peft_impl.common import adapted_paths, lora_config, tiny

SPECIFICATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "names": {"target_modules": ["k_proj", "down_proj"]},
    "one name": {"target_modules": ["up_proj"]},
    "a path": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "the end of a path": {"target_modules": ["1.self_attn.o_proj", "mlp.gate_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r".*\.(q|k)_proj"},
    "an expression for a layer": {"target_modules": r"model\.layers\.[12]\.mlp\.(gate|down)_proj"},
    "an expression is a full match": {"target_modules": r"model\.layers\.\d\.self_attn\.q_proj|.*up_proj"},
    "a single name is an expression": {"target_modules": "model.layers.0.self_attn.q_proj"},
    "layers": {"layers_to_transform": [0, 2]},
    "a layer": {"layers_to_transform": [1], "target_modules": ["gate_proj", "v_proj"]},
    "no layers means all": {"layers_to_transform": []},
    "a whole path stands beside layers": {
        "layers_to_transform": [1],
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
    },
    "ranks": {"rank_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 5}},
    "rank by path": {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2}, "target_modules": ["q_proj"]},
    "rank by expression": {"rank_pattern": {r"layers\.[01]\..*": 6}, "alpha_pattern": {r"[02]\.self_attn\.\w_proj": 1}},
    "the first rank wins": {"rank_pattern": {"self_attn.q_proj": 2, "q_proj": 3, ".*": 4}},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    "head": {"modules_to_save": ["lm_head"]},
    "any norm": {"modules_to_save": ["norm"]},
    "the final norm": {"modules_to_save": ["model.norm"]},
    "norms and embedding": {"modules_to_save": ["post_attention_layernorm", "embed_tokens"]},
    "saved beside all-linear": {"target_modules": "all-linear", "modules_to_save": ["down_proj"]},
    "saved with all below": {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
    "saved one layer": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1.mlp"]},
}


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_the_modules_are_pefts(bases: dict[str, Path], name: str) -> None:
    """Paths, ranks and scales of the adapted modules, and the paths of the copied ones."""
    settings = SPECIFICATIONS[name]
    theirs = peft.get_peft_model(hf_model(bases["gqa"]), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).base_model.model
    layers = {path: module for path, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    model = tiny()
    add_adapter(model, lora_config(**settings))
    assert adapted_paths(model) == layers.keys()
    for path, layer in layers.items():
        leaf = model.get_submodule(f"{path}.lora.default")
        assert (leaf.A.shape[0], leaf.scale) == (layer.r["default"], layer.scaling["default"]), path
    copied = {path for path, module in theirs.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    assert {path for path, module in model.named_modules() if isinstance(module, Replaceable)} == copied


REFUSED = [
    ({"target_modules": ("q_prj",)}, "'q_prj' matches no module - did you mean 'q_proj'?"),
    ({"target_modules": ("q_proj", "wq")}, "'wq' matches no module"),
    ({"target_modules": ("proj",)}, "'proj' matches no module"),
    ({"target_modules": "q_proj"}, "'q_proj', read as a regular expression, matches no module path such as model.layers.0"),
    ({"target_modules": "(q_proj"}, "is not a regular expression: missing )"),
    ({"target_modules": ("lm_head",)}, "lm_head is a LanguageModelHead; low-rank updates apply to"),
    ({"target_modules": ("embed_tokens",)}, "model.embed_tokens is a Embedding"),
    ({"target_modules": ("mlp",)}, "model.layers.0.mlp is a MLP"),
    ({"target_modules": ".*layernorm"}, "input_layernorm is a RMSNorm"),
    ({"layers_to_transform": (0, 3)}, "no targeted module in layer 3; layers are 0..2"),
    ({"layers_to_transform": (-1,)}, "no targeted module in layer -1"),
    ({"rank_pattern": {"k_proj": 3}}, "rank_pattern: 'k_proj' matches no adapted module, such as model.layers.0.self_attn.q"),
    ({"rank_pattern": {"proj": 3}}, "rank_pattern: 'proj' matches no adapted module"),
    ({"alpha_pattern": {"q_proj(": 3}}, "alpha_pattern: 'q_proj(' is not a regular expression"),
    ({"modules_to_save": ("lmhead",)}, "modules_to_save: 'lmhead' matches no module - did you mean 'lm_head'?"),
    ({"modules_to_save": ("score",)}, "modules_to_save: 'score' matches no module"),
    ({"modules_to_save": ("mlp", "up_proj")}, "mlp.up_proj lies inside model.layers.0.mlp, which is named too"),
    ({"modules_to_save": ("q_proj",), "target_modules": ("q_proj",)}, "nothing is left to adapt"),
    ({"modules_to_save": ("self_attn",), "target_modules": ".*_proj", "rank_pattern": {"q_proj": 1}}, "'q_proj' matches no"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_matches_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        add_adapter(tiny(), LoraConfig(**settings))
    assert message in str(error.value)


def test_a_refusal_names_each_layer_that_exists() -> None:
    with torch.device("meta"):
        model = tiny(num_hidden_layers=5)
    with pytest.raises(InputError, match=r"layer 5; layers are 0\.\.4"):
        add_adapter(model, LoraConfig(layers_to_transform=(4, 5)))
