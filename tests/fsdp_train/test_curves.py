"""50 steps of every method equal a plain transformers + peft + AdamW loop, on one process and on two with FSDP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import llama
from fsdp_train.main import main
from peft_impl import load_adapter
from tests.fsdp_train.curves import CURVE, STEPS, flags_of, hf_curve, losses, run_all, tokens_file
from tests.launch import spawn
from tests.oracle import SHAPES, STORIES, hf_model, needs_data, randomise

LR = {"lora": 2e-3, "llama_adapter": 2e-2, "prefix": 2e-2}  # a gate at zero and a prefix of size one have further to go


STARTS: dict[str, Callable[[int], Any]] = {  # PEFT's configuration by the number of layers
    "lora": lambda layers: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "llama_adapter": lambda layers: peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=layers - 1, task_type="CAUSAL_LM"),
    "prefix": lambda layers: peft.PrefixTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"),
}


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
        source = ("--model.path", path, "--data.path", tmp_path / "data.jsonl")
        start = ("--finetune.method", method, "--finetune.from_adapter", tmp_path / f"start {method}")
        return flags_of(tmp_path / f"{method}{processes}", processes, LR[method], *source, *start)

    for method in STARTS:
        main(flags(method, 1))
    spawn(2, run_all, [flags(method, 2) for method in STARTS], tmp_path=tmp_path)
    ids = torch.tensor([samples[0][0]])
    for method in STARTS:
        for processes in (1, 2):
            out = tmp_path / f"{method}{processes}"
            assert len(losses(out)) == STEPS
            worst = max(abs(a - b) for a, b in zip(losses(out), expected[method], strict=True))
            assert worst < CURVE, (method, processes)
            # What was trained is what peft reads: the loss of the trained adapter is the same on both sides.
            trained = peft.PeftModel.from_pretrained(hf_model(path), out / "adapter")
            ours = llama.load(path)
            load_adapter(ours, out / "adapter")
            with torch.no_grad():
                assert torch.allclose(ours(ids), trained(ids).logits, atol=1e-4, rtol=0)
