"""LoRA beside a classification head, in PEFT's SEQ_CLS form: files in both directions, label names, merging, rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import llama
from fsdp_train.build import FinetuneConfig, adapter_config
from fsdp_train.heads import HeadConfig
from llama import InputError, Llama, replace_head
from peft_impl import (
    LoraConfig,
    adapter_labels,
    add_adapter,
    load_adapter,
    match_head,
    merge_and_unload,
    save_adapter,
    set_adapter,
)
from tests.oracle import SHAPES, largest, randomise

NAMES = ("bad", "good", "mixed")
LOGITS = 1e-5  # fp32; HF's eager attention against SDPA
IDS = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
LAST = torch.tensor([8, 4, 6])
PADDED = IDS.where(torch.arange(9) <= LAST[:, None], 0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = llama.Llama(SHAPES["gqa"])
    randomise(model)
    llama.save(model, tmp_path / "base")
    return tmp_path / "base"


def theirs(base: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)


def trained(base: Path, names: tuple[str, ...] = NAMES, seed: int = 5) -> Llama:
    """The base with labels and a LoRA whose every parameter is random."""
    model = replace_head(llama.load(base), names)
    add_adapter(model, LoraConfig(r=4, modules_to_save=("score",)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def scores(model: Llama) -> Tensor:
    with torch.no_grad():
        return model(PADDED, last=LAST)


def test_peft_opens_what_we_write(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert [key for key in written if "lora" not in key] == ["base_model.model.score.weight"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier", "score"]
    hf = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert largest(scores(model), hf(input_ids=PADDED).logits) < LOGITS


def test_we_open_what_peft_writes(base: Path, tmp_path: Path) -> None:
    hf = peft.get_peft_model(
        theirs(base), peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    hf.save_pretrained(tmp_path / "adapter")
    model = llama.load(base)
    match_head(model, tmp_path / "adapter")
    assert model.config.id2label == ("LABEL_0", "LABEL_1", "LABEL_2")
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert largest(scores(model), hf(input_ids=PADDED).logits) < LOGITS


def test_label_names_go_along(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    save_adapter(model, tmp_path / "adapter")
    assert adapter_labels(tmp_path / "adapter") == (NAMES, "single_label_classification")
    again = llama.load(base)
    match_head(again, tmp_path / "adapter")
    assert again.config.id2label == NAMES
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(scores(again), scores(model))
    match_head(again, tmp_path / "adapter")  # it fits already
    assert torch.equal(scores(again), scores(model))


def test_a_language_model_s_adapter_has_no_labels(base: Path, tmp_path: Path) -> None:
    model = llama.load(base)
    add_adapter(model, LoraConfig(r=2))
    with pytest.warns(UserWarning, match="never trained"):
        save_adapter(model, tmp_path / "adapter")
    assert adapter_labels(tmp_path / "adapter") is None
    assert not (tmp_path / "adapter" / "labels.json").exists()
    plain = llama.load(base)
    match_head(plain, tmp_path / "adapter")
    assert plain.config == llama.load(base).config


def test_merging_gives_a_classifier_that_transformers_opens(base: Path, tmp_path: Path) -> None:
    model = trained(base)
    before = scores(model)
    merge_and_unload(model)
    llama.save(model, tmp_path / "merged")
    hf, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert tuple(hf.config.id2label.values()) == NAMES
    with torch.no_grad():
        assert largest(hf(input_ids=PADDED).logits, before) < LOGITS


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_rows_with_heads_of_their_own_train_as_each_alone(problem: str, base: Path) -> None:
    model = replace_head(llama.load(base), NAMES, problem)
    for name in ("one", "two"):
        add_adapter(model, LoraConfig(r=2, modules_to_save=("score",)), name)
    randomise(model)
    choice = ["one", None, "two"]
    single = problem.startswith("single")
    labels = torch.tensor([0, 1, 2]) if single else torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])
    set_adapter(model, choice)
    mixed, loss = scores(model), model(PADDED, labels, last=LAST)
    loss.backward()
    assert not any(p.grad is None for p in model.parameters() if p.requires_grad)
    rows = []
    for row, name in enumerate(choice):
        set_adapter(model, name)
        rows.append(scores(model)[row])
    assert largest(mixed, torch.stack(rows)) < LOGITS
    wanted = F.cross_entropy if single else F.binary_cross_entropy_with_logits
    assert abs(wanted(torch.stack(rows), labels, reduction="sum").item() - loss.item()) < LOGITS


def test_the_program_trains_the_head_once_if_the_user_names_it_too() -> None:
    named = LoraConfig(modules_to_save=("score", "norm"))
    finetune = FinetuneConfig(lora=named, head=HeadConfig(kind="classification"))
    assert adapter_config(finetune).modules_to_save == ("score", "norm")
    assert adapter_config(dataclasses.replace(finetune, lora=LoraConfig())).modules_to_save == ("score",)


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    save_adapter(trained(base), path)
    with pytest.raises(InputError, match=r"is a classifier's adapter; give the base a head .*match_head"):
        load_adapter(llama.load(base), path)
    with pytest.raises(InputError, match=r"score.weight has shape \(3, 64\); this model needs \(2, 64\)"):
        load_adapter(replace_head(llama.load(base), ("no", "yes")), path)
    (path / "labels.json").write_text('{"id2label": {"0": "bad", "2": "good"}}')
    with pytest.raises(InputError, match=r"labels.json: id2label = .*expected names for the ids 0 to 2"):
        adapter_labels(path)
    tensors = load_file(path / "adapter_model.safetensors")
    del tensors["base_model.model.score.weight"]
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"task_type is SEQ_CLS, but there is no head \(score\)"):
        match_head(llama.load(base), path)
