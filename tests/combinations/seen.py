"""Is every fault of the code seen by the array or by the suite?

    python -m tests.combinations.seen faults            # the deliberate ones (faults.py)
    python -m tests.combinations.seen mutants           # the random ones (mutants.py)
    python -m tests.combinations.seen mutants 3 7       # these alone

Each is made in a copy of the files that git knows. There the array's part of the suite runs, then the suite, then the whole
array, until one of them fails. Not zero if one is not seen.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.combinations.faults import FAULTS, Fault
from tests.combinations.mutants import mutants
from tests.launch import ROOT

ARRAY = ["-m", "tests.combinations"]
SUITE = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--ignore=tests/combinations"]


def stages(fault: Fault) -> list[tuple[str, list[str], str]]:
    """What looks, and the words of a line that says that something is wrong. Its package's tests come first."""
    package = fault.file.partition("/")[0]
    return [
        ("array, its fast part", [*ARRAY, "--fast"], "NOT EQUAL"),
        ("its package's tests", [*SUITE, f"tests/{package}"], "FAILED"),
        ("suite", [*SUITE, "tests"], "FAILED"),
        ("array", ARRAY, "NOT EQUAL"),
    ]


def copied(directory: Path, fault: Fault) -> None:
    """The project with one change."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, directory / name)
    source = (directory / fault.file).read_text()
    assert source.count(fault.before) == 1, fault.what
    (directory / fault.file).write_text(source.replace(fault.before, fault.after))


def complaint(directory: Path, arguments: list[str], words: str) -> str:
    """The first line with these words, or the last one of a process that failed without any; nothing where all is well."""
    environment = {**os.environ, "PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=directory, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    last = ""
    try:
        for line in process.stdout:
            last = line.strip() or last
            if words in line:
                return last
        return last if process.wait() else ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def seen_by(fault: Fault) -> str:
    """What sees it, and how; empty where nothing does."""
    with tempfile.TemporaryDirectory() as directory:
        copied(Path(directory), fault)
        for stage, arguments, words in stages(fault):
            if found := complaint(Path(directory), arguments, words):
                return f"{stage}: {found[:150]}"
    return ""


def main() -> None:
    kind, *numbers = sys.argv[1:]
    every = {"faults": FAULTS, "mutants": mutants()}[kind]
    survivors = 0
    for number in [int(word) for word in numbers] or range(len(every)):
        began = time.monotonic()
        found = seen_by(every[number])
        survivors += not found
        print(f"{number:2} {every[number].what}: {found or 'SURVIVES'} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{survivors} survive")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
