"""What each process holds, strategy by strategy: the arithmetic that says which one you need, before anything is loaded.

    python -m tools.plan_memory --preset llama2-7b --method full --processes 4 --gpu 80
    python -m tools.plan_memory --model Llama-2-7b-hf --method lora --processes 1 --gpu 24

Exact for what stays from step to step: parameters, gradients and AdamW's state, as the program counts them after wrapping.
Beside them a process needs the unit that is gathered while it computes (two of them, where the next one is fetched ahead), and
what depends on the batch: activations, and about 2 GB of a GPU for the libraries themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from fsdp_train.build import ADAPTER_METHODS, FinetuneConfig, adapter_config, trained_names
from fsdp_train.settings import fail
from fsdp_train.units import shares, total_bytes
from llama import PRESETS, InputError, Llama, LlamaConfig
from llama.errors import nearest
from llama.weight_files import open_weights
from peft_impl import add_adapter, count_parameters, train_only

GB = 1e9
LIBRARIES = 2 * GB  # of a GPU: CUDA, cuBLAS, NCCL


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, count, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.plan_memory", description=__doc__.split("\n\n")[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="DIR", help="Hugging Face or Meta directory of the base")
    model.add_argument("--preset", metavar="NAME", help=f"a known size instead: {', '.join(PRESETS)}")
    parser.add_argument("--method", default="lora", choices=[*ADAPTER_METHODS, "full", "head"])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2, help="of hsdp")
    parser.add_argument(
        "--precision", default="bf16", choices=["bf16", "fp32"], help="of frozen weights and of the computation"
    )
    parser.add_argument("--gpu", type=float, metavar="GB", help="memory of one, to say what fits")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(plan(options)))
    except InputError as error:
        fail(error)


def plan(options: argparse.Namespace) -> list[str]:
    """The table's lines.

    Raises:
        InputError: no such model or preset, or numbers that do not divide.
    """
    if options.preset and options.preset not in PRESETS:
        raise InputError(f"--preset {options.preset}: expected {', '.join(PRESETS)}{nearest(options.preset, PRESETS)}")
    if options.processes < 1 or options.replicas < 1:
        raise InputError("--processes and --replicas: expected at least 1")
    config = PRESETS[options.preset] if options.preset else open_weights(options.model).config
    model = built(config, options.method, options.precision)
    trainable, total = count_parameters(model)
    lines = [
        f"{total:,} parameters, {trainable:,} of them train; {options.precision}, masters and AdamW in fp32",
        f"  GB per process, of {options.processes}:  parameters  gradients  optimizer      sum  + gathered unit",
    ]
    ways = {"none, or ddp": (1, False), "fsdp": (options.processes, False), "fsdp2": (options.processes, True)}
    if options.processes % options.replicas == 0 and 1 < options.replicas < options.processes:
        ways[f"hsdp, {options.replicas} replicas"] = (options.processes // options.replicas, False)
    sums = {}
    for name, (shards, by_row) in ways.items():
        if shards == 1 and name != "none, or ddp":
            continue
        held = total_bytes(shares(model, shards, by_row))
        unit = 0 if shards == 1 else largest_unit(model, options.precision)
        sums[name] = sum(held) + unit
        fits = "" if options.gpu is None else verdict(sums[name] + LIBRARIES, options.gpu * GB)
        numbers = " ".join(f"{n / GB:>10.2f}" for n in (*held, sum(held)))
        lines.append(f"  {name:<24} {numbers} {unit / GB:>16.2f}{fits}")
    if "fsdp" in sums:
        ratio = sum(total_bytes(shares(model, 1, False))) / sum(total_bytes(shares(model, options.processes, False)))
        lines.append(f"  what ddp holds / what fsdp holds on {options.processes}: {ratio:.2f}")
    return lines


def built(config: LlamaConfig, method: str, precision: str) -> Llama:
    """The model as the program trains it, without values."""
    finetune, frozen = FinetuneConfig(method=method), {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]  # type: ignore[arg-type]
    with torch.device("meta"):
        model = Llama(config)
    names = trained_names(finetune, config, config)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in names else frozen)
    train_only(model, names)
    if method in ADAPTER_METHODS:
        add_adapter(model, adapter_config(finetune))
    return model


def largest_unit(model: Llama, precision: str) -> int:
    """Bytes of the largest unit while it is gathered, in the dtype of the computation."""
    size = 2 if precision == "bf16" else 4
    return max(row.parameters for row in shares(model, 2, by_row=False)) * size


def verdict(needed: float, memory: float) -> str:
    """For people."""
    left = memory - needed
    return f"   fits, {left / GB:.1f} GB left for activations" if left > 0 else "   does not fit"


if __name__ == "__main__":
    main()
