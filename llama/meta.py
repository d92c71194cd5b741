"""Meta's own layout: names, how shards are cut, the order of query and key rows, and export.

Meta turns the pairs (2i, 2i+1) of a head by the rotary angle, HF the pairs (i, i + D/2); the rows of the query and key
projections are therefore stored in another order. `torch.equal` after a round trip, and logits in the tests, prove it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from llama.config_files import config_to_meta
from llama.errors import InputError
from llama.export import check_finite, check_plain
from llama.files import new_directory, write_json
from llama.model import Llama

# HF's name (within a layer, or whole) -> Meta's
NAMES = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_SHARD_DIM = {"tok_embeddings": 1, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "output": 0}


def meta_name(name: str) -> str:
    """Meta's name of a tensor that HF calls `name`."""
    layer, rest = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*)", name).groups()  # type: ignore[union-attr]
    return (layer or "") + NAMES[rest]


def shard_dim(name: str) -> int | None:
    """The dimension along which model-parallel shards of Meta's tensor `name` are cut; None: whole in every shard."""
    return _SHARD_DIM.get(name.removesuffix(".weight").rpartition(".")[2])


def to_hf_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key projection (heads * D, C) from Meta's to HF's rotary layout."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def to_meta_rows(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_hf_rows`."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def save_meta(
    model: Llama,
    path: str | os.PathLike[str],
    shards: int = 1,
    dtype: torch.dtype | None = None,
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write `params.json` and `consolidated.NN.pth`, cut for `shards`-way model parallelism as Meta cuts them.

    A tied head is written out as `output.weight`, since Meta's format has no tying.

    Raises:
        InputError: a dimension that `shards` does not divide, `path` exists and is not empty or cannot be written, or the
            model holds tensors that are not a Llama's (an adapter that is not merged) or not finite.
    """
    config = model.config
    if shards < 1:
        raise InputError(f"shards is {shards}; expected a positive integer")
    if config.num_key_value_heads % shards:
        raise InputError(f"{config.num_key_value_heads} key/value heads cannot be cut into {shards} shards")
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    if config.id2label or config.head_hidden:
        raise InputError("Meta's format has no place for this head; save the model in Hugging Face's")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    check_plain(config, tensors)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    for name, tensor in tensors.items():
        check_finite(name, tensor.to(dtype or tensor.dtype))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = to_meta_rows(tensor, config.head_dim)
        meta = meta_name(name)
        dim = shard_dim(meta)
        if dim is not None and tensor.shape[dim] % shards:
            raise InputError(f"{meta} has {tensor.shape[dim]} entries along dimension {dim}; {shards} shards do not divide it")
        pieces = [tensor] * shards if dim is None else tensor.chunk(shards, dim)
        for part, piece in zip(parts, pieces, strict=True):
            part[meta] = piece.to(dtype or piece.dtype).contiguous().clone()  # a view would save its whole storage
    with new_directory(path) as temporary:
        write_json(temporary / "params.json", config_to_meta(config))
        for index, part in enumerate(parts):
            with open(temporary / f"consolidated.{index:02d}.pth", "wb") as file:
                torch.save(part, file)
        if tokenizer_from is not None and (Path(tokenizer_from) / "tokenizer.model").is_file():
            shutil.copyfile(Path(tokenizer_from) / "tokenizer.model", temporary / "tokenizer.model")
