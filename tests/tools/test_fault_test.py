"""A short form of the fault test: a real job that is killed ends as if nothing had been; and the test sees differences."""

from __future__ import annotations

import pytest
import torch

from tools import fault_test
from tools.fault_test import main


def test_one_round_ends_bit_identical(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--rounds", "1", "--steps", "8", "--kills", "1", "--seed", "3"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0, said
    assert "1 of 1 rounds bit-identical" in said
    assert "  auto       yes        rank " in said


def test_a_bit_or_a_loss_is_a_difference() -> None:
    result = {"a": torch.ones(3)}, [(1, 0.5), (2, 0.25)]
    whole = [(1, 0.5), (2, 0.25)]
    assert fault_test._same(result, ({"a": torch.ones(3)}, whole), 0)
    assert not fault_test._same(result, ({"a": torch.tensor([1, 1, 1 + 2**-23])}, whole), 0)
    assert not fault_test._same(result, ({"a": torch.ones(3)}, [(1, 0.5)]), 0)
    assert not fault_test._same(result, ({}, whole), 0)
    late = {"a": torch.ones(3)}, [(2, 0.25)]  # it began after step 1
    assert fault_test._same(late, result, 1)
    assert not fault_test._same(late, result, 0)


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--steps", "4"], ["--processes", "0"]])
def test_numbers_that_make_no_sense_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    assert "expected at least 1 each" in capsys.readouterr().err
