"""Every method on three tasks of the demo: what it trains, what it leaves, what it costs, what it learns, and what it forgets.

    python -m tools.compare_methods --output comparison

Each run is `python -m fsdp_train.main` with the demo's settings for the method, in a process of its own. Two tasks ask
questions ("facts", "sentences"), which are answered in text; the third ("labels") is a classification. "forgotten" is the
loss on the base's own corpus after training minus before: full fine-tuning pays it; an adapter can be switched off, which
gives the base back to the last bit. At the end the adapters of all methods and tasks stand on one base, and answer in one
batch.

Writes `comparison.csv`, the runs, and with the `ui` extra `comparison.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import llama
from fsdp_train.config import DEMO
from fsdp_train.data import Dataset, load_dataset
from fsdp_train.log import no_picture
from fsdp_train.samples import answers, reference
from fsdp_train.settings import fail
from fsdp_train.strategy import ParallelConfig
from fsdp_train.train import evaluate
from fsdp_train.world import process_group
from llama import InputError, Llama, Tokenizer
from llama.files import check_free
from peft_impl import load_adapter, remove_adapter, set_adapter
from tools.demo_corpus import labelled, questions, texts, write_lines

ADAPTERS = ("lora", "llama_adapter", "prefix")
_LM = {"finetune.head.kind": "lm", "optim.lr": 1e-3}
_CLASSIFY = {"finetune.head.kind": "classification"}
# What each method's own settings for the demo (fsdp_train/demo/METHOD.toml) are changed to; a last word tells variants apart.
ANSWERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "llama_adapter": {},
    "prefix": {},
    "full": {},
    "partial, 2 layers by gradient": {},
    "partial, last 2 layers": {"finetune.partial.select": "", "finetune.partial.train": "last:2"},
    "head": _LM,
    "head, 64 more": {**_LM, "finetune.head.hidden": 64},
}
LABELS: dict[str, dict[str, Any]] = {
    "head": {},
    "head, 64 more": {"finetune.head.hidden": 64},
    "lora": {**_CLASSIFY, "optim.lr": 5e-3},
    "partial, last 2 layers": {**_CLASSIFY, "finetune.partial.train": "last:2", "optim.lr": 3e-4},
    "full": {**_CLASSIFY, "optim.lr": 1e-4},
}
TASKS = {"facts": ANSWERS, "sentences": ANSWERS, "labels": LABELS}
CORPUS_DOCUMENTS = 300  # none of them in the base's training corpus
QUESTIONS = 240  # answered before and after each run


@dataclass(frozen=True)
class Row:
    """One method on one task."""

    task: str
    method: str
    trained_parameters: int
    artefact_megabytes: float
    peak_memory_megabytes: float  # of the whole process, Python and torch included
    seconds: float
    accuracy_before: float
    accuracy_after: float
    corpus_loss_before: float | None  # None for a classifier, which predicts no tokens
    corpus_loss_after: float | None
    switched_off: str  # logits without the adapter against the base's

    @property
    def forgotten(self) -> float | None:
        """What was added to the loss on the base's corpus."""
        if self.corpus_loss_before is None or self.corpus_loss_after is None:
            return None
        return self.corpus_loss_after - self.corpus_loss_before


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run all, tell."""
    parser = argparse.ArgumentParser(prog="python -m tools.compare_methods", description="Compare methods on the demo.")
    parser.add_argument("--output", required=True, metavar="DIR", help="must not exist")
    parser.add_argument("--max-steps", type=int, metavar="N", help="shorter or longer runs (default: the demo's)")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    try:
        check_free(output)
        rows = compare(output, options.max_steps)
    except InputError as error:
        fail(error)
    print(f"\n{table(rows)}\n\n{together(output)}")
    with (output / "comparison.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    written = "comparison.csv" + (", comparison.png" if plot(rows, output / "comparison.png") else "")
    print(f"wrote {written} and the runs into {output}")


def compare(output: Path, max_steps: int | None) -> list[Row]:
    """Train and measure every method on every task."""
    tokenizer = Tokenizer(DEMO / "base")
    write_lines(output / "corpus.jsonl", ({"text": text} for text in texts(seed=2, count=CORPUS_DOCUMENTS)))
    base = llama.load(DEMO / "base")
    corpus = load_dataset(str(output / "corpus.jsonl"), "text", tokenizer, base.config.vocab_size, 512)
    before = loss_of(base, corpus)
    rows = []
    for task, methods in TASKS.items():
        for part, held_out in (("train", False), ("held_out", True)):
            records = labelled(held_out) if task == "labels" else questions(held_out, task=task)
            write_lines(output / task / f"{part}.jsonl", records)
        for method in methods:
            rows.append(measure(output / task, task, method, corpus, before, max_steps))
            print(f"{task}, {method}: accuracy {rows[-1].accuracy_after:.3f}, {rows[-1].seconds:.0f} s", flush=True)
    return rows


def measure(directory: Path, task: str, method: str, corpus: Dataset, before: float, max_steps: int | None) -> Row:
    """One run of the training program, and what its artefact does to the corpus."""
    run = directory / _directory(method)
    name, classifies = method.partition(",")[0], task == "labels"
    flags: dict[str, Any] = {"finetune.method": name, "train.output_dir": run, "train.samples": 0}
    flags |= {"data.path": directory / "train.jsonl", "data.eval_path": directory / "held_out.jsonl", **TASKS[task][method]}
    flags |= {"finetune.head.feature_cache": directory / "features"} if classifies and name == "head" else {}
    flags |= {} if classifies else {"train.exact_match": QUESTIONS}
    flags |= {"train.max_steps": max_steps} if max_steps else {}
    flags["config"] = settings_file(directory, "head" if classifies else "full" if name == "head" else name)
    started = time.perf_counter()
    program = [sys.executable, "-m", "fsdp_train.main", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    trained = re.search(r"([\d,]+) of [\d,]+ parameters train", done.stdout)
    if done.returncode or trained is None:
        raise InputError(f"{' '.join(program)} failed: {done.stderr.strip()}")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    key = "accuracy" if classifies else "exact_match"
    measured = [row[key] for row in metrics if key in row]
    artefact = run / ("adapter" if name in ADAPTERS else "model")
    after, switched_off = None, "-"
    if not classifies:
        model = llama.load(DEMO / "base" if name in ADAPTERS else artefact)
        if name in ADAPTERS:
            switched_off = _switched_off(model, artefact, corpus)
        after = loss_of(model, corpus)
    return Row(
        task, method, int(trained[1].replace(",", "")),
        artefact_megabytes=sum(file.stat().st_size for file in artefact.glob("*.safetensors")) / 1e6,
        peak_memory_megabytes=max(row.get("peak_memory_bytes", 0) for row in metrics) / 1e6,
        seconds=seconds, accuracy_before=measured[0], accuracy_after=measured[-1],
        corpus_loss_before=None if classifies else before, corpus_loss_after=after, switched_off=switched_off,
    )  # fmt: skip


def _directory(method: str) -> str:
    return re.sub(r"\W+", "-", method)


def _switched_off(model: Llama, adapter: Path, corpus: Dataset) -> str:
    """Load the adapter, and compare the model without it with the bare base; it is left active."""
    ids = torch.tensor([sample.ids[:24].tolist() for sample in corpus.samples[:8]])
    plain = model(ids)
    load_adapter(model, adapter)
    set_adapter(model, None)
    found = "bit-equal" if torch.equal(model(ids), plain) else "DIFFERENT"
    set_adapter(model, "default")
    return found


def settings_file(directory: Path, method: str) -> Path:
    """The demo's settings for the method, with the base's place written out."""
    text = (DEMO / f"{method}.toml").read_text(encoding="utf-8")
    path = directory / f"{method}.toml"
    path.write_text(text.replace('path = "base"', f"path = {json.dumps(str(DEMO / 'base'))}"), encoding="utf-8")
    return path


def loss_of(model: Llama, corpus: Dataset) -> float:
    """Mean loss per token of the corpus."""
    with process_group(ParallelConfig()) as world:
        return evaluate(model, corpus, 32, world)


def together(output: Path) -> str:
    """All adapters on one base: the answers of one mixed batch against those of each adapter by itself."""
    model, tokenizer = llama.load(DEMO / "base"), Tokenizer(DEMO / "base")
    asked: dict[str, Any] = {}
    for task in (task for task in TASKS if task != "labels"):
        path = output / task / "held_out.jsonl"
        data = load_dataset(str(path), "alpaca", tokenizer, model.config.vocab_size, 512)
        for method in (method for method in ADAPTERS if method in TASKS[task]):
            load_adapter(model, output / task / method / "adapter", f"{task}-{method}")
            asked[f"{task}-{method}"] = data.samples[:8]
    longest = max(len(s.ids) - s.prompt for samples in asked.values() for s in samples)
    apart: list[str] = []
    for name, samples in asked.items():
        set_adapter(model, name)
        apart += answers(model, tokenizer, samples, longest, fixed_steps=False)
    rows = [(name, sample) for name, samples in asked.items() for sample in samples]
    set_adapter(model, [name for name, _ in rows])
    mixed = answers(model, tokenizer, [sample for _, sample in rows], longest, fixed_steps=False)
    correct = sum(answer == reference(tokenizer, sample) for answer, (_, sample) in zip(mixed, rows, strict=True))
    for name in asked:
        remove_adapter(model, name)
    restored = all(torch.equal(a, b) for a, b in zip(model.parameters(), llama.load(DEMO / "base").parameters(), strict=True))
    return (
        f"{len(asked)} adapters on one base, {len(rows)} rows in one batch: {correct} answers right,"
        f" {sum(a == b for a, b in zip(apart, mixed, strict=True))} of {len(rows)} the same as by each adapter alone;"
        f" base after removing all: {'bit-equal' if restored else 'DIFFERENT'}"
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown, as it stands in the README."""
    lines = [
        "| task | method | trained parameters | file, MB | peak memory, MB | time, s | accuracy before | after"
        " | loss on the base's corpus before | after | forgotten | switched off |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        losses = [row.corpus_loss_before, row.corpus_loss_after]
        before, after = ("-" if loss is None else f"{loss:.3f}" for loss in losses)
        forgotten = "-" if row.forgotten is None else f"{row.forgotten:+.3f}"
        lines.append(
            f"| {row.task} | {row.method} | {row.trained_parameters:,} | {row.artefact_megabytes:.3f}"
            f" | {row.peak_memory_megabytes:.0f} | {row.seconds:.0f} | {row.accuracy_before:.3f} | {row.accuracy_after:.3f}"
            f" | {before} | {after} | {forgotten} | {row.switched_off} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Accuracy, what is forgotten, and what trains, per method; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        no_picture("comparison.png")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = ("held-out accuracy", "loss added on the base's own corpus\n(with an adapter switched off: exactly none)",
              "trained parameters (log scale)")  # fmt: skip
    values = (lambda row: row.accuracy_after, lambda row: row.forgotten, lambda row: row.trained_parameters)
    methods = list(dict.fromkeys(row.method for row in rows))[::-1]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 5), layout="constrained", sharey=True)
    for axis, title, value in zip(axes, titles, values, strict=True):
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.02)
        for index, task in enumerate(TASKS):
            shown = [row for row in rows if row.task == task and value(row) is not None]
            at = [methods.index(row.method) + 0.27 * (1 - index) for row in shown]
            axis.barh(at, [value(row) for row in shown], 0.25, label=task)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[1].legend(loc="center right")
    axes[2].set_xscale("log")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    main()
