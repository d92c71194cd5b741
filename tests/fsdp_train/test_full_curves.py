"""50 steps of full and partial fine-tuning and of classifiers equal a plain transformers (+ peft) loop, on one process and on
two with FSDP; and `transformers` opens what they leave."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, get_cosine_schedule_with_warmup

import llama
from fsdp_train.main import main
from llama import replace_head
from tests.fsdp_train.conftest import alpaca_records
from tests.fsdp_train.curves import CURVE, GLOBAL_BATCH, STEPS, flags_of, hf_curve, losses, run_all, tokens_file
from tests.launch import spawn
from tests.oracle import DATA, SHAPES, STORIES, hf_model, largest, needs_data, randomise

LR = 1e-4  # as in the demo: Adam divides by the size of a gradient, and so multiplies the noise of tiny ones by the rate
LOGITS = 1e-5  # fp32; other kernels


def opened(path: Path, kind: Any) -> nn.Module:
    """What transformers makes of a directory, in which it must miss nothing and find nothing that it does not know."""
    model, info = kind.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model


# --- language models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["gqa", pytest.param("stories260K", marks=needs_data)])
def test_full_and_partial_fine_tuning_equal_transformers(base: str, tmp_path: Path) -> None:
    if base == "gqa":
        model = llama.Llama(SHAPES["gqa"])
        randomise(model)
        llama.save(model, tmp_path / "base")
    path = STORIES if base == "stories260K" else tmp_path / "base"
    data = tokens_file(tmp_path / "data.jsonl", llama.load(path).config.vocab_size)
    source = ("--model.path", path, "--data.path", tmp_path / "data.jsonl")
    partial = ("--finetune.method", "partial", "--finetune.partial.train", "last:2,norm")
    methods = {"full": ("--finetune.method", "full"), "partial": partial}

    def flags(method: str, processes: int) -> list[str]:
        return flags_of(tmp_path / f"{method}{processes}", processes, LR, *source, *methods[method])

    for method in methods:
        main(flags(method, 1))
    spawn(2, run_all, [flags(method, 2) for method in methods], tmp_path=tmp_path)
    layers = llama.load(path).config.num_hidden_layers
    for method, starts in (("full", ("",)), ("partial", ("model.norm.", *(f"model.layers.{layers - i}." for i in (1, 2))))):
        theirs = hf_model(path).train()
        for name, parameter in theirs.named_parameters():
            parameter.requires_grad_(name.startswith(starts))
        expected = hf_curve(theirs, data, LR)
        assert sum(expected[-10:]) < sum(expected[:10])
        for processes in (1, 2):
            out = tmp_path / f"{method}{processes}"
            assert max(abs(a - b) for a, b in zip(losses(out), expected, strict=True)) < CURVE, (method, processes)
            ids = torch.tensor([data[0][0]])
            with torch.no_grad():
                logits = opened(out / "model", AutoModelForCausalLM)(ids).logits
                assert largest(llama.load(out / "model")(ids), logits) < LOGITS
                assert largest(theirs.eval()(ids).logits, logits) < 20 * LOGITS  # 50 steps of fp32 apart


# --- classifiers --------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "partial": ("--finetune.partial.train", "last:1"),
    "head": ("--finetune.head.feature_cache", "FEATURES"),
    "lora": ("--finetune.from_adapter", "START"),
}


def labelled(path: Path, tokenizer: llama.Tokenizer, real: bool) -> list[tuple[list[int], int]]:
    """Texts of two classes as a data file; the same as ids and label ids."""
    if real:
        tasks = [json.loads(line) for line in (DATA / "alpaca_seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()]
        records = [{"text": task["instruction"], "label": task["is_classification"]} for task in tasks]
        records = [r for r in records if len(tokenizer.encode(r["text"])) < 48]  # two thirds, in a third of the time
    else:
        records = [{"text": r["instruction"] + r.get("input", ""), "label": "input" in r} for r in alpaca_records()]
    random.Random(0).shuffle(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return [(tokenizer.encode(str(r["text"]), bos=True), int(r["label"])) for r in records]


def hf_classifier_curve(model: nn.Module, data: list[tuple[list[int], int]]) -> list[float]:
    """The plain loop: HF's own loss, one padded batch per step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    found = []
    for step in range(STEPS):
        start = step % -(-len(data) // GLOBAL_BATCH) * GLOBAL_BATCH
        ids, labels = padded(data[start : start + GLOBAL_BATCH])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def padded(batch: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids, _ in batch)
    return torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in batch]), torch.tensor([label for _, label in batch])


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=needs_data)], ids=["random", "real"])
def test_classifiers_equal_transformers(real: bool, model_dir: Path, tmp_path: Path) -> None:
    path = STORIES if real else model_dir
    data = labelled(tmp_path / "data.jsonl", llama.Tokenizer(path), real)
    start = replace_head(llama.load(path), ("false", "true"), seed=0)  # what the program draws with its seed of 0
    llama.save(start, tmp_path / "start")
    opened(tmp_path / "start", AutoModelForSequenceClassification)

    def theirs(method: str) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "start", attn_implementation="eager")
        if method == "lora":
            torch.manual_seed(0)
            return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"]))
        wanted = {"full": "", "head": "score", "partial": ("score", f"model.layers.{start.config.num_hidden_layers - 1}.")}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(wanted[method]))
        return model

    theirs("lora").save_pretrained(tmp_path / "adapter")

    def flags(method: str, n: int) -> list[str]:
        places = {"START": str(tmp_path / "adapter"), "FEATURES": str(tmp_path / f"features{n}")}
        return flags_of(
            tmp_path / f"{method}{n}", n, LR, "--model.path", path, "--data.path", tmp_path / "data.jsonl",
            "--finetune.method", method, "--finetune.head.kind", "classification",
            *(places.get(word, word) for word in METHODS[method]),
        )  # fmt: skip

    for method in METHODS:
        main(flags(method, 1))
    spawn(2, run_all, [flags(method, 2) for method in METHODS], tmp_path=tmp_path)
    ids, _ = padded(data[:8])
    last = torch.tensor([len(text) - 1 for text, _ in data[:8]])
    for method in METHODS:
        model = theirs(method).train()
        expected = hf_classifier_curve(model, data)
        assert sum(expected[-10:]) < sum(expected[:10])
        for processes in (1, 2):
            out = tmp_path / f"{method}{processes}"
            assert max(abs(a - b) for a, b in zip(losses(out), expected, strict=True)) < CURVE, (method, processes)
            if method == "lora":
                hf = peft.PeftModel.from_pretrained(
                    AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, pad_token_id=0), out / "adapter"
                ).eval()
                assert json.loads((out / "adapter" / "labels.json").read_text())["id2label"] == {"0": "false", "1": "true"}
            else:
                hf = opened(out / "model", AutoModelForSequenceClassification)
                assert hf.config.id2label == {0: "false", 1: "true"}
                ours = llama.load(out / "model")
                with torch.no_grad():
                    assert largest(ours(ids, last=last), hf(ids).logits) < LOGITS
            with torch.no_grad():
                assert largest(model.eval()(input_ids=ids).logits, hf(input_ids=ids).logits) < 20 * LOGITS
