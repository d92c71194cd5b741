"""`config.json` (Hugging Face) and `params.json` (Meta) to `LlamaConfig` and back.

A setting that would change what the model computes, and that this implementation does not have, is refused by name.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from llama.config import LlamaConfig
from llama.errors import InputError, listing

# HF's names that are ours too, with the value HF assumes when config.json leaves them out. The eps is never assumed: HF's
# default is not Llama 2's, and a wrong one only makes the model a little worse.
_HF_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# Settings that change the function, with the only values implemented here.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "attention_dropout": (0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
# Settings without effect on the function.
_HF_IGNORED = {
    *("architectures", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype", "use_cache"),
    *("pretraining_tp", "initializer_range", "transformers_version", "_name_or_path", "auto_map", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_return_dict", "task_specific_params"),
    *("problem_type", "chunk_size_feed_forward", "max_sequence_length", "unsloth_version", "unsloth_fixed", "name_or_path"),
}
_CLASSIFIER = "LlamaForSequenceClassification"
_HIDDEN = "head_hidden"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def config_from_hf(found: dict[str, Any], where: str | Path) -> LlamaConfig:
    """Read the contents of a HF `config.json`.

    Raises:
        InputError: not a Llama, or a setting that is not implemented, or an impossible value; names file and key.
    """
    if "model_type" not in found:
        raise InputError(f"{where}: no model_type; expected a Hugging Face config.json with model_type 'llama'")
    if "rms_norm_eps" not in found:
        raise InputError(f"{where}: no rms_norm_eps; expected a number (1e-5 in Llama 2), which is never assumed")
    for key, allowed in _HF_FIXED.items():
        if found.get(key, allowed[0]) not in allowed:
            raise InputError(f"{where}: {key} = {found[key]!r} is not supported; expected {allowed[0]!r}")
    dtype = found.get("dtype") or found.get("torch_dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
        raise InputError(f"{where}: dtype = {dtype!r} is unknown; expected one of {', '.join(_DTYPES)}")
    unused = [key for key in found if key not in {*_HF_DEFAULTS, *_HF_FIXED, *_HF_IGNORED, _HIDDEN} and found[key]]
    if unused:
        warnings.warn(f"{where}: settings not used here: {listing(unused, 10)}", stacklevel=2)

    values = {key: found.get(key, default) for key, default in _HF_DEFAULTS.items()}
    values["num_key_value_heads"] = values["num_key_value_heads"] or 0
    values["rope_theta"] = _rope_theta(found, where)
    values |= _head(found, where)
    if isinstance(values["eos_token_id"], list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = values[key] if isinstance(values[key], tuple) else (values[key],)
        if not all(i is None or type(i) is int for i in ids):
            raise InputError(f"{where}: {key} = {found[key]!r}; expected a token id")
    try:
        config = LlamaConfig(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if found.get("head_dim") not in (None, config.head_dim):
        raise InputError(
            f"{where}: head_dim = {found['head_dim']} is not supported;"
            f" expected hidden_size / num_attention_heads = {config.head_dim}"
        )
    return config


def _head(found: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """What the file says of a classifier's head, and of extra layers (ours alone)."""
    hidden = found.get(_HIDDEN, [])
    if not isinstance(hidden, list):
        raise InputError(f"{where}: {_HIDDEN} = {hidden!r}; expected a list of widths")
    if found.get("architectures") != [_CLASSIFIER] and not (hidden and found.get("problem_type")):
        return {"head_hidden": tuple(hidden)}
    named = found.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # HF leaves its default out
    if not isinstance(named, dict) or set(named) != {str(i) for i in range(len(named))} or not named:
        raise InputError(f"{where}: id2label = {named!r}; expected a name for each of the ids 0, 1, ...")
    labels = tuple(named[str(i)] for i in range(len(named)))
    return {"head_hidden": tuple(hidden), "id2label": labels, "problem_type": found.get("problem_type")}


def _rope_theta(found: dict[str, Any], where: str | Path) -> float:
    """theta, in HF's order of precedence: legacy `rope_scaling` replaces `rope_parameters`, which beats `rope_theta`."""
    parameters = found.get("rope_scaling") or found.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise InputError(f"{where}: rope parameters are {parameters!r}; expected an object")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", None):
        raise InputError(f"{where}: rope scaling of type {kind!r} is not supported; Llama 2 has none")
    if parameters.get("partial_rotary_factor") not in (1, None):
        raise InputError(f"{where}: partial_rotary_factor = {parameters['partial_rotary_factor']} is not supported")
    theta = parameters.get("rope_theta", found.get("rope_theta"))
    return 10000.0 if theta is None else theta


def config_to_hf(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of a `config.json` that old and new `transformers` read alike (both spellings of dtype and rope)."""
    dtype_name = str(dtype).removeprefix("torch.")
    eos = config.eos_token_id
    architecture = "LlamaModel" if config.head_hidden else _CLASSIFIER if config.id2label else "LlamaForCausalLM"
    head: dict[str, Any] = {_HIDDEN: list(config.head_hidden)} if config.head_hidden else {}
    if config.id2label:
        names = dict(enumerate(config.id2label))
        head |= {"id2label": {str(i): name for i, name in names.items()}, "problem_type": config.problem_type}
        head |= {"label2id": {name: i for i, name in names.items()}}
    return {
        "architectures": [architecture],
        **head,
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": config.head_dim,
        "initializer_range": 0.02,
        **{key: getattr(config, key) for key in _HF_DEFAULTS},
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def config_from_meta(params: dict[str, Any], vocab_rows: int, ffn_rows: int, where: str | Path) -> LlamaConfig:
    """Read the contents of a Meta `params.json`; the two sizes it does not state come from the tensors.

    Args:
        vocab_rows: rows of `tok_embeddings.weight`, used where the file says `vocab_size: -1`.
        ffn_rows: rows of `feed_forward.w1.weight` over all shards, checked against the file's formula.

    Raises:
        InputError: missing or impossible values, or a scaled rope (Llama 3.1 and later).
    """
    required = ("dim", "n_layers", "n_heads", "norm_eps", "multiple_of")
    if missing := [key for key in required if key not in params]:
        raise InputError(f"{where}: missing {', '.join(missing)}")
    if params.get("use_scaled_rope"):
        raise InputError(f"{where}: use_scaled_rope is not supported; Llama 2 has no rope scaling")
    try:
        hidden = _meta_ffn(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier"))
        vocab = params.get("vocab_size", -1)
        if vocab not in (-1, vocab_rows):
            raise InputError(f"vocab_size = {vocab}, but tok_embeddings.weight has {vocab_rows} rows")
        if hidden != ffn_rows:
            raise InputError(
                f"dim, multiple_of and ffn_dim_multiplier give a feed-forward size of {hidden},"
                f" but feed_forward.w1.weight has {ffn_rows} rows"
            )
        return LlamaConfig(
            vocab_size=vocab_rows,
            hidden_size=params["dim"],
            intermediate_size=hidden,
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params.get("n_kv_heads") or 0,
            max_position_embeddings=params.get("max_seq_len", 4096),
            rms_norm_eps=params["norm_eps"],
            rope_theta=params.get("rope_theta", 10000.0),
        )
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:  # InputError is a ValueError
        raise InputError(f"{where}: {error}") from None


def _meta_ffn(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's feed-forward size: 2/3 of 4 * dim, scaled, rounded up to a multiple."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * math.ceil(size / multiple_of)


def config_to_meta(config: LlamaConfig) -> dict[str, Any]:
    """The contents of a `params.json`; the feed-forward size is stated through Meta's formula."""
    wanted, dim = config.intermediate_size, config.hidden_size
    published = [(256, None), (4096, 1.3), (1, wanted / int(2 * (4 * dim) / 3)), (1, (wanted + 0.5) / int(2 * (4 * dim) / 3))]
    multiple_of, multiplier = next(pair for pair in published if _meta_ffn(dim, *pair) == wanted)
    params = {
        "dim": dim,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "multiple_of": multiple_of,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_seq_len": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
    }
    return {key: value for key, value in params.items() if value is not None}
