"""Turn a file of the official LLaMA-Adapter repository into an adapter directory.

    python -m tools.convert_adapter --model DIR --official adapter.pth --gate-activation tanh --output adapter

The file does not say whether tanh belongs to its gates: the repository's training code has it, its released inference code
does not. With --peft the directory is one that Hugging Face `peft` opens, or the tool says why that would be another function.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import llama
from fsdp_train.settings import fail
from llama import InputError
from llama.files import check_free
from peft_impl import load_official, save_adapter, to_peft_form


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, write."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert_adapter", description="Convert an official LLaMA-Adapter.")
    parser.add_argument("--model", required=True, metavar="DIR", help="the base: a Hugging Face or Meta directory")
    parser.add_argument("--official", required=True, metavar="FILE", help="the repository's .pth file")
    parser.add_argument("--gate-activation", required=True, choices=("identity", "tanh"), help="what its gates go through")
    parser.add_argument("--adapter-len", type=int, default=10, metavar="N", help="prompt length, tokens (default: 10)")
    parser.add_argument("--peft", action="store_true", help="one gate per layer without activation, as PEFT has")
    parser.add_argument("--output", required=True, metavar="DIR", help="must not exist")
    options = parser.parse_args(arguments)
    try:
        check_free(options.output)
        model = llama.load(options.model)
        load_official(model, options.official, options.gate_activation, adapter_len=options.adapter_len)
        if options.peft:
            to_peft_form(model)
        size = save_adapter(model, options.output, base=options.model)
    except InputError as error:
        fail(error)
    print(f"wrote {options.output}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
