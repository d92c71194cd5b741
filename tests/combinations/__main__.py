"""Is the program right in every combination of its settings?

    python -m tests.combinations                # all rows and edges, with the code generator: within an hour
    python -m tests.combinations --fast         # the part that the suite has
    python -m tests.combinations --list         # which there are
    python -m tests.combinations 7 12           # these alone

Each is run by the program's flags and compared with a loop in float64 (oracle.py); docs/combinations.md says how.
Ends with the counts; not zero if one is not equal.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.combinations.array import CORE, REFUSALS, all_rows, allows, fast_rows, here
from tests.combinations.case import Case, Job
from tests.combinations.covering import Row, parts, parts_of
from tests.combinations.edges import edge_cases
from tests.combinations.runs import run_together
from tests.combinations.verdict import Verdict, verdict_of

TOGETHER = 8  # cases of one group of processes
SEEDS = 5  # data that are tried
SECONDS = {"no": 60, "yes": 600}  # of a case, without and with the code generator, before it counts as hanging


def all_cases(work: Path) -> list[Case]:
    """The rows of the array, and the edges after them."""
    rows = all_rows()[0]
    return [*(Case(row, work, f"row {number}") for number, row in enumerate(rows)), *edge_cases(work)]


def fast_cases(work: Path) -> list[Case]:
    """What the suite runs: no code generator, no 1,000 steps."""
    cases = all_cases(work)
    rows = len(all_rows()[0])
    return [*(cases[number] for number in fast_rows()), *(case for case in cases[rows:] if case.processes == 2)]


@contextmanager
def one_thread() -> Iterator[None]:
    """For matrices of 32 x 32 in float64 a second thread has nothing to do but to wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def results(cases: Sequence[Case], work: Path) -> Iterator[tuple[Case, Verdict]]:
    """Run them and compare them, those of like processes together; with other data where they show nothing."""
    blind: list[Case] = []
    starts: dict[Path, Job] = {case.start: case.start_job() for case in cases}
    run_together(1, [[job] for job in starts.values()], work / "processes", SECONDS["no"])
    groups: dict[tuple[int, str], list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.processes, case["compile"]].append(case)
    for (processes, compiled), group in sorted(groups.items()):
        for first in range(0, len(group), TOGETHER):
            some = group[first : first + TOGETHER]
            jobs = [case.jobs() for case in some]
            errors = run_together(processes, jobs, work / "processes", SECONDS[compiled])
            for case, error in zip(some, errors, strict=True):
                with one_thread():
                    verdict = Verdict(error=error) if error else verdict_of(case)
                if verdict.blind and case.seed < SEEDS:
                    blind.append(dataclasses.replace(case, seed=case.seed + 1))
                else:
                    yield case, verdict
    if blind:
        yield from results(blind, work)


def described(row: Row) -> str:
    """What is not the first value of its setting."""
    first = {name: values[0] for name, values in here().items()}
    return ", ".join(f"{name} {value}" for name, value in row.items() if name == "method" or value != first[name])


def count(equal: Sequence[Row]) -> str:
    """What of all that is allowed these rows hold."""
    impossible = set(all_rows()[1])
    wanted = set(parts(here(), CORE)) - impossible
    held = {part for row in equal for part in parts_of(row, CORE)} & wanted
    refused = {part for part in impossible if not allows(dict(part))}
    lines = []
    for size, name in ((2, "pairs"), (3, "triples of " + ", ".join(CORE))):
        allowed, covered = (sum(len(part) == size for part in some) for some in (wanted, held))
        lines.append(f"{name}: {allowed:,} allowed, {covered:,} covered and equal")
    pairs = sum(len(part) == 2 for part in refused)
    rest = len(impossible) - len(refused)
    lines.append(
        f"refused: {pairs:,} pairs by {len(REFUSALS)} declarations; {rest:,} pairs and triples need a third setting that is"
    )
    return "\n".join(lines)


def main() -> None:
    words = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        cases = all_cases(work)
        if words == ["--list"]:
            print("\n".join(f"{number:3} {case.name}: {described(case.row)}" for number, case in enumerate(cases)))
            return
        chosen = fast_cases(work) if words == ["--fast"] else [cases[int(word)] for word in words] or cases
        began, equal = time.monotonic(), []
        for seen, (case, verdict) in enumerate(results(chosen, work), 1):
            if verdict.equal:
                equal.append(case.row)
            passed = time.monotonic() - began
            word = "equal" if verdict.equal else "NOT EQUAL"
            print(f"{seen:3} of {len(chosen)}  {passed:4.0f} s  {case.name} {word}: {verdict}", flush=True)
            if not verdict.equal:
                print(f"    {described(case.row)}", flush=True)
    print(count(equal))
    print(f"cases: {len(chosen)}, {len(chosen) - len(equal)} not equal, {time.monotonic() - began:.0f} s")
    sys.exit(len(equal) < len(chosen))


if __name__ == "__main__":
    main()
