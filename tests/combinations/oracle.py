"""Fine-tuning in float64, every step written out: what a run of the program must come to, whatever its settings.

One process, padded batches, Hugging Face's Llama; adapters are a few formulas of this file's own, read from the files that
PEFT and Hugging Face define. It knows no packing, sharding, accumulation or checkpointing, and imports nothing that it judges.

Legend: B batch, T tokens, S keys, C hidden width, H query heads, G key heads, D head size, P virtual tokens, N layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm

Sample = tuple[list[int], Any]  # token ids, and as many labels (-100: not learned), or a class
Step = tuple[float, Sequence[Tensor]]  # its loss, and its gradient before clipping


@dataclass(frozen=True)
class Recipe:
    """The settings that have a meaning for the result, and no others."""

    batches: Sequence[Sequence[Sample]]  # the samples of each step, over all processes and micro-batches
    lr: float
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    trains: Callable[[str, int], bool] = lambda name, step: True  # does this tensor in this step (gradual unfreezing)
    skipped: Collection[int] = ()  # steps whose update fp16's overflow leaves out


class Model:
    """Hugging Face's decoder in float64, with a head of this file's own.

    Attributes:
        tensors: all weights, by their names in the file.
        before: called before each forward pass.
        row_norms: of each weight that DoRA adapts, what it divides by and takes for a constant.
    """

    def __init__(self, directory: Path, dtype: torch.dtype, trains: Callable[[str], bool] = lambda name: False) -> None:
        """Args: a directory as Hugging Face writes it; the dtype in which the run keeps what is frozen; and what is not."""
        self.config = transformers.LlamaConfig.from_pretrained(directory)
        self.config._attn_implementation = "float64_oracle"
        self.tensors: dict[str, Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                self.tensors[name] = (tensor if trains(name) else tensor.to(dtype)).double()
        self.body: Any = transformers.LlamaModel(self.config).double().requires_grad_(False)
        own = {name.removeprefix("model."): tensor for name, tensor in self.tensors.items() if name.startswith("model.")}
        self.body.load_state_dict(own)
        for module in self.body.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = _norm(module)
        self.body.rotary_emb.forward = self._rotary
        self.before: Callable[[], None] = lambda: None
        self.first_position = 0
        self.row_norms: dict[str, Callable[[], Tensor]] = {}

    def _rotary(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        size, theta = self.config.hidden_size // self.config.num_attention_heads, self.config.rope_parameters["rope_theta"]
        angles = position_ids[..., None].double() * theta ** (-torch.arange(0, size, 2).double() / size)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    def loss(self, samples: Sequence[Sample]) -> Tensor:
        """The mean over all targets of a batch."""
        self.before()
        T = max(len(ids) for ids, _ in samples)
        input_ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in samples])
        positions = torch.arange(self.first_position, self.first_position + T)[None].expand_as(input_ids)
        hidden = self.body(input_ids, position_ids=positions, use_cache=False).last_hidden_state
        if "score.weight" in self.tensors:
            last = torch.tensor([len(ids) - 1 for ids, _ in samples])
            pooled = self._extra("score", hidden[torch.arange(len(samples)), last])
            return F.cross_entropy(pooled @ self.tensors["score.weight"].T, torch.tensor([label for _, label in samples]))
        if "lm_head.back.weight" in self.tensors:
            hidden = hidden + self._extra("lm_head", hidden) @ self.tensors["lm_head.back.weight"].T
        head = self.tensors.get("lm_head.weight", self.body.embed_tokens.weight)
        labels = torch.tensor([label + [-100] * (T - len(label)) for _, label in samples])
        return F.cross_entropy((hidden @ head.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def _extra(self, head: str, x: Tensor) -> Tensor:
        """Fully connected layers with ReLU, if the head has any."""
        for name in sorted(name for name in self.tensors if re.fullmatch(rf"{head}\.extra\.\d\.weight", name)):
            x = (x @ self.tensors[name].T + self.tensors[name.replace("weight", "bias")]).relu()
        return x

    def replace(self, name: str, tensor: Tensor) -> None:
        """Compute with this tensor from now on."""
        self.tensors[name] = tensor
        if name.startswith("model."):
            path, _, leaf = name.removeprefix("model.").rpartition(".")
            module = self.body.get_submodule(path)
            module._parameters.pop(leaf, None)
            setattr(module, leaf, tensor)


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """As Hugging Face's, which casts to fp32."""
    return lambda x: module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: object, scaling: float, dropout: float = 0.0, **_: object
) -> tuple[Tensor, None]:
    """softmax(q k^T / sqrt(D)) v, q (B, H, T, D), k and v (B, G, T, D); with keys and values in front (`module.prefix`), or
    a second softmax over a prompt's, times a gate, added to it (`module.prompt`, `module.gate`)."""
    B, H, T, D = q.shape
    G = k.shape[1]
    if hasattr(module, "prefix"):  # (2, G, P, D)
        k = torch.cat((module.prefix[0].expand(B, -1, -1, -1), k), dim=2)
        v = torch.cat((module.prefix[1].expand(B, -1, -1, -1), v), dim=2)
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    S = k.shape[2]
    behind = torch.ones(T, S, dtype=torch.bool).triu(1 + S - T)  # padding is, for every real token
    y = (q @ k.transpose(2, 3) * scaling).masked_fill(behind, -math.inf).softmax(-1) @ v
    if hasattr(module, "prompt"):  # (K, C)
        projected = [module.prompt @ projection.weight.T for projection in (module.k_proj, module.v_proj)]
        keys, values = (x.view(-1, G, D).transpose(0, 1).repeat_interleave(H // G, dim=0) for x in projected)
        y = y + module.gate * ((q @ keys.transpose(1, 2) * scaling).softmax(-1) @ values)
    return y.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("float64_oracle", _attention)


def train_base(model: Model, names: Iterable[str]) -> dict[str, Tensor]:
    """The model's own tensors."""
    trained = {name: model.tensors[name].detach().clone().requires_grad_() for name in names}
    for name, tensor in trained.items():
        model.replace(name, tensor)
    return trained


def attach(model: Model, directory: Path) -> dict[str, Tensor]:
    """An adapter as PEFT writes it, and what its `modules_to_save` holds."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    trained = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    for name, tensor in trained.items():
        own = name.removeprefix("base_model.model.")
        if own.endswith(".weight") and ".lora_" not in own:
            model.replace(own, tensor)
    if config["peft_type"] == "LORA":
        _attach_lora(model, config, trained)
    elif config["peft_type"] == "PREFIX_TUNING":
        hang_prefix(model, lambda: trained["prompt_embeddings"])
    else:
        _hang_prompts(model, config.get("gate_activation") == "tanh", trained)
    return trained


def _attach_lora(model: Model, config: dict[str, Any], trained: dict[str, Tensor]) -> None:
    """y = W x + s B A x; DoRA: m (W x + s B A x) / |W + s B A|, the norm of each row, a constant."""

    def pattern(name: str, path: str, otherwise: float) -> float:
        """PEFT's rule: the first key that is the path or its end."""
        found = (value for key, value in (config[name] or {}).items() if re.match(rf"(.*\.)?({key})$", path))
        return next(found, otherwise)

    for key in [name for name in trained if name.endswith(".lora_A.weight")]:
        path = key.removesuffix(".lora_A.weight")
        own = path.removeprefix("base_model.model.")
        rank, alpha = pattern("rank_pattern", own, config["r"]), pattern("alpha_pattern", own, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        module = model.body.get_submodule(own.removeprefix("model."))
        magnitude = trained.get(path + ".lora_magnitude_vector")
        module.forward, norms = _adapted(module, trained[key], trained[path + ".lora_B.weight"], scale, magnitude)
        if magnitude is not None:
            model.row_norms[path] = norms


def _adapted(module: Any, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None) -> tuple[Any, Any]:
    def weight() -> Tensor:
        return module.weight + scale * (B @ A)

    def norms() -> Tensor:
        return weight().detach().norm(dim=1)

    def forward(x: Tensor) -> Tensor:
        return x @ (weight() if magnitude is None else weight() * (magnitude / norms())[:, None]).T

    return forward, norms


def _hang_prompts(model: Model, tanh: bool, trained: dict[str, Tensor]) -> None:
    """LLaMA-Adapter: a prompt and a gate, one or one per head, in each of the last layers."""

    def before() -> None:
        for name, prompt in trained.items():
            if name.endswith(".adaption_prompt"):
                path = name.removeprefix("base_model.model.model.").removesuffix(".adaption_prompt")
                module, gate = model.body.get_submodule(path), trained[name.removesuffix("prompt") + "gate"]
                module.prompt, module.gate = prompt[0], (gate.tanh() if tanh else gate).view(-1, 1, 1)

    model.before = before


def hang_prefix(model: Model, prefix: Callable[[], Tensor]) -> None:
    """Keys and values (P, N * 2 * G * D) in front of every layer's own, at no position; real tokens begin behind them."""
    layers = model.body.layers

    def before() -> None:
        rows = prefix()
        parts = rows.view(len(rows), len(layers), 2, model.config.num_key_value_heads, -1).permute(1, 2, 3, 0, 4)
        for layer, part in zip(layers, parts, strict=True):
            layer.self_attn.prefix = part
        model.first_position = len(rows)

    model.before = before


def train(model: Model, trained: dict[str, Tensor], recipe: Recipe, around: Any = nullcontext) -> list[Step]:
    """AdamW with decoupled weight decay, in place. `around`: a context for each forward and backward pass."""
    steps: list[Step] = []
    moments = {name: (torch.zeros_like(tensor), torch.zeros_like(tensor), 0) for name, tensor in trained.items()}
    for number, batch in enumerate(recipe.batches):
        names = [name for name in trained if recipe.trains(name, number)]
        with around():
            loss = model.loss(batch)
            gradients = torch.autograd.grad(loss, [trained[name] for name in names])
        steps.append((loss.item(), gradients))
        if number in recipe.skipped:
            continue
        norm = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in gradients))
        clip = min(1.0, recipe.grad_clip / (norm + 1e-6)) if recipe.grad_clip else 1.0
        lr = recipe.lr * 0.5 * (1 + math.cos(math.pi * number / len(recipe.batches)))  # without warm-up
        for name, gradient in zip(names, gradients, strict=True):
            first, second, count = moments[name]
            first = 0.9 * first + 0.1 * clip * gradient
            second = 0.999 * second + 0.001 * (clip * gradient) ** 2
            moments[name] = first, second, count = first, second, count + 1
            size = (second / (1 - 0.999**count)).sqrt() + 1e-8
            with torch.no_grad():
                trained[name].mul_(1 - lr * recipe.weight_decay).sub_(lr * first / (1 - 0.9**count) / size)
    return steps
