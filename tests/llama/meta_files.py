"""Meta's model directories, made by hand from the published table and not by our code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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


def meta_forward(
    params: dict[str, Any],
    w: dict[str, Tensor],
    ids: Tensor,
    adapter: dict[str, Tensor] | None = None,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> Tensor:
    """Meta's forward pass in float64: pairs (2i, 2i+1) of a head are complex numbers, turned by the rotary angle.

    With the tensors of an official LLaMA-Adapter file, the forward pass of that repository: its prompts are 10 long.
    """
    w = {name: tensor.double() for name, tensor in w.items()}
    B, T = ids.shape
    D = params["dim"] // params["n_heads"]
    angles = torch.arange(T).double()[:, None] * params.get("rope_theta", 10000.0) ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, D/2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weight

    def heads(x: Tensor, weight: Tensor, rotary: bool) -> Tensor:
        y = (x @ weight.t()).view(*x.shape[:2], -1, D)
        if rotary:
            y = torch.view_as_real(torch.view_as_complex(y.view(B, T, -1, D // 2, 2)) * turn).flatten(3)
        return y.repeat_interleave(params["n_heads"] // y.shape[2], dim=2).transpose(1, 2)  # (B, H, T, D)

    x = w["tok_embeddings.weight"][ids]
    for i in range(params["n_layers"]):
        layer = {name.removeprefix(f"layers.{i}.").removesuffix(".weight"): w[name] for name in w if f"layers.{i}." in name}
        h = norm(x, layer["attention_norm"])
        q, k = heads(h, layer["attention.wq"], True), heads(h, layer["attention.wk"], True)
        scores = (q @ k.mT / D**0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)
        y = scores.softmax(-1) @ heads(h, layer["attention.wv"], False)
        if adapter is not None and (row := i - params["n_layers"] + len(adapter["adapter_query.weight"]) // 10) >= 0:
            prompt = adapter["adapter_query.weight"].double()[None, 10 * row : 10 * row + 10]
            scores = q @ heads(prompt, layer["attention.wk"], False).mT / D**0.5
            gate = activation(adapter[f"layers.{i}.attention.gate"].double())
            y = y + gate * (scores.softmax(-1) @ heads(prompt, layer["attention.wv"], False))
        y = y.transpose(1, 2).reshape(B, T, -1)
        x = x + y @ layer["attention.wo"].t()
        h = norm(x, layer["ffn_norm"])
        h = F.silu(h @ layer["feed_forward.w1"].t()) * (h @ layer["feed_forward.w3"].t())
        x = x + h @ layer["feed_forward.w2"].t()
    return norm(x, w["norm.weight"]) @ w["output.weight"].t()
