"""Dropout: the gradient is the derivative of the loss, whatever is compiled or computed again; its masks are random.

All cases with the compiler's own code: `python -m tests.dropout_gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_impl.dropout import Dropout, drawn_masks
from tests.dropout_gradients import AGREE, CASES, FACTORS, Case, can_run, covering, groups, pairs, run, without_code

IN_SUITE = CASES[:12]  # of a greedy choice the first have the most pairs
CPU = torch.device("cpu")
DEVIATIONS = 5  # of a normal variable: once in two million


@pytest.mark.parametrize("cases", groups(IN_SUITE, len(IN_SUITE)), ids=["one process", "two processes"])
def test_the_gradient_is_the_derivative_of_the_loss(cases: Sequence[Case], tmp_path: Path) -> None:
    for case, found in zip(cases, run(cases, tmp_path, without_code), strict=True):
        assert max(found) < AGREE, case


def test_the_cases_hold_every_pair_that_can_be_had() -> None:
    found = {pair for case in CASES for pair in pairs(case)}
    names = list(FACTORS)
    for i, first in enumerate(names):
        for j, second in list(enumerate(names))[i + 1 :]:
            for a in FACTORS[first]:
                for b in FACTORS[second]:
                    impossible = not can_run({"compiled": False, "strategy": "none"} | {first: a, second: b})
                    assert impossible != (((i, a), (j, b)) in found)
    assert covering(FACTORS, can_run) == CASES


# --- the masks ----------------------------------------------------------------------------------------------------------


def masks(p: float, rows: int, width: int, count: int) -> list[Tensor]:
    """What compiled code drops, 1 where it keeps: of several layers, drawn together."""
    layers = torch.nn.ModuleList(Dropout(p) for _ in range(count))
    compiled = [torch.compile(layer, backend="eager", fullgraph=True) for layer in layers]
    x = torch.ones(rows, width, dtype=torch.float64)
    with drawn_masks(layers, CPU):
        found = [layer(x) for layer in compiled]
    assert all(torch.equal(y.unique(), torch.tensor([0, 1 / (1 - p)], dtype=x.dtype)) for y in found)
    return [(y > 0).double() for y in found]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_are_independent_and_of_the_right_mean(p: float) -> None:
    torch.manual_seed(0)
    first, second = masks(p, 512, 768, 2)
    a, b = ((mask - (1 - p)) / math.sqrt(p * (1 - p)) for mask in (first, second))  # mean 0, variance 1
    products = {"mean": a, "layers": a * b, "rows": a[1:] * a[:-1], "columns": a[:, 1:] * a[:, :-1]}
    products |= {"halves": a[:256] * a[256:], "corners": a[1:, 1:] * a[1:, :-1] * a[:-1, 1:] * a[:-1, :-1]}
    for name, product in products.items():
        assert abs(product.sum()) < DEVIATIONS * math.sqrt(product.numel()), name
    for sums in (a.sum(0) / math.sqrt(len(a)), a.sum(1) / math.sqrt(a.shape[1])):  # of columns, of rows
        chi_square = sums.square().sum() - len(sums)
        assert abs(chi_square) < DEVIATIONS * math.sqrt(2 * len(sums))


def test_words_are_drawn_anew_each_time_and_from_the_seed() -> None:
    torch.manual_seed(0)
    first, second = (masks(0.5, 8, 16, 1)[0] for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(masks(0.5, 8, 16, 1)[0], first)
    assert not torch.equal(first, second)


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for layer in (Dropout(0.5).eval(), Dropout(0.0)):
        with drawn_masks(layer, CPU):
            assert layer.words is None
            assert torch.equal(layer(torch.ones(3)), torch.ones(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_uncompiled_dropout_is_torchs_own() -> None:
    x, layer = torch.randn(4, 8), Dropout(0.3)
    results: list[Any] = []
    for draw in (lambda: layer(x), lambda: torch.nn.functional.dropout(x, 0.3)):
        torch.manual_seed(1)
        results.append(draw())
    assert torch.equal(*results)
