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
from llama import InputError, Llama, relabel, replace_head
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


def trained(base: Path, names: tuple[str, ...] = NAMES, seed: int = 5, problem: str | None = None) -> Llama:
    """The base with labels and a LoRA whose every parameter is random."""
    model = replace_head(llama.load(base), names, problem)
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


OTHERS = ("red", "green", "blue")
MULTI = "multi_label_classification"


@pytest.mark.parametrize("problem", ["single_label_classification", MULTI])
def test_the_adapter_s_labels_win_over_those_of_a_classifier(problem: str, base: Path, tmp_path: Path) -> None:
    """Names and problem type, for scores, loss and the merged directory; the base's own head stays beside it."""
    model = trained(base, problem=problem)
    save_adapter(model, tmp_path / "adapter")
    classifier = replace_head(llama.load(base), OTHERS, seed=9)
    score = classifier.score.weight.detach().clone()
    assert match_head(classifier, tmp_path / "adapter") == ""
    load_adapter(classifier, tmp_path / "adapter")
    assert (classifier.config.id2label, classifier.config.problem_type) == (NAMES, problem)
    assert torch.equal(classifier.score.weight, score)
    assert torch.equal(scores(classifier), scores(model))
    labels = torch.tensor([0, 1, 2]) if problem != MULTI else torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])
    with torch.no_grad():
        assert torch.equal(classifier(PADDED, labels, last=LAST), model(PADDED, labels, last=LAST))
    merge_and_unload(classifier)
    llama.save(classifier, tmp_path / "merged")
    hf = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert (tuple(hf.config.id2label.values()), hf.config.problem_type) == (NAMES, problem)
    assert hf.config.label2id == {name: i for i, name in enumerate(NAMES)}


def test_peft_s_adapter_takes_the_names_of_a_classifier_and_that_is_said(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(theirs(base), config).save_pretrained(tmp_path / "adapter")
    model = replace_head(llama.load(base), OTHERS, MULTI)
    note = match_head(model, tmp_path / "adapter")
    assert note == f"label names: the base's (red, green, blue), as {tmp_path / 'adapter'} has no labels.json"
    load_adapter(model, tmp_path / "adapter")
    assert (model.config.id2label, model.config.problem_type) == (OTHERS, MULTI)
    for fits in (load_adapter, match_head):
        with pytest.raises(InputError, match=r"3 labels \(LABEL_0, LABEL_1, LABEL_2\), the base has 2 \(no, yes\)"):
            fits(replace_head(llama.load(base), ("no", "yes")), tmp_path / "adapter")


def test_adapters_of_different_labels_do_not_share_a_model(base: Path, tmp_path: Path) -> None:
    for name, labels in (("one", NAMES), ("same", NAMES), ("other", OTHERS)):
        save_adapter(trained(base, labels), tmp_path / name)
    model = llama.load(base)
    for name in ("one", "same"):
        match_head(model, tmp_path / name)
        load_adapter(model, tmp_path / name, name)
    refusal = r"other answers with the labels red, green, blue .*has bad, good, mixed .*loaded already answer with: one, same"
    with pytest.raises(InputError, match=refusal):
        match_head(model, tmp_path / "other")
    assert model.config.id2label == NAMES


def test_new_names_are_for_the_labels_that_there_are(base: Path) -> None:
    model = replace_head(llama.load(base), NAMES)
    with pytest.raises(InputError, match=r"2 labels \(no, yes\) for a head of 3 \(bad, good, mixed\)"):
        relabel(model, ("no", "yes"))
    with pytest.raises(InputError, match=r"2 labels \(no, yes\) for a head of 0"):
        relabel(llama.load(base), ("no", "yes"))


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
    for fits in (load_adapter, match_head):
        with pytest.raises(InputError, match=r"answers with 3 labels \(bad, good, mixed\), the base has 2 \(no, yes\)"):
            fits(replace_head(llama.load(base), ("no", "yes")), path)
    with pytest.raises(InputError, match=r"labels bad, good, mixed \(single.*\), the model has a, b, c .*; match_head gives"):
        load_adapter(replace_head(llama.load(base), tuple("abc")), path)
    (path / "labels.json").write_text('{"id2label": {"0": "bad", "2": "good"}}')
    with pytest.raises(InputError, match=r"labels.json: id2label = .*expected names for the ids 0 to 2"):
        adapter_labels(path)
    named = {"id2label": dict(zip("012", NAMES, strict=True)), "problem_type": "ranking"}
    (path / "labels.json").write_text(json.dumps(named))
    with pytest.raises(InputError, match=r"labels.json: problem_type is 'ranking'; expected one of single"):
        adapter_labels(path)
    tensors = load_file(path / "adapter_model.safetensors")
    del tensors["base_model.model.score.weight"]
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"task_type is SEQ_CLS, but there is no head \(score\)"):
        match_head(llama.load(base), path)
