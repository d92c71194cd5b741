"""config.json as transformers reads it: defaults, precedence, both spellings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llama import LlamaConfig
from llama.config_files import config_from_hf, config_to_hf
from llama.files import read_json
from tests.oracle import SHAPES, STORIES, needs_data

FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FIELDS += ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")

LLAMA2 = {  # as the published Llama-2-7b-hf states it
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096},
    **{"initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32},
    **{"num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None},
    **{"bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True},
    **{"transformers_version": "4.31.0.dev0", "vocab_size": 32000},
}
LEAST = {"model_type": "llama", "rms_norm_eps": 1e-6}
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing but what must be there": LEAST,
    "llama 2": LLAMA2,
    "heads null": {**LEAST, "num_key_value_heads": None, "head_dim": None},
    "grouped heads": {**LEAST, "num_key_value_heads": 8, "head_dim": 128},
    "several eos": {**LEAST, "eos_token_id": [2, 32007]},
    "no eos": {**LEAST, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0},
    "theta at the top": {**LEAST, "rope_theta": 1e6},
    "theta null": {**LEAST, "rope_theta": 5e5, "rope_scaling": None},
    "theta in rope_parameters": {**LEAST, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "rope_parameters beat the top": {
        **{**LEAST, "rope_theta": 6.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    },
    "rope_parameters without theta": {**LEAST, "rope_theta": 6.0, "rope_parameters": {"rope_type": "default"}},
    "rope_parameters null": {**LEAST, "rope_theta": 6.0, "rope_parameters": None},
    "rope_parameters empty": {**LEAST, "rope_theta": 6.0, "rope_parameters": {}},
    "rope_scaling replaces rope_parameters": {
        **{**LEAST, "rope_scaling": {"rope_type": "default", "rope_theta": 8.0}},
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    },
    "rope_scaling without theta replaces rope_parameters": {
        **{**LEAST, "rope_scaling": {"type": "default"}},
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    },
    "rope_scaling without theta leaves the top": {
        **{**LEAST, "rope_scaling": {"type": "default"}, "rope_theta": 6.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    },
    "dtype and torch_dtype": {**LEAST, "dtype": "bfloat16", "torch_dtype": "float16"},
}


def as_hf_reads(settings: dict[str, Any], path: Path) -> transformers.LlamaConfig:
    (path / "config.json").write_text(json.dumps(settings))
    return transformers.AutoConfig.from_pretrained(path)


def assert_agree(ours: LlamaConfig, oracle: transformers.LlamaConfig) -> None:
    for field in FIELDS:
        found = getattr(ours, field)
        assert (list(found) if isinstance(found, tuple) else found) == getattr(oracle, field), field
    assert ours.rope_theta == oracle.rope_parameters["rope_theta"]
    assert oracle.rope_parameters["rope_type"] == "default"
    assert ours.head_dim == oracle.head_dim


@pytest.mark.parametrize("name", SETTINGS)
def test_we_read_what_hf_reads(name: str, tmp_path: Path) -> None:
    assert_agree(config_from_hf(SETTINGS[name], "config.json"), as_hf_reads(SETTINGS[name], tmp_path))


@needs_data
def test_the_real_config(tmp_path: Path) -> None:
    settings = json.loads((STORIES / "config.json").read_text())
    assert_agree(config_from_hf(settings, "config.json"), as_hf_reads(settings, tmp_path))


def test_defaults_are_hfs_not_llama_2s() -> None:
    """A file that leaves a value out means HF's default; the eps alone is never assumed (`test_refusals.py`)."""
    config = config_from_hf(LEAST, "config.json")
    assert (config.max_position_embeddings, config.rope_theta) == (2048, 10000.0)
    assert LlamaConfig().max_position_embeddings == 4096


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2), encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == LLAMA2


@pytest.mark.parametrize("eos", [None, 2, (2, 32007)])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_we_write_both_read_back(shape: str, eos: int | tuple[int, ...] | None, tmp_path: Path) -> None:
    config = LlamaConfig(
        **{field: getattr(SHAPES[shape], field) for field in FIELDS if field not in ("eos_token_id", "rms_norm_eps")},
        rope_theta=123456.0,
        rms_norm_eps=3e-6,
        eos_token_id=eos,
    )
    written = json.loads(json.dumps(config_to_hf(config, torch.bfloat16), allow_nan=False))
    assert config_from_hf(written, "config.json") == config
    oracle = as_hf_reads(written, tmp_path)
    assert_agree(config, oracle)
    assert oracle.dtype == torch.bfloat16
    assert oracle.architectures == ["LlamaForCausalLM"]


def test_both_spellings_are_written() -> None:
    """transformers 5 reads dtype and rope_parameters, older releases torch_dtype and rope_theta."""
    written = config_to_hf(LlamaConfig(rope_theta=5e5), torch.float16)
    assert written["dtype"] == written["torch_dtype"] == "float16"
    assert written["rope_theta"] == 5e5
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert (written["attention_bias"], written["mlp_bias"], written["hidden_act"]) == (False, False, "silu")


def test_a_setting_nobody_knows_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match=r"config\.json: settings not used here: use_sliding_window"):
        config_from_hf({**LEAST, "use_sliding_window": True}, "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_from_hf(LLAMA2, "config.json")
