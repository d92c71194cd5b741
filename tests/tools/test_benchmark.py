"""The benchmark measures what it says, on a tiny model; and calls a comparison void that compares different things."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llama
from fsdp_train.data import Sample
from tests.launch import ROOT
from tools.benchmark.__main__ import main
from tools.benchmark.cases import SIZES, Case, flops, steps
from tools.benchmark.programs import ours
from tools.benchmark.report import Result, table, void
from tools.benchmark.row import Row

TINY = Case("lora", "fixed", "tiny", 2, 16)


def row(losses: list[float], trained: int = 5) -> Row:
    return Row([2.0, 1.0, 4.0], 100, 5e9, losses, trained, 3.0, 10**9)


def test_a_run_leaves_a_table_numbers_and_a_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = [
        *("benchmark", "--size", "tiny", "--length", "16", "--batch", "2", "--rounds", "1", "--repeats", "1"),
        *("--cases", "lora,real", "--programs", "ours, eager; HF; torchtune", "--output", str(out)),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr("tools.benchmark.__main__.PATIENCE", 0)
    monkeypatch.setattr("tools.benchmark.__main__.ceilings", lambda device: {"gemm_bf16": 1.0, "copy": 2.0})
    main()
    text = (out / "table.txt").read_text()
    assert "lora, fixed 2 x 16, tiny" in text
    assert "give --data FILE and --tokenizer DIR" in text
    assert "void" not in text  # the same losses and as many parameters as Hugging Face
    found = {
        r["program"]: r for r in json.loads((out / "results.json").read_text())["results"] if r["case"]["regime"] == "fixed"
    }
    mine, theirs = found["ours, eager"]["rows"][0], found["HF"]["rows"][0]
    assert mine["trained"] == theirs["trained"] == 2 * 2 * 8 * (64 + 64)
    assert mine["tokens"] == 2 * 2 * 16
    assert (out / "tokens_per_second.png").stat().st_size > 1000


def test_what_differs_is_void() -> None:
    peer = Result(TINY, "HF", [row([1.0, 0.9])])
    assert void(Result(TINY, "ours", [row([1.01, 0.91])]), peer) == ""
    assert "first loss 1.0300, 1.0000 in HF" in void(Result(TINY, "ours", [row([1.03, 0.9])]), peer)
    assert "second loss" in void(Result(TINY, "ours", [row([1.0, float("nan")])]), peer)
    assert "6 parameters train, 5 in HF" in void(Result(TINY, "ours", [row([1.0, 0.9], 6)]), peer)


def test_of_real_documents_the_first_loss_counts() -> None:
    """Rows are other steps than padded batches: after the first update the weights differ."""
    real = dataclasses.replace(TINY, regime="real")
    peer = Result(real, "HF", [row([1.0, 0.9])])
    assert void(Result(real, "ours", [row([1.01, 0.5])]), peer) == ""
    assert "first loss" in void(Result(real, "ours", [row([1.03, 0.9])]), peer)


def test_the_table_has_ratios_of_the_best() -> None:
    slow = Result(TINY, "HF", [dataclasses.replace(row([1.0, 0.9]), seconds=[4.0, 2.0])])
    fast = Result(TINY, "ours", [row([1.0, 0.9])])
    line = next(x for x in table([fast, slow], {"gemm_bf16": 10.0}).splitlines() if x.strip().startswith("ours"))
    # best 100, median 50; twice HF; 5 GFLOP/s of 10
    assert line.split()[1:6] == ["100", "50", "2.00", "-", "50.0%"]


@pytest.mark.parametrize("method", ["full", "lora", "partial"])
def test_the_arithmetic_is_what_torch_counts(method: str, tmp_path: Path) -> None:
    """Matrix products with weights, which torch counts one by one; attention, a triangle here and a square there, left out."""
    config = dataclasses.replace(SIZES["tiny"], num_hidden_layers=4)
    torch.manual_seed(0)
    llama.save(llama.Llama(config), tmp_path)
    case = dataclasses.replace(TINY, method=method, regime="labels")
    documents = steps(case, config, "", "", False)[0]
    model, _, step = ours(case, tmp_path, torch.device("cpu"), False)
    with FlopCounterMode(display=False) as counter:
        step(documents)
    products = {k: v for k, v in counter.get_flop_counts()["Global"].items() if "attention" not in str(k)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Only attention is quadratic in a document's length: two halves have half of it, and what is left is linear.
    halves = [
        Sample(d.where, ids, labels, 1)
        for d in documents
        for ids, labels in zip(np.split(d.ids, 2), np.split(d.labels, 2), strict=True)
    ]
    expected = 2 * flops(case, config, halves, trained) - flops(case, config, documents, trained)
    # The lowest layer's inputs need no gradient, where nothing below trains: a few products less than the formula.
    assert expected * 0.9 < sum(products.values()) <= expected * 1.001


def test_mistakes_are_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark", "--cases", "loora"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "loora" in done.stderr
    assert "lora" in done.stderr
