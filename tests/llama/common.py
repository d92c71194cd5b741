"""What the tests of this folder share: token ids, small models of ours and of HF, gradients by name."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from llama import Llama, LlamaConfig
from tests.oracle import SHAPES, randomise


def token_ids(*shape: int, vocabulary: int = 97, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def tiny(shape: str | LlamaConfig = "gqa", seed: int = 0) -> Llama:
    """A small model of ours with random weights."""
    model = Llama(SHAPES[shape] if isinstance(shape, str) else shape)
    randomise(model, seed)
    return model


def tiny_hf(config: LlamaConfig, seed: int = 0) -> nn.Module:
    """A small model of HF's own making, with random weights; its configuration is spelled out here, not by our code."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    randomise(model, seed)
    return model


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of a fixed random projection of `output`, by parameter name."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output * weights.to(output.dtype)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not torch.equal or not of one dtype, or that only one side has."""
    names = found.keys() ^ wanted.keys()
    return sorted(names) + [
        name
        for name in found.keys() & wanted.keys()
        if found[name].dtype != wanted[name].dtype or not torch.equal(found[name], wanted[name])
    ]


def files_below(path: Path) -> list[str]:
    """Every file and directory below `path`, hidden ones too."""
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


@contextmanager
def full_disk(room: int = 100_000) -> Iterator[None]:
    """Within, writing ends in an error after `room` bytes of a file, as on a disk without space."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # Python ignores the signal that would come with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
