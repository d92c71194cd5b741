"""Convert a model directory between Hugging Face's and Meta's format, or to another dtype.

python -m tools.convert --model llama-2-7b --to hf --output Llama-2-7b-hf
python -m tools.convert --model llama-2-7b --tokenizer tokenizer.model --to hf --output Llama-2-7b-hf   # Meta keeps it apart
python -m tools.convert --model merged --to meta --shards 2 --output merged-meta
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import llama
from fsdp_train.settings import fail
from fsdp_train.strategy import DTYPES
from llama import InputError, Tokenizer
from llama.files import check_free


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, write."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description="Convert a model directory.")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or Meta directory")
    parser.add_argument("--to", required=True, choices=("hf", "meta"))
    parser.add_argument("--output", required=True, metavar="DIR", help="must not exist")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: as in the files")
    parser.add_argument("--shards", type=int, metavar="N", help="model-parallel parts of a Meta directory (default: 1)")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.model or its directory (default: the model's directory)")
    options = parser.parse_args(arguments)
    if options.to == "hf" and options.shards is not None:
        parser.error("--shards goes with --to meta")
    shards = 1 if options.shards is None else options.shards
    try:
        check_free(options.output)
        tokenizer = tokenizer_directory(options.tokenizer) if options.tokenizer else Path(options.model)
        model = llama.load(options.model, None if options.dtype is None else DTYPES[options.dtype])
        if options.to == "hf":
            llama.save(model, options.output, tokenizer_from=tokenizer)
        else:
            llama.save_meta(model, options.output, shards, tokenizer_from=tokenizer)
    except (InputError, OSError) as error:
        fail(error)
    print(f"wrote {options.output}")
    if not (Path(options.output) / "tokenizer.model").exists():
        print(f"note: there is no tokenizer.model in {tokenizer}; --tokenizer PATH takes one along", file=sys.stderr)


def tokenizer_directory(path: str) -> Path:
    """The directory of the tokenizer at `path`, which is read to see that it is one.

    Raises:
        InputError: it is none, or its file has another name than model directories use.
    """
    found = Tokenizer(path).path
    if found.name != "tokenizer.model":
        raise InputError(f"--tokenizer {path}: expected a file called tokenizer.model, or its directory")
    return found.parent


if __name__ == "__main__":
    main()
