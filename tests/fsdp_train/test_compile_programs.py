"""The program with compiled layers ends with the numbers of the run without: every method, checkpointing, generation.

One test takes the compiler that users get; the others its passes without generated code, which takes most of its time. Every
pair of settings with the generated code, on one process and two: `python -m tests.compiled_programs`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo as dynamo
import torch._functorch.config as functorch_config

import llama
from fsdp_train.main import main
from tests.compiled_programs import SAME, measured
from tests.dropout_gradients import without_code
from tests.fsdp_train.conftest import CONTEXT, VOCAB
from tests.oracle import SHAPES, randomise

RUN = ["--train.max_steps", "2", "--train.batch_size", "2", "--log.every", "1", "--checkpoint.every", "0", "--optim.lr", "1e-3"]
GENERATING = ["--train.samples", "1", "--train.exact_match", "2", "--train.sample_tokens", "3", "--data.eval_fraction", "0.2"]
SILENT = ["--train.samples", "0"]
LORA = "--finetune.lora."
CASES = [  # method's flags, checkpointing, precision, more flags
    ([], "full", "fp32", GENERATING),
    ([LORA + "use_dora", "true"], "selective", "bf16", SILENT),
    ([LORA + "modules_to_save", "norm"], "none", "fp32", SILENT),
    ([LORA + "modules_to_save", "gate_proj,embed_tokens,lm_head"], "full", "fp32", SILENT),
    (["--finetune.method", "prefix"], "selective", "fp32", ["--data.packing", "true", *SILENT]),
    (["--finetune.method", "llama_adapter", "--finetune.llama_adapter.adapter_layers", "1",
      "--finetune.llama_adapter.gate", "head", "--finetune.llama_adapter.gate_activation", "tanh"], "full", "fp32", SILENT),
    (["--finetune.method", "partial", "--finetune.partial.train", "last:1"], "full", "fp32", SILENT),
    (["--finetune.method", "full"], "selective", "fp16", SILENT),
    (["--finetune.method", "full", "--finetune.head.kind", "classification"], "full", "fp32", []),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, 32 wide."""
    small = dataclasses.replace(SHAPES["gqa"], hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    model = llama.Llama(dataclasses.replace(small, vocab_size=VOCAB, max_position_embeddings=CONTEXT))
    randomise(model)
    path = tmp_path_factory.mktemp("compiled") / "base"
    llama.save(model, path, tokenizer_from=tokenizer_dir)
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions, some with a label too; of equal length, so that there are few shapes to compile."""
    path = tmp_path_factory.mktemp("words") / "data.jsonl"
    rows = [{"prompt": f"{a}{b} ", "completion": a + b} for a, b in zip("abcdefghij", "klmnopqrst", strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": word, "label": word[0]}) for word in ["aab", "bab", "abb", "bbb"] * 2))
    return path


def numbers(out: Path, flags: list[str]) -> list[tuple[str, float]]:
    main([*flags, *RUN, "--train.output_dir", str(out)])
    return measured(out)


def compare(base: Path, data: Path, case: tuple[Any, ...], tmp_path: Path) -> None:
    method, checkpointing, precision, more = case
    flags = ["--model.path", str(base), "--data.path", str(data), "--parallel.precision", precision, *method, *more]
    expected = numbers(tmp_path / "plain", flags)
    compiled = ["--parallel.compile", "true", "--parallel.activation_checkpointing", checkpointing]
    dynamo.reset()
    found = numbers(tmp_path / "compiled", flags + compiled)
    assert len(expected) >= 2
    assert [key for key, _ in found] == [key for key, _ in expected]
    assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True)) < SAME[precision]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([*case[0], *case[1:3]]).replace("--finetune.", ""))
def test_a_compiled_run_has_the_numbers_of_a_plain_one(
    case: tuple[Any, ...], base: Path, words: Path, labelled: Path, tmp_path: Path
) -> None:
    with without_code():
        compare(base, labelled if "classification" in case[0] else words, case, tmp_path)


def test_the_same_with_the_code_that_users_get(base: Path, words: Path, tmp_path: Path) -> None:
    """Selective in fp32, where attention gives several results; and the compiler's settings are as they were."""
    before = dynamo.config.recompile_limit, functorch_config.activation_memory_budget
    compare(base, words, ([], "selective", "fp32", GENERATING), tmp_path)
    assert (dynamo.config.recompile_limit, functorch_config.activation_memory_budget) == before
