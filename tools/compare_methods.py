"""Every method on two tasks of the demo: what it trains, what it leaves, what it costs, what it learns, and what it forgets.

    python -m tools.compare_methods --output comparison

Each run is `python -m fsdp_train.main` with the demo's settings for the method, in a process of its own. "forgotten" is the
loss on the base's own corpus after training minus before: full fine-tuning pays it; an adapter can be switched off, which gives
the base back to the last bit. At the end the adapters of all methods and tasks stand on one base, and answer in one batch.

Writes `comparison.csv`, the runs, and with the `ui` extra `comparison.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
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
from fsdp_train.parallel import ParallelConfig, process_group
from fsdp_train.samples import answers, reference
from fsdp_train.settings import fail
from fsdp_train.train import evaluate
from llama import InputError, Llama, Tokenizer
from llama.files import check_free
from peft_impl import load_adapter, remove_adapter, set_adapter
from tools.demo_corpus import questions, texts, write_lines

METHODS = ("lora", "llama_adapter", "prefix", "full")
TASKS = ("facts", "sentences")
CORPUS_DOCUMENTS = 300  # none of them in the base's training corpus


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
    corpus_loss_before: float
    corpus_loss_after: float
    switched_off: str  # logits without the adapter against the base's


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
    for task in TASKS:
        write_lines(output / task / "train.jsonl", questions(held_out=False, task=task))
        write_lines(output / task / "held_out.jsonl", questions(held_out=True, task=task))
        for method in METHODS:
            rows.append(measure(output / task, task, method, corpus, before, max_steps))
            print(f"{task}, {method}: accuracy {rows[-1].accuracy_after:.3f}, {rows[-1].seconds:.0f} s", flush=True)
    return rows


def measure(directory: Path, task: str, method: str, corpus: Dataset, before: float, max_steps: int | None) -> Row:
    """One run of the training program, and what its artefact does to the corpus."""
    run = directory / method
    flags = {"finetune.method": method, "train.output_dir": run, "train.samples": 0, "train.exact_match": 240}
    flags |= {"data.path": directory / "train.jsonl", "data.eval_path": directory / "held_out.jsonl"}
    flags |= {"train.max_steps": max_steps} if max_steps else {}
    flags["config"] = settings_file(directory, method)
    started = time.perf_counter()
    program = [sys.executable, "-m", "fsdp_train.main", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise InputError(f"{' '.join(program)} failed: {done.stderr.strip()}")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    matches = [row["exact_match"] for row in metrics if "exact_match" in row]
    artefact = run / ("model" if method == "full" else "adapter")
    switched_off = "-"
    if method == "full":
        model = llama.load(artefact)
        trained = sum(p.numel() for p in model.parameters())
    else:
        model = llama.load(DEMO / "base")
        ids = torch.tensor([sample.ids[:24].tolist() for sample in corpus.samples[:8]])
        plain = model(ids)
        load_adapter(model, artefact, trainable=True)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        set_adapter(model, None)
        switched_off = "bit-equal" if torch.equal(model(ids), plain) else "DIFFERENT"
        set_adapter(model, "default")
    return Row(
        task, method, trained,
        artefact_megabytes=sum(file.stat().st_size for file in artefact.glob("*.safetensors")) / 1e6,
        peak_memory_megabytes=max(row.get("peak_memory_bytes", 0) for row in metrics) / 1e6,
        seconds=seconds, accuracy_before=matches[0], accuracy_after=matches[-1],
        corpus_loss_before=before, corpus_loss_after=loss_of(model, corpus), switched_off=switched_off,
    )  # fmt: skip


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
    for task in TASKS:
        path = output / task / "held_out.jsonl"
        data = load_dataset(str(path), "alpaca", tokenizer, model.config.vocab_size, 512)
        for method in METHODS[:-1]:
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
        forgotten = row.corpus_loss_after - row.corpus_loss_before
        lines.append(
            f"| {row.task} | {row.method} | {row.trained_parameters:,} | {row.artefact_megabytes:.3f}"
            f" | {row.peak_memory_megabytes:.0f} | {row.seconds:.0f} | {row.accuracy_before:.3f} | {row.accuracy_after:.3f}"
            f" | {row.corpus_loss_before:.3f} | {row.corpus_loss_after:.3f} | {forgotten:+.3f} | {row.switched_off} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Accuracy, and what is forgotten, per method; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print('no comparison.png: it needs matplotlib, pip install "llama-fsdp-finetuning[ui]"', file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    forgotten = "loss added on the base's own corpus\n(with an adapter switched off: exactly none)"
    titles = ("held-out accuracy", forgotten, "file, MB (log scale)")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xticks(range(len(METHODS)), METHODS)
        axis.spines[["top", "right"]].set_visible(False)
    for index, task in enumerate(TASKS):
        of_task = {row.method: row for row in rows if row.task == task}
        at = [position + 0.4 * index - 0.2 for position in range(len(METHODS))]
        chosen = [of_task[method] for method in METHODS]
        axes[0].bar(at, [row.accuracy_after for row in chosen], 0.38, label=task)
        on = [row.corpus_loss_after - row.corpus_loss_before for row in chosen]
        axes[1].bar(at, on, 0.38, label=task)
        axes[2].bar(at, [row.artefact_megabytes for row in chosen], 0.38, label=task)
    axes[2].set_yscale("log")
    axes[2].legend(loc="upper left")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    main()
