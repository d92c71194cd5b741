"""Rows that hold every pair of values of any two settings, and every triple of the core ones: a covering array.

Greedy, seeded: a row begins with a tuple that is missing and takes, setting by setting, the value that adds most; so it does
without the product of all settings. (Cohen et al. 1997, "The AETG system".)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from random import Random

Row = dict[str, str]  # a value of each setting, by name
Part = tuple[tuple[str, str], ...]  # some settings with their values, in the order of the settings
CANDIDATES = 8  # rows that are grown from a missing tuple, of which the best is taken


def parts(factors: Mapping[str, Sequence[str]], core: Sequence[str]) -> list[Part]:
    """Every pair of values of two settings, and every triple of three of `core`."""
    names = [*combinations(factors, 2), *combinations([name for name in factors if name in core], 3)]
    return [tuple(zip(some, values, strict=True)) for some in names for values in product(*(factors[name] for name in some))]


def parts_of(row: Row, core: Sequence[str]) -> list[Part]:
    """Those that a row holds."""
    items = list(row.items())
    return [*combinations(items, 2), *combinations([item for item in items if item[0] in core], 3)]


def completed(
    start: Row, factors: Mapping[str, Sequence[str]], allows: Callable[[Row], bool], missing: dict[Part, None],
    core: Sequence[str], random: Random, costly: Row,
) -> Row | None:  # fmt: skip
    """A whole row that begins with `start`, or None if none is found.

    Args:
        allows: whether settings, perhaps not all of them yet, go together; what it refuses stays refused.
        costly: values that are taken only where no other covers as much.
    """
    row = dict(start)
    if not allows(row):
        return None
    rest = [name for name in factors if name not in row]
    random.shuffle(rest)
    for name in rest:
        values = list(factors[name])
        random.shuffle(values)
        scored = []
        for value in values:
            longer = _ordered({**row, name: value}, factors)
            if allows(longer):
                new = sum(part in missing for part in parts_of(longer, core) if (name, value) in part)
                scored.append(((new, costly.get(name) != value), longer))
        if not scored:
            return None
        row = max(scored, key=lambda item: item[0])[1]
    return row


def _ordered(row: Row, factors: Mapping[str, Sequence[str]]) -> Row:
    return {name: row[name] for name in factors if name in row}


def covering(
    factors: Mapping[str, Sequence[str]], core: Sequence[str], allows: Callable[[Row], bool], seed: int = 0,
    costly: Row | None = None,
) -> tuple[list[Row], list[Part]]:  # fmt: skip
    """The rows, and the tuples that no row can hold.

    Args:
        core: names of the settings whose triples count.
        allows, costly: see `completed`.
    """
    random = Random(seed)
    missing = dict.fromkeys(parts(factors, core))
    rows: list[Row] = []
    impossible: list[Part] = []
    while missing:
        first = random.choice(list(missing))
        grown = [completed(dict(first), factors, allows, missing, core, random, costly or {}) for _ in range(CANDIDATES)]
        found = [row for row in grown if row is not None]
        if not found:
            impossible.append(first)
            del missing[first]
            continue
        best = max(found, key=lambda row: sum(part in missing for part in parts_of(row, core)))
        rows.append(best)
        for part in parts_of(best, core):
            missing.pop(part, None)
    return rows, impossible
