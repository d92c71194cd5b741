"""Rebuild the bundled demo: corpus, tokenizer, base model (pre-trained by this program itself), instruction task.

    python -m tools.make_demo --output fsdp_train/demo --replace

Everything follows from seeds. It takes about eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from fsdp_train.main import main as fine_tune
from fsdp_train.settings import fail
from fsdp_train.templates import alpaca_prompt
from llama import PRESETS, InputError
from llama.files import new_directory
from tools.demo_corpus import NAMES, labelled, questions, texts, write_lines

DOCUMENTS = 50_000
PRETRAINING = {
    "finetune.method": "full",
    "model.preset": "demo",
    "model.dtype": "bf16",
    "data.format": "text",
    "data.max_length": "192",
    "optim.lr": "2e-3",
    "optim.weight_decay": "0.1",
    "optim.warmup_steps": "50",
    "train.batch_size": "32",
    "train.epochs": "1",
    "log.every": "50",
    "checkpoint.every": "0",
}
NOTICE = """# Where this comes from
Everything in this directory but the `.toml` files was made by `python -m tools.make_demo` of this project: statements and
questions about people who do not exist (`tools/demo_corpus.py`), a tokenizer and a base model trained on those statements
alone.
Licence: Apache-2.0, as the project.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, build."""
    parser = argparse.ArgumentParser(prog="python -m tools.make_demo", description="Rebuild the bundled demo.")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the demo goes")
    parser.add_argument("--replace", action="store_true", help="overwrite an existing directory")
    options = parser.parse_args(arguments)
    try:
        with new_directory(options.output, options.replace) as demo, tempfile.TemporaryDirectory() as work:
            build(demo, Path(work), Path(options.output))
    except InputError as error:
        fail(error)


def build(demo: Path, work: Path, old: Path) -> None:
    """Fill the directory `demo`; the methods' settings, which are written by hand, are carried over from the `old` one."""
    for settings in old.glob("*.toml"):
        shutil.copyfile(settings, demo / settings.name)
    write_lines(work / "corpus.jsonl", ({"text": text} for text in texts(seed=1, count=DOCUMENTS)))
    (work / "tokenizer.model").write_bytes(trained_tokenizer())
    flags = {
        **PRETRAINING,
        "model.tokenizer": str(work / "tokenizer.model"),
        "data.path": str(work / "corpus.jsonl"),
        "train.output_dir": str(work / "run"),
    }
    fine_tune([word for name, value in flags.items() for word in (f"--{name}", value)])
    shutil.copytree(work / "run" / "model", demo / "base")
    write_lines(demo / "train.jsonl", questions(held_out=False))
    write_lines(demo / "held_out.jsonl", questions(held_out=True))
    write_lines(demo / "labels_train.jsonl", labelled(held_out=False))
    write_lines(demo / "labels_held_out.jsonl", labelled(held_out=True))
    (demo / "NOTICE.md").write_text(NOTICE)


def trained_tokenizer() -> bytes:
    """A sentencepiece model with Llama 2's settings, from statements, questions and the Alpaca template."""
    model = io.BytesIO()  # written to a file, it would say where that was
    asked = [record["instruction"] for record in questions(held_out=False)]
    sentences = [*texts(seed=1, count=20_000), *asked, *[" ".join(NAMES)] * 100, *[alpaca_prompt("")] * 2000]
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=PRESETS["demo"].vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    main()
