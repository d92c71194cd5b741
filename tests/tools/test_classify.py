"""Labels from the command line: of a classifier, of an adapter, of every kind of problem; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import llama
from llama import Tokenizer, replace_head
from peft_impl import LoraConfig, add_adapter, save_adapter
from tests.fsdp_train.conftest import model_dir, tokenizer_dir  # noqa: F401
from tests.oracle import randomise
from tools.classify import main

NAMES = ("bad", "good", "mixed")
MULTI = "multi_label_classification"
TEXTS = ["Say one again.", "Repeat the word two, and then three.", "x"]


def classifier(base: Path, path: Path, problem: str | None = None, names: tuple[str, ...] = NAMES) -> llama.Llama:
    model = replace_head(llama.load(base), names, problem)
    randomise(model)
    llama.save(model, path, tokenizer_from=base)
    return model


def lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[str]]:
    main([str(word) for word in arguments])
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


def alone(model: llama.Llama, base: Path, text: str) -> torch.Tensor:
    """The scores of one text by itself."""
    with torch.no_grad():
        return model(torch.tensor([Tokenizer(base).encode(text, bos=True)]))[0]


def test_each_text_gets_its_label_and_probability(
    model_dir: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = classifier(model_dir, tmp_path / "model")
    (tmp_path / "texts").write_text("\n".join(TEXTS[1:]) + "\n\n")
    found = lines(capsys, "--model", tmp_path / "model", "--text", TEXTS[0], "--file", tmp_path / "texts")
    assert [text for _, text in found] == TEXTS
    for line, text in found:
        probabilities = alone(model, model_dir, text).softmax(0)
        assert line == f"{NAMES[int(probabilities.argmax())]} {probabilities.max():.3f}"


def test_several_labels_none_and_numbers(
    model_dir: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = classifier(model_dir, tmp_path / "several", "multi_label_classification")
    for line, text in lines(capsys, "--model", tmp_path / "several", *(w for t in TEXTS for w in ("--text", t))):
        probabilities = alone(model, model_dir, text).sigmoid().tolist()
        chosen = [f"{name} {p:.3f}" for name, p in zip(NAMES, probabilities, strict=True) if p > 0.5]
        assert line == (", ".join(chosen) or "none")
    model = classifier(model_dir, tmp_path / "number", names=("value",))
    for line, text in lines(capsys, "--model", tmp_path / "number", "--text", TEXTS[0]):
        assert abs(float(line) - alone(model, model_dir, text).item()) < 1e-3


def test_an_adapter_brings_head_and_names(
    model_dir: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = replace_head(llama.load(model_dir), NAMES)
    add_adapter(model, LoraConfig(modules_to_save=("score",)))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.1
    save_adapter(model, tmp_path / "adapter")
    [[line, _]] = lines(capsys, "--model", model_dir, "--adapter", tmp_path / "adapter", "--text", TEXTS[0])
    assert line.split()[0] == NAMES[int(alone(model, model_dir, TEXTS[0]).argmax())]


def answer(scores: torch.Tensor, problem: str) -> str:
    if problem == MULTI:
        probabilities = scores.sigmoid().tolist()
        chosen = [f"{name} {p:.3f}" for name, p in zip(NAMES, probabilities, strict=True) if p > 0.5]
        return ", ".join(chosen) or "none"
    probabilities = scores.softmax(0)
    return f"{NAMES[int(probabilities.argmax())]} {probabilities.max():.3f}"


@pytest.mark.parametrize("problem", ["single_label_classification", MULTI])
def test_an_adapter_keeps_its_labels_on_a_classifier(
    problem: str,
    model_dir: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Names and problem; without names of its own, as PEFT's, it takes the base's, which is said."""
    model = replace_head(llama.load(model_dir), NAMES, problem)
    add_adapter(model, LoraConfig(modules_to_save=("score",)))
    generator = torch.Generator().manual_seed(3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    adapter, colors = tmp_path / "adapter", tmp_path / "colors"
    save_adapter(model, adapter)
    saved = replace_head(llama.load(model_dir), ("red", "green", "blue"))
    llama.save(saved, colors, tokenizer_from=model_dir)
    arguments = ["--adapter", adapter, *(word for text in TEXTS for word in ("--text", text))]
    for base in (model_dir, colors):
        for line, text in lines(capsys, "--model", base, *arguments):
            assert line == answer(alone(model, model_dir, text), problem)
    (adapter / "labels.json").unlink()
    main([str(word) for word in ("--model", colors, *arguments)])
    said = capsys.readouterr()
    assert {line.split()[0] for line in said.out.splitlines()} <= {"red", "green", "blue"}
    note = f"note: label names: the base's (red, green, blue), as {adapter} has no labels.json"
    assert said.err == note + "\n"


def test_what_cannot_be_labelled_is_refused(
    model_dir: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    classifier(model_dir, tmp_path / "model")
    for arguments, message in (
        (["--model", model_dir, "--text", "x"], "is a language model, not a classifier"),
        (["--model", tmp_path / "model", "--file", tmp_path / "none"], "none cannot be read"),
        (["--model", tmp_path / "model", "--text", "abc " * 600], "is beyond the context of 512"),
        (["--model", tmp_path / "model"], "give --text TEXT, or --file FILE"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
