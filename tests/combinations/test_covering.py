"""The array holds what it says, and nothing that is refused."""

from __future__ import annotations

from itertools import combinations, product

from tests.combinations.covering import Row, covering

FACTORS = {"a": "12", "b": "123", "c": "1234", "d": "12", "e": "123"}
CORE = ("a", "b", "c")


def allows(row: Row) -> bool:
    """b 3 goes with no a 1, and c 4 only with d 2."""
    return not ((row.get("a"), row.get("b")) == ("1", "3") or (row.get("c"), row.get("d")) == ("4", "1"))


def test_every_pair_and_core_triple_that_is_allowed_stands_in_a_row() -> None:
    rows, impossible = covering(FACTORS, CORE, allows)
    assert all(list(row) == list(FACTORS) and allows(row) for row in rows)
    found = {part for row in rows for size in (2, 3) for part in combinations(row.items(), size)}
    whole = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())]
    possible = {part for row in whole if allows(row) for size in (2, 3) for part in combinations(row.items(), size)}
    wanted = {part for part in possible if len(part) == 2 or all(name in CORE for name, _ in part)}
    assert wanted <= found
    assert not wanted & set(impossible)
    assert len(rows) < 40  # of 144; a triple of a, b, c alone takes 20


def test_the_same_seed_gives_the_same_rows() -> None:
    assert covering(FACTORS, CORE, allows, seed=3) == covering(FACTORS, CORE, allows, seed=3)
    assert covering(FACTORS, CORE, allows, seed=3) != covering(FACTORS, CORE, allows, seed=4)
