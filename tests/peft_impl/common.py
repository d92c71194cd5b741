"""What the tests of this folder share: token ids, configurations for ours and PEFT alike, trained-looking adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn

from llama import Llama
from peft_impl import LlamaAdapterConfig, LoraConfig, PrefixTuningConfig, add_adapter
from peft_impl.adapters import AdapterLeaf, adapters_of, method_of
from tests.oracle import SHAPES, hf_model, randomise

IDS = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(0))

# Settings that ours and PEFT's LoraConfig both take. Ranks and alphas are such that no scale is a power of two: a scale
# applied in another place would then change bits.
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "rslora": {"use_rslora": True, "r": 5, "lora_alpha": 7},
    "dora": {"use_dora": True, "target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\..*_proj": 5, "q_proj": 3},
        "alpha_pattern": {"model.layers.0.mlp.down_proj": 3, "k_proj": 5.5},
    },
    "regex": {"target_modules": r".*layers\.[02]\..*(gate|o)_proj"},
    "some layers": {"layers_to_transform": [0, 2], "target_modules": ["v_proj", "up_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["norm"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "dora and head": {"use_dora": True, "modules_to_save": ["lm_head"], "target_modules": ["o_proj"]},
}


ANY_METHOD = (  # one configuration of each
    LoraConfig(),
    LoraConfig(use_dora=True),
    LlamaAdapterConfig(adapter_len=4, adapter_layers=2),
    LlamaAdapterConfig(4, 3, "head", "tanh"),
    PrefixTuningConfig(num_virtual_tokens=5),
    PrefixTuningConfig(4, prefix_projection=True, encoder_hidden_size=24),
)


def lora_config(**settings: Any) -> LoraConfig:
    """Ours, with PEFT's default alpha, and tuples for lists."""
    settings = {"lora_alpha": 8, **settings}
    return LoraConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


def tiny(shape: str = "gqa", dtype: torch.dtype = torch.float32, **changes: int) -> Llama:
    """A small model with random weights; `bases` holds the same ones as files."""
    model = Llama(dataclasses.replace(SHAPES[shape], **changes) if changes else SHAPES[shape])
    randomise(model)
    return model.to(dtype).eval()


def perturb(model: nn.Module, seed: int = 1) -> None:
    """Move everything that trains away from its start, as training does: no B is zero, no magnitude the base's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def adapted(shape: str = "gqa", dtype: torch.dtype = torch.float32, seed: int = 1, **settings: Any) -> Llama:
    """A small model with one adapter in use that is away from its start."""
    model = tiny(shape, dtype)
    add_adapter(model, lora_config(**settings))
    perturb(model, seed)
    return model


def peft_model(base: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **settings: Any) -> nn.Module:
    """PEFT's own model of the same kind over HF's own model."""
    model = peft.get_peft_model(hf_model(base, dtype, attention), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    perturb(model)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same names in the same order, the same bits and dtypes."""
    assert list(found) == list(wanted)
    assert [name for name in wanted if found[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def peft_keys(model: Llama, name: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's parameters by their keys in a PEFT file."""
    packed = method_of(adapters_of(model).configs[name]).pack(model, name, dict(model.named_parameters()))
    return cast(dict[str, nn.Parameter], packed)


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a PEFT model by their keys in a PEFT file."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name.replace(".modules_to_save.default", "").replace(".default", "")
            found[key.replace("magnitude_vector.weight", "magnitude_vector")] = parameter
    return found


def adapted_paths(model: nn.Module) -> set[str]:
    """Paths of the modules that have a leaf."""
    return {path.rpartition(".lora.")[0] for path, module in model.named_modules() if isinstance(module, AdapterLeaf)}
