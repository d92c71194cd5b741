"""Meta's model directories, made by hand from the published table and not by our code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# As Meta writes them: (params.json, feed-forward size that its formula gives). vocab_size is -1 there, 96 in the tensors.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "mha": ({"dim": 64, "n_layers": 3, "n_heads": 8, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1}, 176),
    "gqa": (
        {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-6, "vocab_size": -1},
        192,
    ),
    "70b": (  # as many key/value heads as shards, a multiplier, and theta as Code Llama states it
        {
            **{"dim": 64, "n_layers": 3, "n_heads": 16, "n_kv_heads": 8, "multiple_of": 8, "ffn_dim_multiplier": 1.3},
            **{"norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": -1},
        },
        224,
    ),
}
ROWS = 96

# How model parallelism cuts each tensor (fairscale's Column- and RowParallelLinear, ParallelEmbedding); the rest is whole.
CUT = {"tok_embeddings": 1, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}


def meta_tensors(kind: str) -> dict[str, Tensor]:
    params, ffn = MODELS[kind]
    C, heads = params["dim"], params["n_heads"]
    kv = C // heads * params.get("n_kv_heads", heads)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (ROWS, C), "norm.weight": (C,), "output.weight": (ROWS, C)}
    for i in range(params["n_layers"]):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (C, C),
            f"layers.{i}.attention.wk.weight": (kv, C),
            f"layers.{i}.attention.wv.weight": (kv, C),
            f"layers.{i}.attention.wo.weight": (C, C),
            f"layers.{i}.feed_forward.w1.weight": (ffn, C),
            f"layers.{i}.feed_forward.w2.weight": (C, ffn),
            f"layers.{i}.feed_forward.w3.weight": (ffn, C),
            f"layers.{i}.attention_norm.weight": (C,),
            f"layers.{i}.ffn_norm.weight": (C,),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * noise if len(shape) == 1 else 0.15 * noise
    return tensors


def write_meta(path: Path, kind: str, shards: int = 1, **changes: Any) -> Path:
    """A directory as Meta ships it: params.json without the sizes, and tensors cut by hand. A change to None deletes."""
    path.mkdir()
    params = {key: value for key, value in {**MODELS[kind][0], **changes}.items() if value is not None}
    (path / "params.json").write_text(json.dumps(params))
    for index in range(shards):
        part = {}
        for name, tensor in meta_tensors(kind).items():
            cut = CUT.get(name.split(".")[-2])
            part[name] = tensor if cut is None else tensor.chunk(shards, cut)[index].clone()
        part["rope.freqs"] = torch.ones(4)  # Llama 2's files carry it; it follows from params.json
        torch.save(part, path / f"consolidated.{index:02d}.pth")
    return path
