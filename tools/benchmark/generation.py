"""Rows that generate: a batch of prompts, greedily, a fixed number of new tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llama
from fsdp_train.recompute import compile_layers
from tools.benchmark.cases import NEW_TOKENS

Generate = Callable[[list[list[int]]], Any]


def ours(directory: Path, device: torch.device, compiled: bool) -> tuple[llama.Llama, Generate, Callable[[Tensor], Tensor]]:
    """`llama.generate`."""
    model = llama.load(directory, torch.bfloat16, device)
    if compiled:
        compile_layers(model)

    def loss(ids: Tensor) -> Tensor:
        return model(ids, ids) / ids[:, 1:].numel()

    return model, lambda prompts: llama.generate(model, prompts, NEW_TOKENS), loss


def hugging_face(directory: Path, device: torch.device, compiled: bool) -> tuple[Any, Generate, Callable[[Tensor], Tensor]]:
    """`transformers`; compiled with its static cache, which is how it compiles generation."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = model.to(device).eval()
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    if compiled:
        options |= {"cache_implementation": "static"}
        model.forward = torch.compile(model.forward, fullgraph=True)

    def generate(prompts: list[list[int]]) -> Any:
        ids = torch.tensor(prompts, device=device)
        return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options).tolist()

    return model, generate, lambda ids: model(ids, labels=ids).loss
