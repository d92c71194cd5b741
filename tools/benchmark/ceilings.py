"""What the machine can do: the fastest matrix products and the fastest copy, measured where the rows are measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The shortest of several runs, after one that warms up."""
    best = float("inf")
    for index in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if index:
            best = min(best, time.perf_counter() - began)
    return best


def ceilings(device: torch.device) -> dict[str, float]:
    """GFLOP/s of square matrix products in bf16 and fp32, and GB/s of a copy (read and write counted)."""
    n = 8192 if device.type == "cuda" else 2048
    found = {}
    for name, dtype in (("gemm_bf16", torch.bfloat16), ("gemm_fp32", torch.float32)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * n**3 / seconds(partial(torch.mm, a, b), device) / 1e9
    source = torch.ones(2**27 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device) / 1e9
    return found
