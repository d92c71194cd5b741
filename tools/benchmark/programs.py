"""The programs that are compared. Each builds a model from the same directory of weights and gives back one function that
trains on a list of documents; ours is the training program's own step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_train.build import FinetuneConfig, ModelConfig, build_model, trained_names, wrap_model
from fsdp_train.data import Sample, collate
from fsdp_train.optim import OptimConfig
from fsdp_train.packing import PackedDataset
from fsdp_train.partial import PartialConfig
from fsdp_train.step import train_step
from fsdp_train.strategy import ParallelConfig
from fsdp_train.world import World
from llama.loss import IGNORE
from llama.weight_files import open_weights
from peft_impl import LlamaAdapterConfig, PrefixTuningConfig
from tools.benchmark.cases import ROW, Case

Step = Callable[[Sequence[Sample]], tuple[Tensor, int]]  # documents -> (sum of their losses, targets)
LEARNING_RATE = 1e-4
PROMPTS = 10  # virtual tokens of LLaMA-Adapter and prefix-tuning
PARTIAL_LAYERS = 2  # the last ones


def ours(case: Case, directory: Path, device: torch.device, compiled: bool) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    """`fsdp_train`'s model, optimizer and step."""
    weights = open_weights(directory)
    finetune = FinetuneConfig(
        method=case.method,  # type: ignore[arg-type]
        llama_adapter=_adapter(weights.config.num_hidden_layers) if case.method == "llama_adapter" else LlamaAdapterConfig(),
        prefix=PrefixTuningConfig(num_virtual_tokens=PROMPTS) if case.method == "prefix" else PrefixTuningConfig(),
        partial=PartialConfig(train=(f"last:{PARTIAL_LAYERS}",)) if case.method == "partial" else PartialConfig(),
    )
    parallel = ParallelConfig(
        precision="bf16",
        activation_checkpointing=case.checkpointing,  # type: ignore[arg-type]
        compile=compiled,
    )
    names = trained_names(finetune, weights.config, weights.config)
    model, fill = build_model(weights, ModelConfig(), finetune, weights.config, names, 0, torch.bfloat16)
    world = World(0, 1, 0, 1, device)
    wrapped, optimizer = wrap_model(model, parallel, OptimConfig(lr=LEARNING_RATE), world, fill)
    assert isinstance(optimizer, torch.optim.AdamW)

    def step(documents: Sequence[Sample]) -> tuple[Tensor, int]:
        if case.regime == "real":
            rows = [list(range(len(documents)))]
            batch = PackedDataset(Path(), "", {}, list(documents), rows=rows, width=ROW).batch([0], device)
        else:
            batch = collate(documents, device)
        result = train_step(wrapped, optimizer, [batch], world, 1.0, 0)
        return torch.tensor(result.loss * batch.targets), batch.targets

    return wrapped, optimizer, step


def _adapter(layers: int) -> LlamaAdapterConfig:
    return LlamaAdapterConfig(adapter_len=PROMPTS, adapter_layers=layers)


def hugging_face(case: Case, directory: Path, device: torch.device, compiled: bool) -> Any:
    """`transformers` and `peft`, in a plain loop. A frozen base is in bf16, what trains in fp32, and autocast computes in
    bf16: faster here than PEFT's own casts to fp32, and what `Trainer(bf16=True)` does."""
    import peft
    from transformers import AutoModelForCausalLM

    frozen = case.method not in ("full", "partial")
    kind: dict[str, Any] = {"dtype": torch.bfloat16 if frozen else torch.float32, "attn_implementation": "sdpa"}
    model: Any = AutoModelForCausalLM.from_pretrained(directory, **kind)
    model = model.to(device)
    layers = model.config.num_hidden_layers
    task: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if case.method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], **task))
    elif case.method == "llama_adapter":
        settings = peft.AdaptionPromptConfig(adapter_len=PROMPTS, adapter_layers=layers, **task)
        model = peft.get_peft_model(model, settings)
    elif case.method == "prefix":
        model = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=PROMPTS, **task))
    elif case.method == "partial":
        model.requires_grad_(False)
        model.model.layers[-PARTIAL_LAYERS:].requires_grad_(True)
    if case.checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    callee = torch.compile(model) if compiled else model

    def loss(ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        padded = {} if bool(mask.all()) else {"attention_mask": mask}
        with torch.autocast(device.type, torch.bfloat16):
            return callee(input_ids=ids, labels=labels, use_cache=False, **padded).loss

    return model, *_plain_loop(model, loss, device)


def litgpt(case: Case, directory: Path, device: torch.device, compiled: bool) -> Any:
    """Lightning's litgpt: everything in bf16, its chunked head and loss (litgpt/finetune/lora.py)."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    weights = open_weights(directory)
    c = weights.config
    lora: dict[str, Any] = {"lora_r": 8, "lora_alpha": 16, "lora_query": True, "lora_value": True}
    shape: dict[str, Any] = {
        "block_size": case.length, "vocab_size": c.vocab_size, "padded_vocab_size": c.vocab_size, "bias": False,
        "n_layer": c.num_hidden_layers, "n_head": c.num_attention_heads, "n_query_groups": c.num_key_value_heads,
        "n_embd": c.hidden_size, "intermediate_size": c.intermediate_size, "rotary_percentage": 1.0,
        "parallel_residual": False, "norm_class_name": "RMSNorm", "norm_eps": c.rms_norm_eps, "mlp_class_name": "LLaMAMLP",
    }  # fmt: skip
    model = GPT(Config(name="benchmark", **shape, **(lora if case.method == "lora" else {})))
    found: dict[str, Tensor] = {}
    hf = {name: weights.read(name) for name in weights.shapes}
    copy_weights_hf_llama(model.config, {}, found, hf)
    model.load_state_dict(found, strict=False)
    model = model.to(device, torch.bfloat16)
    if case.method == "lora":
        mark_only_lora_as_trainable(model)
    model.train()
    callee = torch.compile(model) if compiled else model

    def loss(ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logits = callee(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        return chunked_cross_entropy(logits, labels[..., 1:], ignore_index=IGNORE)

    return model, *_plain_loop(model, loss, device)


def torchtune(case: Case, directory: Path, device: torch.device, compiled: bool) -> Any:
    """torchtune: everything in bf16, its chunked loss; compiled as its recipes do, layer by layer."""
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama2 import llama2, lora_llama2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import compile_loss, compile_model

    weights = open_weights(directory)
    c = weights.config
    shape: dict[str, Any] = {
        "vocab_size": c.vocab_size, "num_layers": c.num_hidden_layers, "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_key_value_heads, "embed_dim": c.hidden_size, "max_seq_len": case.length,
        "intermediate_dim": c.intermediate_size, "norm_eps": c.rms_norm_eps,
    }  # fmt: skip
    build = lora_llama2(["q_proj", "v_proj"], lora_rank=8, lora_alpha=16, **shape) if case.method == "lora" else llama2(**shape)
    hf = {name: weights.read(name) for name in weights.shapes}
    build.load_state_dict(hf_to_tune(hf, c.num_attention_heads, c.num_key_value_heads, c.hidden_size), strict=False)
    model = build.to(device, torch.bfloat16)
    if case.method == "lora":
        set_trainable_params(model, get_adapter_params(model))
    model.train()
    criterion = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(criterion.num_output_chunks)
    if compiled:
        compile_model(model, verbose=False)
        compile_loss(criterion, verbose=False)

    def loss(ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        shifted = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)), dim=1)
        return criterion(model(ids), shifted)

    return model, *_plain_loop(model, loss, device)


def _plain_loop(model: nn.Module, loss: Any, device: torch.device) -> tuple[torch.optim.Optimizer, Step]:
    """Forward, backward, clip, fused AdamW, on a batch padded on the right; `loss` gives the mean over targets."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(documents: Sequence[Sample]) -> tuple[Tensor, int]:
        batch = collate(documents, device)
        ids = batch.inputs["input_ids"]
        lengths = torch.tensor([len(d.ids) for d in documents], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        found = loss(ids, batch.labels, mask)
        found.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return found.detach() * batch.targets, batch.targets

    return optimizer, step


PROGRAMS: dict[str, tuple[Callable[..., Any], bool, tuple[str, ...]]] = {  # by row: builder, compiled, what it needs
    "ours": (ours, True, ()),
    "ours, eager": (ours, False, ()),
    "HF": (hugging_face, False, ("transformers", "peft")),
    "HF, compiled": (hugging_face, True, ("transformers", "peft")),
    "litgpt": (litgpt, False, ("litgpt",)),
    "litgpt, compiled": (litgpt, True, ("litgpt",)),
    "torchtune": (torchtune, False, ("torchtune", "torchao")),
    "torchtune, compiled": (torchtune, True, ("torchtune", "torchao")),
}
