"""One row in a process of its own: build, compare, warm up, time. Prints one line of JSON.

python -m tools.benchmark.row '{"program": "HF", "case": {...}, "weights": DIR, ...}'
"""

from __future__ import annotations

import gc
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fsdp_train.host import undisturbed
from fsdp_train.log import peak_memory
from fsdp_train.strategy import ParallelConfig
from fsdp_train.world import process_group
from llama.weight_files import open_weights
from tools.benchmark import generation
from tools.benchmark.cases import NEW_TOKENS, Case, flops, steps
from tools.benchmark.programs import LEARNING_RATE, PROGRAMS

MARK = "row: "


@dataclass(frozen=True)
class Row:
    """What one process measured.

    Attributes:
        seconds: of each timed round over all documents of the case.
        losses: mean over targets: of the first round, whose learning rate is zero, and of the first after it.
        first_step: seconds of the very first step, compilation included.
        peak_bytes: of the whole process on a CPU, of its tensors on a GPU.
    """

    seconds: list[float]
    tokens: int
    flops: float
    losses: list[float]
    trained: int
    first_step: float
    peak_bytes: int


def measure(program: str, case: Case, weights: Path, data: str, tokenizer: str, rounds: int) -> Row:
    """Two rounds to warm up, the first with a learning rate of zero, then `rounds` timed ones."""
    build, compiled, _ = PROGRAMS[program]
    if case.method == "generate":
        return measure_generation(program, case, weights, rounds)
    with ExitStack() as stack:
        world = stack.enter_context(process_group(ParallelConfig()))
        torch.manual_seed(0)
        model, optimizer, step = build(case, weights, world.device, compiled)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = open_weights(weights).config
        work = steps(case, config, data, tokenizer, program.startswith("ours"))
        documents = [document for batch in work for document in batch]
        seconds, losses, first_step = [], [], 0.0
        gc.disable()  # as in `fit`; peers gain from it, too
        if program.startswith("ours"):
            stack.enter_context(undisturbed(world.device))
        rounds = 2 if case.regime == "real" else rounds  # of many steps each
        for index in range(rounds + 2):
            for group in optimizer.param_groups:
                group["lr"] = 0.0 if index == 0 else LEARNING_RATE
            began = time.perf_counter()
            total, targets = torch.zeros((), device=world.device), 0
            for batch in work:
                loss, count = step(batch)
                total, targets = total + loss, targets + count
                first_step = first_step or time.perf_counter() - began
            mean = float(total) / targets  # waits for the device
            if index < 2:
                losses.append(mean)
            else:
                seconds.append(time.perf_counter() - began)
            gc.collect()
        tokens = sum(len(d.ids) for d in documents)
        operations = flops(case, config, documents, trained)
        return Row(seconds, tokens, operations, losses, trained, first_step, peak_memory(world.device))


def measure_generation(program: str, case: Case, weights: Path, rounds: int) -> Row:
    """One call to warm up, then `rounds` timed ones; the losses are those of the prompts."""
    build = generation.ours if program.startswith("ours") else generation.hugging_face
    with process_group(ParallelConfig()) as world:
        config = open_weights(weights).config
        documents = steps(case, config, "", "", False)[0]
        prompts = [document.ids.tolist() for document in documents]
        _, generate, loss = build(weights, world.device, PROGRAMS[program][1])
        with torch.no_grad():
            losses = [float(loss(torch.tensor(prompts, device=world.device)))] * 2
        seconds = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            generate(prompts)
            seconds.append(time.perf_counter() - began)
        tokens = len(prompts) * NEW_TOKENS
        operations = flops(case, config, documents, 0)
        return Row(seconds[1:], tokens, operations, losses, 0, seconds[0], peak_memory(world.device))


if __name__ == "__main__":
    task: dict[str, Any] = json.loads(sys.argv[1])
    task["case"], task["weights"] = Case(**task["case"]), Path(task["weights"])
    print(MARK + json.dumps(asdict(measure(**task))), flush=True)
