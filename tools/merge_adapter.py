"""Fold a LoRA adapter into its base and write a plain Hugging Face model directory.

    python -m tools.merge_adapter --model DIR --adapter out/adapter --output merged

Computed in fp32 and rounded once; what the rounding cost is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import llama
from fsdp_train.settings import fail
from fsdp_train.strategy import DTYPES
from llama import InputError
from llama.files import check_free
from peft_impl import load_adapter, match_head, merge_and_unload


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, merge, save."""
    parser = argparse.ArgumentParser(prog="python -m tools.merge_adapter", description="Fold a LoRA adapter into its base.")
    parser.add_argument("--model", required=True, metavar="DIR", help="the base: a Hugging Face or Meta directory")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="a PEFT LoRA directory")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the merged model goes; must not exist")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the merged weights (default: each the base's own)")
    options = parser.parse_args(arguments)
    try:
        check_free(options.output)
        model = llama.load(options.model, None if options.dtype is None else DTYPES[options.dtype])
        note = match_head(model, options.adapter)
        load_adapter(model, options.adapter)
        report = merge_and_unload(model)
        llama.save(model, options.output, tokenizer_from=options.model)
    except (InputError, OSError) as error:
        fail(error)
    written = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    print(f"merged {report.modules} modules into {options.output}, {' and '.join(written)}: {report}")
    if note:
        print(f"note: {note}")
    if report.is_large:
        print("note: --dtype fp32 keeps the whole update")


if __name__ == "__main__":
    main()
