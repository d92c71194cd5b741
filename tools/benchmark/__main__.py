"""Train the same model on the same batches with this project and with its peers, and compare.

    pip install -c constraints.txt -e ".[bench]"
    python -m tools.benchmark --data alpaca.json --tokenizer DIR
    python -m tools.benchmark --device cuda                        # Llama 2 7B, random weights

Every row is a process of its own; the programs take turns (A B C A B C); before each the machine has to be idle. A row counts
only if it trains as many parameters and finds the same losses as Hugging Face. Not a test: nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

import llama
from llama.errors import InputError, nearest
from tools.benchmark.cases import CASES, SIZES, Case, data_missing
from tools.benchmark.ceilings import ceilings
from tools.benchmark.programs import PROGRAMS
from tools.benchmark.report import Result, draw, table, write_json
from tools.benchmark.row import MARK, Row

IDLE = 0.95  # part of the processors' time, over one second
PATIENCE = 30  # seconds to wait for it
TIMEOUT = 1800
OTHERS = ("litgpt", "torchtune")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, help="of the model (default: S on a CPU, 7b on a GPU)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--programs", default="; ".join(PROGRAMS), help="separated by ; (default: all that are installed)")
    parser.add_argument("--batch", type=int, help="documents at once (default: 4 on a CPU, 2 on a GPU; 8 of real ones)")
    parser.add_argument("--length", type=int, help="tokens of each (default: 512 on a CPU, 2048 on a GPU)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: the size's)")
    parser.add_argument("--data", default="", help="instructions whose lengths are real, .json")
    parser.add_argument("--tokenizer", default="", help="directory or file, for --data")
    parser.add_argument(
        "--peers_python",
        default=sys.executable,
        metavar="PATH",
        help="of another environment, with litgpt and torchtune: the latter wants an older torchao than peft",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds over the documents in each process")
    parser.add_argument("--repeats", type=int, default=2, help="processes per row, in turns")
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="table, JSON and chart go here")
    arguments = parser.parse_args()
    try:
        cases = [_case(CASES[_known(name, CASES)], arguments) for name in arguments.cases.split(",")]
        programs = [_known(name.strip(), PROGRAMS) for name in arguments.programs.split(";")]
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: here is no GPU that torch can use")
    except InputError as error:
        sys.exit(f"error: {error}")
    run(cases, programs, arguments)


def _known(name: str, names: Mapping[str, object]) -> str:
    if name not in names:
        raise InputError(f"{name}: expected {'; '.join(names)}{nearest(name, names)}")
    return name


def _case(case: Case, arguments: argparse.Namespace) -> Case:
    gpu = arguments.device == "cuda"
    real = case.regime == "real"
    return dataclasses.replace(
        case,
        size=arguments.size or ("7b" if gpu else "S"),
        batch=arguments.batch or (case.batch if real or case.method == "generate" else 2 if gpu else 4),
        length=arguments.length or (case.length if case.method == "generate" else 2048 if gpu else 512),
    )


def _config(size: str, layers: int | None) -> llama.LlamaConfig:
    return dataclasses.replace(SIZES[size], num_hidden_layers=layers or SIZES[size].num_hidden_layers)


def run(cases: list[Case], programs: list[str], arguments: argparse.Namespace) -> None:
    """Measure the ceilings, then all rows in turns; write the table after every row, so that nothing is lost."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    if arguments.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    _wait_until_idle()
    limits = ceilings(torch.device(arguments.device))
    results = [Result(case, program, []) for case in cases for program in programs]
    with tempfile.TemporaryDirectory() as directory:
        for size in dict.fromkeys(case.size for case in cases):
            torch.manual_seed(0)
            with torch.device(arguments.device):
                model = llama.Llama(_config(size, arguments.layers)).to(torch.bfloat16)
            llama.save(model, Path(directory) / size)
            del model
        for _ in range(arguments.repeats):
            for result in results:
                _one(result, Path(directory) / result.case.size, arguments)
                text = f"{machine}\n{table(results, limits)}\n"
                (arguments.output / "table.txt").write_text(text, encoding="utf-8")
                write_json(results, limits, machine, arguments.output / "results.json")
    print(text)
    draw(results, arguments.output / "tokens_per_second.png")
    print(f"written: {arguments.output}")


def _one(result: Result, weights: Path, arguments: argparse.Namespace) -> None:
    case, (_, _, needs) = result.case, PROGRAMS[result.program]
    python = arguments.peers_python if result.program.startswith(OTHERS) else sys.executable
    if missing := [name for name in needs if not _installed(name, python)]:
        result.missing = f"not installed: {', '.join(missing)}"
    elif reason := data_missing(case, arguments.data, arguments.tokenizer):
        result.missing = reason
    elif not _compared(result.program, case):
        result.missing = "not compared"
    if result.missing:
        return
    task = {"program": result.program, "case": asdict(case), "weights": str(weights), "data": arguments.data,
            "tokenizer": arguments.tokenizer, "rounds": arguments.rounds}  # fmt: skip
    idle = _wait_until_idle()
    print(f"{case.name}: {result.program} ...", end=" ", flush=True)
    environment = dict(os.environ)
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([python, "-m", "tools.benchmark.row", json.dumps(task)], capture_output=True, text=True,
                          env=environment, timeout=TIMEOUT)  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        result.missing = f"failed: {(done.stderr.strip() or 'no output').splitlines()[-1][:150]}"
        print(result.missing)
        return
    row = Row(**json.loads(found[0].removeprefix(MARK)))
    result.rows.append(row)
    result.noisy |= not idle
    print(f"{row.tokens / min(row.seconds):,.0f} tokens/s, {row.peak_bytes / 1e9:.2f} GB", flush=True)


def _compared(program: str, case: Case) -> bool:
    """Whether a program has what a case asks for, or could be told to here."""
    if program.startswith(OTHERS):
        return case.method in ("lora", "full") and case.checkpointing == "none"
    return program.startswith("ours") or case.checkpointing != "selective"


@lru_cache
def _installed(name: str, python: str) -> bool:
    if python == sys.executable:
        return find_spec(name) is not None
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0


def _wait_until_idle() -> bool:
    """Whether the processors were idle before PATIENCE ended; True where nobody can tell (no /proc)."""
    for _ in range(PATIENCE):
        share = _idle_share()
        if share is None or share >= IDLE:
            return True
    return False


def _idle_share() -> float | None:
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def read() -> list[int]:
        return [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]

    before = read()
    time.sleep(1)
    spent = [after - earlier for after, earlier in zip(read(), before, strict=True)]
    return (spent[3] + spent[4]) / max(1, sum(spent))


if __name__ == "__main__":
    main()
