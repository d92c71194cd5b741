"""A classifier's adapter goes on under its own labels, whatever those of the base are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import llama
from fsdp_train.main import main
from llama import replace_head
from peft_impl import adapter_labels

OTHERS = ("red", "green", "blue")
KINDS = {  # labels of the data, problem, those of another base
    "single": (["a", "b", "c"], "single_label_classification"),
    "several": ([["a"], ["b", "c"], []], "multi_label_classification"),
}


def flags(base: Path, data: Path, out: Path, *more: object) -> list[str]:
    chosen = [
        *("--model.path", base, "--data.path", data, "--train.output_dir", out, "--train.max_steps", 1),
        *("--train.samples", 0, "--parallel.precision", "fp32", "--checkpoint.every", 0, "--log.every", 1),
        *("--data.shuffle", "false", "--train.batch_size", 6, "--finetune.method", "lora"),
        *("--finetune.head.kind", "classification", *more),
    ]
    return list(map(str, chosen))


def first_loss(out: Path) -> float:
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return float(row["loss"])


def classifier(model_dir: Path, path: Path, names: tuple[str, ...]) -> Path:
    llama.save(replace_head(llama.load(model_dir), names), path, tokenizer_from=model_dir)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_under_the_adapter_s_labels(
    kind: str, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a classifier of other names as on the language model: the same loss, the same labels kept."""
    labels, problem = KINDS[kind]
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"Say {word}.", "label": label} for word in ("one", "two") for label in labels]
    data.write_text("\n".join(map(json.dumps, rows)))
    colors = classifier(model_dir, tmp_path / "colors", OTHERS)
    main(flags(model_dir, data, tmp_path / "first", "--optim.lr", "1e-2"))
    adapter = tmp_path / "first" / "adapter"
    for name, base in (("plain", model_dir), ("colors out", colors)):
        main(flags(base, data, tmp_path / name, "--finetune.from_adapter", adapter))
        assert adapter_labels(tmp_path / name / "adapter") == (("a", "b", "c"), problem)
    assert first_loss(tmp_path / "plain") == first_loss(tmp_path / "colors out")
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("plain", "colors out"))
    assert all((one[key] == other[key]).all() for key in one)
    capsys.readouterr()
    two = classifier(model_dir, tmp_path / "two", ("no", "yes"))
    (adapter / "labels.json").rename(tmp_path / "labels.json")
    for row in rows:
        row["label"] = "red" if kind == "single" else ["red"]
    data.write_text("\n".join(map(json.dumps, rows)))
    if kind == "single":
        main(flags(colors, data, tmp_path / "unnamed", "--finetune.from_adapter", adapter))
        note = f"label names: the base's (red, green, blue), as {adapter} has no labels.json\n"
        assert note in capsys.readouterr().out
        assert adapter_labels(tmp_path / "unnamed" / "adapter") == (OTHERS, problem)
    with pytest.raises(SystemExit):
        main(flags(two, data, tmp_path / "refused", "--finetune.from_adapter", adapter))
    assert (
        f"error: --finetune.from_adapter: {adapter} answers with 3 labels (LABEL_0, LABEL_1, LABEL_2),"
        " the base has 2 (no, yes)\n"
    ) in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
