"""50 steps of every method equal a plain transformers + peft + AdamW loop, on one process and on two with FSDP."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup

import llama
from fsdp_train.config import parse_config
from fsdp_train.main import complete, main
from fsdp_train.parallel import ParallelConfig, process_group
from fsdp_train.run import Run
from peft_impl import load_adapter
from tests.launch import spawn
from tests.oracle import SHAPES, STORIES, hf_model, needs_data, randomise

STEPS, GLOBAL_BATCH = 50, 8
LR = {"lora": 2e-3, "llama_adapter": 2e-2, "prefix": 2e-2}  # a gate at zero and a prefix of size one have further to go
CURVE = 1e-5  # per step, fp32: the bound; different kernels and orders of summation


def tokens_file(path: Path, vocab: int) -> list[tuple[list[int], list[int]]]:
    """Ragged samples with masked prompts, in our `tokens` format: two alternating ids, so there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for _ in range(100):  # not a multiple of the batch: an epoch's last step has what is left
        length = int(torch.randint(4, 40, (), generator=generator))
        ids = (torch.randint(3, vocab, (2,), generator=generator).repeat(length)[:length]).tolist()
        masked = int(torch.randint(1, length - 1, (), generator=generator))
        samples.append((ids, [-100] * masked + ids[masked:]))
    path.write_text("".join(json.dumps({"input_ids": i, "labels": l}) + "\n" for i, l in samples))
    return samples


STARTS: dict[str, Callable[[int], Any]] = {  # PEFT's configuration by the number of layers
    "lora": lambda layers: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "llama_adapter": lambda layers: peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=layers - 1, task_type="CAUSAL_LM"),
    "prefix": lambda layers: peft.PrefixTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"),
}


def hf_curve(model: Any, samples: list[tuple[list[int], list[int]]], lr: float) -> list[float]:
    """The plain loop: one padded batch per step, mean loss over its targets."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    losses, epoch_steps = [], -(-len(samples) // GLOBAL_BATCH)
    for step in range(STEPS):
        start = step % epoch_steps * GLOBAL_BATCH
        batch = samples[start : start + GLOBAL_BATCH]
        length = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [0] * (length - len(i)) for i, _ in batch])
        labels = torch.tensor([l + [-100] * (length - len(l)) for _, l in batch])
        mask = torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i, _ in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_all(rank: int, runs: list[list[str]]) -> None:
    """Several runs of the program in one group of processes."""
    with process_group(ParallelConfig()) as world:
        for flags in runs:
            complete(Run(parse_config(flags), world))


@pytest.mark.parametrize("base", ["gqa", pytest.param("stories260K", marks=needs_data)])
def test_loss_per_step_equals_peft(base: str, tmp_path: Path) -> None:
    if base == "gqa":
        model = llama.Llama(SHAPES["gqa"])
        randomise(model)
        llama.save(model, tmp_path / "base")
    path = STORIES if base == "stories260K" else tmp_path / "base"
    config = llama.load(path).config
    samples = tokens_file(tmp_path / "data.jsonl", config.vocab_size)
    expected = {}
    for method, start in STARTS.items():
        torch.manual_seed(0)
        theirs = peft.get_peft_model(hf_model(path), start(config.num_hidden_layers))
        theirs.save_pretrained(tmp_path / f"start {method}")
        expected[method] = hf_curve(theirs.train(), samples, LR[method])
        assert sum(expected[method][-10:]) < sum(expected[method][:10])

    def flags(method: str, processes: int) -> list[str]:
        words = [
            *("--model.path", path, "--data.path", tmp_path / "data.jsonl", "--data.shuffle", "false"),
            *("--finetune.method", method, "--finetune.from_adapter", tmp_path / f"start {method}"),
            *("--optim.lr", LR[method], "--optim.weight_decay", 0.01),
            *("--parallel.precision", "fp32", "--train.max_steps", STEPS, "--train.batch_size", 4 // processes),
            *("--train.grad_accum", 2, "--train.output_dir", tmp_path / f"{method}{processes}"),
            *("--log.every", 1, "--train.samples", 0),
        ]
        return list(map(str, words))

    for method in STARTS:
        main(flags(method, 1))
    spawn(2, run_all, [flags(method, 2) for method in STARTS], tmp_path=tmp_path)
    ids = torch.tensor([samples[0][0]])
    for method in STARTS:
        for processes in (1, 2):
            out = tmp_path / f"{method}{processes}"
            losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            assert len(losses) == STEPS
            worst = max(abs(a - b) for a, b in zip(losses, expected[method], strict=True))
            assert worst < CURVE, (method, processes)
            # What was trained is what peft reads: the loss of the trained adapter is the same on both sides.
            trained = peft.PeftModel.from_pretrained(hf_model(path), out / "adapter")
            ours = llama.load(path)
            load_adapter(ours, out / "adapter")
            with torch.no_grad():
                assert torch.allclose(ours(ids), trained(ids).logits, atol=1e-4, rtol=0)
