"""Does the program with compiled layers end with the numbers of the run without, whatever stands beside it?

    python -m tests.compiled_programs            # all cases, a line for each; not zero if one fails
    python -m tests.compiled_programs 7 12       # these alone

Each case is two runs of the whole program, with the code generator that users get: one plain, one with
`--parallel.compile true`. Together they hold every pair of values in `FACTORS` that can be had.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch._dynamo as dynamo

import llama
from tests.dropout_gradients import Case, covering
from tests.fsdp_train.curves import run_on
from tests.oracle import SHAPES, randomise

DEMO = Path(__file__).resolve().parents[1] / "fsdp_train" / "demo" / "base"
SAME = {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.01}  # of a loss near 6: compiled code rounds elsewhere
LORA = "--finetune.lora."
LAST = ("--finetune.method", "llama_adapter", "--finetune.llama_adapter.adapter_layers", "1")
GATES = ("--finetune.llama_adapter.gate", "head", "--finetune.llama_adapter.gate_activation", "tanh")
METHODS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "lora all-linear": (LORA + "target_modules", "all-linear"),
    "dora": (LORA + "use_dora", "true", LORA + "target_modules", "all-linear"),
    "lora, norms": (LORA + "modules_to_save", "norm"),
    "lora, lm_head": (LORA + "modules_to_save", "lm_head,embed_tokens"),
    "llama_adapter": LAST,
    "llama_adapter, gates per head": (*LAST, *GATES),
    "prefix": ("--finetune.method", "prefix"),
    "prefix, projected": ("--finetune.method", "prefix", "--finetune.prefix.prefix_projection", "true"),
    "full": ("--finetune.method", "full"),
    "partial last:1": ("--finetune.method", "partial", "--finetune.partial.train", "last:1"),
    "partial norms": ("--finetune.method", "partial", "--finetune.partial.train", "norms"),
    "head": ("--finetune.method", "head"),
    "full, classifier": ("--finetune.method", "full", "--finetune.head.kind", "classification"),
    "lora, classifier": ("--finetune.head.kind", "classification"),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "method": tuple(METHODS),
    "checkpointing": ("none", "full", "selective"),
    "precision": ("fp32", "bf16", "fp16"),
    "strategy": ("none", "ddp", "fsdp2"),  # none: one process, the others: two
    "generates": (False, True),
    "packing": (False, True),
    "resumed": (False, True),
}
STEPS = 4


def can_run(setting: dict[str, Any]) -> bool:
    """A classifier answers no prompts, and has one text in a row."""
    classifies = "classifier" in setting["method"]
    return not (classifies and (setting["generates"] or setting["packing"]))


CASES = covering(FACTORS, can_run)


def prepare(directory: Path) -> None:
    """A random base of two layers, prompts with answers, and texts with labels."""
    small = dataclasses.replace(SHAPES["gqa"], hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    vocabulary = llama.Tokenizer(DEMO).vocab_size
    model = llama.Llama(dataclasses.replace(small, vocab_size=vocabulary, max_position_embeddings=128))
    randomise(model)
    llama.save(model, directory / "base", tokenizer_from=DEMO)
    # Of equal length, so that there are few shapes to compile.
    asked = [{"prompt": f"{a}{b} ", "completion": a + b} for a, b in zip("abcdefghij", "klmnopqrst", strict=True)]
    named = [{"text": text, "label": text[0]} for text in ["aab", "bab", "abb", "bbb"] * 3]
    for name, rows in (("asked", asked), ("named", named)):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def flags(case: Case, directory: Path, out: Path, compiled: bool) -> list[str]:
    """The command of one run of a case."""
    setting = dict(zip(FACTORS, case, strict=True))
    data = "named" if "classifier" in setting["method"] else "asked"
    processes = 1 if setting["strategy"] == "none" else 2
    given: list[Any] = [
        *("--model.path", directory / "base", "--data.path", directory / f"{data}.jsonl"),
        *("--data.max_length", 16, "--data.eval_fraction", 0.2, "--data.packing", str(setting["packing"]).lower()),
        *("--parallel.precision", setting["precision"], "--parallel.strategy", setting["strategy"]),
        *("--train.max_steps", STEPS, "--train.batch_size", 2 // processes, "--log.every", 1, "--optim.lr", 1e-3),
        *("--checkpoint.every", 2, "--train.output_dir", out, "--train.samples", int(setting["generates"])),
        *("--parallel.activation_checkpointing", setting["checkpointing"]),
        *("--parallel.compile", str(compiled).lower(), *METHODS[setting["method"]]),
    ]
    if setting["generates"]:
        given += ["--train.exact_match", 2, "--train.sample_tokens", 3]
    return list(map(str, given))


def measured(out: Path) -> list[tuple[str, float]]:
    """What a run measured: losses of its steps and of held-out data, exact matches."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(key, row[key]) for row in rows for key in ("loss", "eval_loss", "exact_match") if key in row]


def difference(case: Case, directory: Path) -> float:
    """The largest difference of a number between the plain run of a case and the compiled one."""
    setting = dict(zip(FACTORS, case, strict=True))
    processes = 1 if setting["strategy"] == "none" else 2
    found = []
    for compiled in (False, True):
        out = directory / ("compiled" if compiled else "plain")
        command = flags(case, directory, out, compiled)
        dynamo.reset()
        run_on(processes, [command], directory / "processes")
        if compiled and setting["resumed"]:  # as if it had been killed after step 2
            shutil.rmtree(out / "checkpoints" / f"step_{STEPS:08d}")
            for result in ("adapter", "model"):
                shutil.rmtree(out / result, ignore_errors=True)
            run_on(processes, [command], directory / "processes")
        found.append(measured(out))
        shutil.rmtree(out)
    plain, other = found
    assert [key for key, _ in plain] == [key for key, _ in other]
    return max(abs(a - b) for (_, a), (_, b) in zip(plain, other, strict=True))


def main() -> None:
    chosen = [int(word) for word in sys.argv[1:]] or range(1, len(CASES) + 1)
    wrong = 0
    for number in chosen:
        case = CASES[number - 1]
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            prepare(Path(directory))
            try:
                found = f"{difference(case, Path(directory)):.1e}"
                right = float(found) < SAME[case[2]]
            except (Exception, SystemExit) as error:
                found, right = f"{type(error).__name__}: {error}"[-300:], False
        wrong += not right
        seconds = time.monotonic() - began
        print(number, "right" if right else "WRONG", *case, found, f"{seconds:.0f} s", flush=True)
    print(f"{len(chosen)} cases, {wrong} wrong", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
