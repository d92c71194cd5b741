"""The oracle: Hugging Face models with the same random weights, and their down-casts to fp32 lifted for fp64 runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
import transformers.models.llama.modeling_llama as hf_llama
from torch import Tensor, nn

from llama import LlamaConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # real weights and data, beside the checkout on some machines
STORIES = DATA / "stories260K"
LLAMA2_TOKENIZER = DATA / "llama2_tokenizer"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real data is not beside this checkout")

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SHAPES = {  # every attention layout, and a tied head
    "mha": LlamaConfig(**TINY),
    "gqa": LlamaConfig(**TINY, num_key_value_heads=2),
    "mqa": LlamaConfig(**TINY, num_key_value_heads=1),
    "tied": LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=True),
}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights far from their initialisation: N(0, 0.08), norms 1 + N(0, 0.1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.08 * noise)


def hf_model(path: Path | str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> nn.Module:
    """HF's own model, read from a directory by HF's own code."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)


@contextmanager
def float64_oracle() -> Iterator[None]:
    """Inside, HF's RMSNorm, rotary tables and softmax compute in float64 instead of casting down to float32."""
    patch = pytest.MonkeyPatch()

    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        dim = self.config.hidden_size // self.config.num_attention_heads
        inverse = 1.0 / (self.config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2).double() / dim))
        angles = position_ids[..., None].double() * inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    softmax = nn.functional.softmax
    patch.setattr(hf_llama.LlamaRMSNorm, "forward", norm)
    patch.setattr(hf_llama.LlamaRotaryEmbedding, "forward", rotary)
    patch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))
    try:
        yield
    finally:
        patch.undo()


def largest(a: Tensor, b: Tensor) -> float:
    """max |a - b|."""
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()
