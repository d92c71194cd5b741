"""Label texts with a classifier: one line per text, its label and how sure the model is.

python -m tools.classify --model out/model --text "A wonderful film." --text "Dull."
python -m tools.classify --model DIR --adapter out/adapter --file texts.txt        # a text per line
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import llama
from fsdp_train.classification import MULTI, REGRESSION, ClassificationDataset, LabelSpace
from fsdp_train.data import Sample
from fsdp_train.settings import fail
from fsdp_train.templates import encode_prompt
from llama import InputError, Tokenizer
from peft_impl import load_adapter, match_head

BATCH = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, label."""
    parser = argparse.ArgumentParser(prog="python -m tools.classify", description="Label texts with a classifier.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a classifier, or the base of --adapter")
    parser.add_argument("--adapter", metavar="DIR", help="a classifier's PEFT adapter")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.model (default: the model's directory)")
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--file", metavar="FILE", help="texts, one per line")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    options = parser.parse_args(arguments)
    if not options.text and not options.file:
        parser.error("give --text TEXT, or --file FILE")
    try:
        texts = [*options.text, *(_lines(Path(options.file)) if options.file else [])]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        default = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, None: default}[options.dtype]
        tokenizer = Tokenizer(options.tokenizer or options.model)
        model = llama.load(options.model, dtype, device)
        if options.adapter:
            if note := match_head(model, options.adapter):
                print(f"note: {note}", file=sys.stderr)
            load_adapter(model, options.adapter)
        if not model.config.id2label:
            raise InputError(f"{options.model} is a language model, not a classifier; tools.generate continues texts with it")
        for text, line in zip(texts, label(model, tokenizer, texts, device), strict=True):
            print(f"{line}\t{text}")
    except (InputError, OSError) as error:
        fail(error)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--file {path} cannot be read: {error}") from None


@torch.no_grad()
def label(model: llama.Llama, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device) -> list[str]:
    """`label probability` of each text; several of them, or none, in a multi-label problem; the number of a regression.

    Raises:
        InputError: a text beyond the model's context.
    """
    space = LabelSpace(model.config.id2label, str(model.config.problem_type))
    samples = []
    for text in texts:
        ids = np.array(encode_prompt(tokenizer, text), dtype=np.int32)
        if len(ids) > model.config.max_position_embeddings:
            raise InputError(
                f"a text of {len(ids)} tokens is beyond the context of {model.config.max_position_embeddings}: {text[:60]!r}"
            )
        samples.append(Sample(text, ids, np.zeros(len(space.names), dtype=np.float32), len(ids)))
    data = ClassificationDataset(Path(), "classification", {}, samples, space=space)
    lines = []
    model.eval()
    for start in range(0, len(samples), BATCH):
        inputs = data.batch(range(start, min(start + BATCH, len(samples))), device).inputs
        scores = model(**inputs).float()
        lines += [_line(name, row, space) for name, row in zip(data.named(scores), scores, strict=True)]
    return lines


def _line(named: str, scores: Tensor, space: LabelSpace) -> str:
    if space.problem_type == REGRESSION:
        return named
    if space.problem_type == MULTI:
        sure = [f"{name} {p:.3f}" for name, p in zip(space.names, scores.sigmoid().tolist(), strict=True) if p > 0.5]
        return ", ".join(sure) or "none"
    return f"{named} {scores.softmax(0).max().item():.3f}"


if __name__ == "__main__":
    main()
