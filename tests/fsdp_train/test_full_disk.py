"""A disk that fills up at some point: one line, and nothing lost (all points: `python -m tests.full_disk`)."""

from __future__ import annotations

from pathlib import Path

from tests.full_disk import run_all


def test_a_disk_that_fills_up_costs_one_line_and_no_bit(tmp_path: Path) -> None:
    """While the lock, the rehearsal, a checkpoint and the result are written."""
    tried, faults = run_all(every=13, directory=tmp_path.resolve(), kinds=("lora",))
    assert faults == []
    assert tried == 4
