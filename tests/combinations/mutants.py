"""Random changes of the step, of what is distributed and of the adapters: one operator, constant or condition each.

Drawn by a seed from all places where such a change can be made, so that nobody chooses what is easy to see.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from random import Random

from tests.combinations.faults import Fault
from tests.launch import ROOT

FILES = [
    *("fsdp_train/step.py", "fsdp_train/optim.py", "fsdp_train/parallel.py", "fsdp_train/units.py"),
    *("fsdp_train/order.py", "fsdp_train/world.py", "fsdp_train/recompute.py", "fsdp_train/partial.py"),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "peft_impl").glob("*.py"))),
]
NUMBER, SEED = 30, 14
OPERATORS = {
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*")},
    **{ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.MatMult: ("@", "*")},
    **{ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")},
    **{ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.And: ("and", "or"), ast.Or: ("or", "and")},
}
Span = tuple[int, int, str]  # of the source: from, to, and what to put there


def places(source: str) -> Iterator[Span]:
    """Every change that can be made, in the order of the source."""
    tree = ast.parse(source)
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line.encode()))
    annotations = {id(inner) for node in ast.walk(tree) for outer in _annotations(node) for inner in ast.walk(outer)}

    def start(node: ast.expr) -> int:
        return lines[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return lines[node.end_lineno - 1] + node.end_col_offset

    def between(left: ast.expr, right: ast.expr, operator: ast.AST) -> Iterator[Span]:
        old, new = OPERATORS.get(type(operator), ("", ""))
        found = source.encode()[end(left) : start(right)].decode().find(old)
        if old and found >= 0:
            yield end(left) + found, end(left) + found + len(old), new

    for node in ast.walk(tree):
        if id(node) in annotations:
            continue
        if isinstance(node, ast.BinOp):
            yield from between(node.left, node.right, node.op)
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.Compare):
            yield from between(node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.If | ast.IfExp):
            yield start(node.test), end(node.test), f"(not ({ast.unparse(node.test)}))"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield start(node), end(node), str(not node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield start(node), end(node), str(node.value + 1)


def _annotations(node: ast.AST) -> list[ast.expr]:
    found = [getattr(node, name, None) for name in ("annotation", "returns")]
    return [expression for expression in found if isinstance(expression, ast.expr)]


def mutants() -> list[Fault]:
    """`NUMBER` of them; a change of several operators, one after the other, counts as one place."""
    every = []
    for name in FILES:
        source = (ROOT / name).read_text()
        every += [(name, source, span) for span in sorted(set(places(source)))]
    chosen = Random(SEED).sample(every, NUMBER)
    return [_fault(name, source, span) for name, source, span in chosen]


def _fault(name: str, source: str, span: Span) -> Fault:
    """As a change of whole lines, with as many before and after as make it the only one of its kind."""
    start, stop, new = span
    raw = source.encode()
    changed = (raw[:start] + new.encode() + raw[stop:]).decode()
    line = raw[:start].count(b"\n") + 1
    what = f"{name}:{line}: {raw[start:stop].decode()} -> {new}"
    return Fault(what, name, source, changed)


def main() -> None:
    print("\n".join(f"{number:2} {Path(fault.file)} {fault.what}" for number, fault in enumerate(mutants())))


if __name__ == "__main__":
    main()
