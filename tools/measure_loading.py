"""Peak host memory of each process while a model is loaded and spread, without training it.

    torchrun --nproc_per_node 4 -m tools.measure_loading --model DIR --method full --strategy fsdp2

Linux only: it reads the process's own numbers. "Own" memory leaves out the pages of the weight files that are mapped into it.
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fsdp_train.build import FinetuneConfig, ModelConfig, build_model, frozen_dtype, trained_names
from fsdp_train.parallel import held_bytes, place_model
from fsdp_train.settings import fail
from fsdp_train.strategy import ParallelConfig, precision_of
from fsdp_train.units import shares
from fsdp_train.world import World, process_group
from llama import InputError
from llama.weight_files import open_weights

MB = 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, print a line for each process."""
    parser = argparse.ArgumentParser(prog="python -m tools.measure_loading", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--method", default="lora", choices=["lora", "prefix", "llama_adapter", "full", "head"])
    parser.add_argument("--strategy", default="auto", choices=["auto", "none", "ddp", "fsdp", "fsdp2"])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    options = parser.parse_args(arguments)
    try:
        config = ParallelConfig(strategy=options.strategy, precision=options.precision)
        with process_group(config) as world:
            lines = world.gather(measured(options, config, world))
        if world.rank == 0:
            print("\n".join(lines))
    except InputError as error:
        fail(error)


def measured(options: argparse.Namespace, config: ParallelConfig, world: World) -> str:
    """What this process needed, for people."""
    weights, finetune = open_weights(options.model), FinetuneConfig(method=options.method)
    base = weights.config
    settings, dtype = ModelConfig(path=options.model), precision_of(config, world.device).param
    world.barrier("before loading")
    before, peak, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    names = trained_names(finetune, base, base)
    model, fill = build_model(weights, settings, finetune, base, names, 0, dtype)
    largest = max(row.parameters for row in shares(model, 2, by_row=False))
    unit = largest * (4 if names else frozen_dtype(settings, dtype).itemsize)
    placed = place_model(model, config, world, fill)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    gc.collect()
    kept, most = (own_memory() - before) / MB, (peak[0] - before) / MB
    return (
        f"rank {world.rank} of {world.size}: holds {held_bytes(placed) / MB:,.0f} MB; own memory {kept:,.0f} MB more than"
        f" before, at most {most:,.0f}; the largest unit is {unit / MB:,.0f} MB; {seconds:.1f} s"
    )


def own_memory() -> int:
    """Bytes of this process's resident memory that are not pages of a file."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(found["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main()
