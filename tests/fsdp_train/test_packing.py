"""Packed documents are documents alone: logits, losses, gradients; no document sees another; rows are full; runs repeat."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llama
from fsdp_train.data import Batch, Dataset, Sample, collate, load_dataset
from fsdp_train.main import main
from fsdp_train.packing import best_fit, packed
from llama.attention import Documents
from peft_impl import set_adapter
from tests.fsdp_train.common import build, samples
from tests.fsdp_train.curves import losses, run_on, tokens_file
from tests.oracle import DATA, LLAMA2_TOKENIZER, hf_model, largest, needs_data, randomise

ALONE = 1e-12  # float64: a document's rows enter matrix products of other shapes
SAME = 1e-6  # fp32, per step
CPU = torch.device("cpu")
METHODS = ["full", "lora", "prefix", "projected", "llama_adapter"]


def dataset(count: int = 9) -> Dataset:
    return Dataset(Path("made"), "tokens", {}, samples(count))


def one_batch(count: int = 9, capacity: int = 64) -> tuple[Batch, list[list[int]]]:
    data = packed(dataset(count), capacity)
    return data.batch(range(len(data)), CPU), data.rows


def documents_of(logits: Tensor, rows: list[list[int]], made: list[Sample]) -> dict[int, Tensor]:
    """The logits of each document by its index."""
    found = {}
    for row, indices in enumerate(rows):
        start = 0
        for index in indices:
            found[index] = logits[row, start : start + len(made[index].ids)]
            start += len(made[index].ids)
    return found


# --- which documents share a row ----------------------------------------------------------------------------------------


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The definition: look at every row."""
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [capacity - sum(lengths[i] for i in row) for row in rows]
        fits = [room for room in rooms if room >= lengths[index]]
        if fits:
            rows[max(i for i, room in enumerate(rooms) if room == min(fits))].append(index)
        else:
            rows.append([index])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_its_definition(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 40) for _ in range(200)]
    rows = best_fit(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)
    # Of rows with the same room either may be taken: which documents it holds differs then, how full the rows are does not.
    slow = slow_best_fit(lengths, 64)
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(sum(lengths[i] for i in row) for row in slow)
    assert rows == best_fit(lengths, 64)


def test_rows_are_never_longer_than_asked_and_documents_never_cut() -> None:
    data = packed(dataset(40), 64)
    assert data.width <= 64
    assert sorted(i for row in data.rows for i in row) == list(range(40))
    with pytest.raises(ValueError, match="in rows of 8"):
        packed(dataset(40), 8)


@needs_data
def test_real_instructions_fill_their_rows() -> None:
    tokenizer = llama.Tokenizer(LLAMA2_TOKENIZER)
    data = packed(load_dataset(str(DATA / "gsm8k_alpaca.json"), "auto", tokenizer, 32000, 2048), 2048)
    assert sum(len(s.ids) for s in data.samples) / (len(data) * data.width) > 0.98
    assert "packed into 719 rows of 2,048 tokens, 98.9% of them used" in data.packing_report()


# --- what a row computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_document_is_the_document_alone(method: str) -> None:
    model, made = build(method, dtype=torch.float64).double(), samples(9)
    batch, rows = one_batch()
    found = documents_of(model(**batch.inputs), rows, made)
    for index, sample in enumerate(made):
        alone = model(torch.tensor(sample.ids)[None].long())[0]
        assert largest(found[index], alone) < ALONE


def test_a_packed_document_is_hfs_document(tmp_path: Path) -> None:
    model = build("full")
    llama.save(model, tmp_path)
    oracle, made = hf_model(tmp_path), samples(9)
    batch, rows = one_batch()
    found = documents_of(model(**batch.inputs), rows, made)
    for index, sample in enumerate(made):
        assert largest(found[index], oracle(torch.tensor(sample.ids)[None].long()).logits[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_changing_a_document_leaves_every_bit_of_the_others(method: str, dtype: torch.dtype) -> None:
    model, made = build(method), samples(9)
    model.to(dtype)
    batch, rows = one_batch()
    before = documents_of(model(**batch.inputs), rows, made)
    ids = batch.inputs["input_ids"].clone()
    start = len(made[rows[0][0]].ids)
    changed = rows[0][1]  # in the middle of a row
    ids[0, start : start + len(made[changed].ids)] = 7
    after = documents_of(model(**{**batch.inputs, "input_ids": ids}), rows, made)
    assert not torch.equal(before[changed], after[changed])
    for index in range(9):
        assert index == changed or torch.equal(before[index], after[index])


def test_rows_with_different_adapters_keep_their_documents_apart() -> None:
    """A choice per row needs masks: the same meaning by another way."""
    model, made = build("prefix", dtype=torch.float64).double(), samples(9)
    batch, rows = one_batch()
    names = [None if row % 2 else "default" for row in range(len(rows))]
    set_adapter(model, names)
    found = documents_of(model(**batch.inputs), rows, made)
    for row, indices in enumerate(rows):
        set_adapter(model, names[row])
        for index in indices:
            assert largest(found[index], model(torch.tensor(made[index].ids)[None].long())[0]) < ALONE


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_a_padded_batch(method: str) -> None:
    def gradients(batch: Batch) -> dict[str, Tensor]:
        model = build(method, dtype=torch.float64).double()
        (model(**batch.inputs, labels=batch.labels) / batch.targets).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    padded, (row_batch, _) = collate(samples(9), CPU), one_batch()
    assert (padded.targets, padded.tokens, sorted(padded.where)) == (
        row_batch.targets,
        row_batch.tokens,
        sorted(row_batch.where),
    )
    found, expected = gradients(row_batch), gradients(padded)
    assert found.keys() == expected.keys()
    assert max(largest(found[name], expected[name]) for name in expected) < ALONE


def test_nothing_predicts_the_first_token_of_a_document() -> None:
    """Plain text learns every token; the end of a neighbour must not be asked for the next one's beginning."""
    ids = np.arange(3, 9, dtype=np.int32)
    data = packed(Dataset(Path("made"), "text", {}, [Sample("a", ids, ids, 1), Sample("b", ids, ids, 1)]), 12)
    batch = data.batch([0], CPU)
    assert batch.targets == 10
    assert batch.inputs["learned"].tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert batch.labels[0].tolist() == [-100, 4, 5, 6, 7, 8] * 2
    assert isinstance(batch.inputs["documents"], Documents)


def test_a_process_without_rows_takes_part() -> None:
    data = packed(dataset(), 64)
    batch = data.batch([], CPU)
    assert (batch.tokens, batch.targets, batch.where) == (0, 0, [])
    assert build("full")(**batch.inputs, labels=batch.labels).item() == 0


# --- runs ---------------------------------------------------------------------------------------------------------------


def test_one_process_is_two_and_a_resumed_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama.Llama(build("full").config)
    randomise(model)
    llama.save(model, tmp_path / "base")
    tokens_file(tmp_path / "data.jsonl", 97)

    def flags(out: str, *more: Any) -> list[str]:
        given = [
            *("--model.path", tmp_path / "base", "--data.path", tmp_path / "data.jsonl", "--data.max_length", 100),
            *("--data.packing", "true", "--train.output_dir", tmp_path / out, "--log.every", 1, "--train.samples", 0),
            *("--parallel.precision", "fp32", "--optim.schedule", "constant", "--checkpoint.every", 3, *more),
        ]
        return list(map(str, given))

    main(flags("one", "--train.max_steps", 8, "--train.batch_size", 4))
    assert "rows of 100 tokens" in capsys.readouterr().out
    whole = losses(tmp_path / "one")
    run_on(2, [flags("two", "--train.max_steps", 8, "--train.batch_size", 2)], tmp_path / "workers")
    assert max(abs(a - b) for a, b in zip(whole, losses(tmp_path / "two"), strict=True)) < SAME
    parts = flags("parts", "--train.batch_size", 4)
    main([*parts, "--train.max_steps", "3"])
    shutil.rmtree(tmp_path / "parts" / "adapter")  # as if it had ended there
    with pytest.raises(SystemExit):
        main([*parts, "--train.max_steps", "8", "--data.packing", "false"])
    assert "order" in capsys.readouterr().err
    main([*parts, "--train.max_steps", "8"])
    assert losses(tmp_path / "parts") == whole


def test_a_classifier_is_not_packed(tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": f"a {i}", "label": "ab"[i % 2]}) + "\n" for i in range(8)))
    with pytest.raises(SystemExit):
        main(
            [
                *("--model.path", str(model_dir), "--data.path", str(path), "--data.packing", "true"),
                *("--finetune.head.kind", "classification", "--train.output_dir", str(tmp_path / "out")),
            ]
        )
    assert "--data.packing true: a classifier looks at the end of each row" in capsys.readouterr().err
