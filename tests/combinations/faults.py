"""Deliberate faults, one in the implementation of each option, written down before the array ran for the first time.

Each must be seen by the array or by the suite: tests are as good as the faults that they find.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One change of the code: what it is, where, what stands there, and what is put in its place."""

    what: str
    file: str
    before: str
    after: str


LORA, PROMPT, PREFIX = "peft_impl/lora.py", "peft_impl/llama_adapter.py", "peft_impl/prefix_tuning.py"
PARALLEL, STEP, OPTIM = "fsdp_train/parallel.py", "fsdp_train/step.py", "fsdp_train/optim.py"
FAULTS = [
    Fault(
        "LoRA's scale is applied twice",
        LORA,
        "return self._project(self.dropout(x)) * self.scale",
        "return self._project(self.dropout(x)) * self.scale * self.scale",
    ),
    Fault("rsLoRA scales as LoRA", LORA, "alpha / math.sqrt(r) if config.use_rslora", "alpha / r if config.use_rslora"),
    Fault(
        "alpha_pattern is not looked at",
        LORA,
        "pattern_value(config.alpha_pattern, path, config.lora_alpha)",
        "config.lora_alpha",
    ),
    Fault(
        "DoRA's norm is that of the frozen weight alone",
        LORA,
        "return super().merged_weight(weight).norm(dim=1)",
        "return weight.to(self.B.dtype).norm(dim=1)",
    ),
    Fault(
        "DoRA's two terms have a mask each",
        LORA,
        "y = F.linear(x, weight.to(x.dtype))",
        "y = F.linear(self.dropout(x), weight.to(x.dtype))",
    ),
    Fault(
        "a compiled layer draws its mask anew in backward",
        "peft_impl/dropout.py",
        "if self.words is None or not torch.compiler.is_compiling():",
        "if True:",
    ),
    Fault(
        "LLaMA-Adapter's gate has no tanh",
        PROMPT,
        'return self.gate.tanh() if self.gate_activation == "tanh" else self.gate',
        "return self.gate",
    ),
    Fault("prefix keys are not turned back", PREFIX, "torch.tensor([-self.length]", "torch.tensor([0 * self.length]"),
    Fault(
        "the prefix's MLP has no tanh",
        PREFIX,
        "self.output = F.linear(self.embedding, self.weight, self.bias).tanh()",
        "self.output = F.linear(self.embedding, self.weight, self.bias)",
    ),
    Fault(
        "a document's first token is predicted from the document before it",
        "fsdp_train/packing.py",
        "labels[row, start + 1 : end] = document.labels[1:]",
        "labels[row, start:end] = document.labels",
    ),
    Fault(
        "documents of a row see those before them",
        "llama/attention.py",
        "return _blockwise(q, k, v, None if mask is None else mask.bounds)",
        "return _blockwise(q, k, v, None)",
    ),
    Fault(
        "padding is learned",
        "fsdp_train/data.py",
        "labels = np.full_like(ids, IGNORE)",
        "labels = np.zeros_like(ids)",
    ),
    Fault(
        "a step's loss is divided by this process's targets",
        STEP,
        "world.size / targets * scale",
        "scale / max(1, batch.targets)",
    ),
    Fault(
        "no_sync leaves out the last micro-batch, too",
        STEP,
        "if no_sync and index < len(batches) - 1",
        "if no_sync and index < len(batches)",
    ),
    Fault("fp16's scale stays in the gradient", STEP, "parameter.grad.mul_(1 / scale)", "parameter.grad.mul_(1)"),
    Fault(
        "FSDP's gradients are clipped by each process's own norm",
        PARALLEL,
        "return model.clip_grad_norm_(largest)",
        "return nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], largest)",
    ),
    Fault(
        "fully_shard's copies do not add up their gradients",
        PARALLEL,
        'mesh=mesh if replicas > 1 else mesh["shard"],',
        'mesh=mesh["shard"],',
    ),
    Fault(
        "optimizer_in_backward forgets weight decay",
        OPTIM,
        "optimizer = torch.optim.AdamW([parameter], lr=config.lr, weight_decay=config.weight_decay, fused=True)",
        "optimizer = torch.optim.AdamW([parameter], lr=config.lr, weight_decay=0.0, fused=True)",
    ),
    Fault(
        "selective checkpointing gives back what it kept in the wrong order",
        "fsdp_train/recompute.py",
        "return self._kept[function].popleft()",
        "return self._kept[function].pop()",
    ),
    Fault("an evaluation leaves dropout switched off", "fsdp_train/train.py", "model.train(was_training)", "pass"),
    Fault(
        "gradual unfreezing is one stage late",
        "fsdp_train/partial.py",
        "parameter.requires_grad_(stage <= reached)",
        "parameter.requires_grad_(stage < max(1, reached))",
    ),
    Fault(
        "the layers with the smallest gradients are chosen",
        "fsdp_train/partial.py",
        "argsort(descending=True, stable=True)[:count]",
        "argsort(descending=False, stable=True)[:count]",
    ),
    Fault(
        "a resumed run begins one step further in its data",
        "fsdp_train/order.py",
        "offset=position.epoch * self.steps_per_epoch + within - step",
        "offset=position.epoch * self.steps_per_epoch + within - step + 1",
    ),
    Fault(
        "the samples that an epoch's last step has are left out",
        "fsdp_train/order.py",
        "return -(-self.samples // self.global_batch)",
        "return max(1, self.samples // self.global_batch)",
    ),
    Fault(
        "a classifier looks at the token before the last",
        "fsdp_train/classification.py",
        "torch.tensor([len(s.ids) - 1 for s in samples] or [0])",
        "torch.tensor([max(0, len(s.ids) - 2) for s in samples] or [0])",
    ),
    Fault(
        "a shard is saved twice, in the place of the others",
        PARALLEL,
        "whole = cast(DTensor, whole.to(world.device)).full_tensor()",
        "whole = torch.cat([local_part(whole)] * world.size)[: len(whole)]",
    ),
]
