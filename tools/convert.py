"""Convert a model directory between Hugging Face's and Meta's format, or to another dtype.

python -m tools.convert --model llama-2-7b --to hf --output Llama-2-7b-hf
python -m tools.convert --model merged --to meta --shards 2 --output merged-meta
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import llama
from fsdp_train.settings import fail
from llama import InputError
from llama.files import check_free
from llama.weight_files import open_weights


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, write."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description="Convert a model directory.")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or Meta directory")
    parser.add_argument("--to", required=True, choices=("hf", "meta"))
    parser.add_argument("--output", required=True, metavar="DIR", help="must not exist")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as in the files")
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="model-parallel parts of a Meta directory (default: 1)"
    )
    options = parser.parse_args(arguments)
    try:
        check_free(options.output)
        weights = open_weights(options.model)
        stored = weights.read(next(iter(weights.shapes))).dtype
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: stored}[options.dtype]
        model = llama.load(options.model, dtype)
        if options.to == "hf":
            llama.save(model, options.output, tokenizer_from=options.model)
        else:
            llama.save_meta(model, options.output, options.shards, tokenizer_from=options.model)
    except InputError as error:
        fail(error)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
