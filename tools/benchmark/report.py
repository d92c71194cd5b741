"""What the rows come to: a table for people, JSON for programs, a bar chart."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsdp_train.log import no_picture
from tools.benchmark.cases import Case
from tools.benchmark.row import Row

LOSS_TOLERANCE = 2e-2  # bf16, beside Hugging Face: the reference's rule for a row to count
PEER, COMPILED_PEER = "HF", "HF, compiled"


@dataclass
class Result:
    """The rows of one program in one case, one for each process that measured it; or why there are none."""

    case: Case
    program: str
    rows: list[Row]
    missing: str = ""
    noisy: bool = False  # something else ran while it was measured

    @property
    def best(self) -> float:
        """Tokens per second of the fastest round."""
        return max(row.tokens / min(row.seconds) for row in self.rows)

    @property
    def median(self) -> float:
        return statistics.median(row.tokens / second for row in self.rows for second in row.seconds)

    @property
    def peak(self) -> int:
        return max(row.peak_bytes for row in self.rows)

    @property
    def gflops(self) -> float:
        """Of useful work, in the fastest round."""
        return self.best * self.rows[0].flops / self.rows[0].tokens / 1e9


def void(result: Result, peer: Result | None) -> str:
    """Why a result does not count beside the peer's, or "". Of real documents only the first losses are compared, which are of
    the same weights: who packs them takes other steps."""
    if peer is None or not peer.rows or not result.rows or result is peer:
        return ""
    row, other = result.rows[0], peer.rows[0]
    if row.trained != other.trained:
        return f"void: {row.trained:,} parameters train, {other.trained:,} in {peer.program}"
    names = ("first",) if result.case.regime == "real" else ("first", "second")
    for name, mine, theirs in zip(names, row.losses, other.losses, strict=False):
        if not abs(mine - theirs) <= LOSS_TOLERANCE:
            return f"void: {name} loss {mine:.4f}, {theirs:.4f} in {peer.program}"
    return ""


def table(results: list[Result], limits: dict[str, float]) -> str:
    """One line per program, ratios to the peer and to the measured ceiling."""
    lines = [
        "ceilings: " + ", ".join(f"{name} {n:,.0f} G{'B' if name == 'copy' else 'FLOP'}/s" for name, n in limits.items()),
        "tokens/s count real tokens only; best and median of all rounds; ratios are of the best",
    ]  # fmt: skip
    for case in dict.fromkeys(result.case for result in results):
        of_case = {r.program: r for r in results if r.case == case}
        peer, compiled = of_case.get(PEER), of_case.get(COMPILED_PEER)
        lines += ["", case.name, f"  {'':<20} {'tokens/s':>9} {'median':>8} {'/ HF':>6} {'/ HFc':>6} {'of GEMM':>8}"
                  f" {'peak GB':>8} {'/ HF':>6} {'/ HFc':>6} {'first s':>8} {'loss':>8}"]  # fmt: skip
        for result in of_case.values():
            if not result.rows:
                lines.append(f"  {result.program:<20} {result.missing}")
                continue
            share = result.gflops / limits["gemm_bf16"]
            lines.append(
                f"  {result.program:<20} {result.best:>9,.0f} {result.median:>8,.0f} {_over(result, peer, 'best')}"
                f" {_over(result, compiled, 'best')} {share:>8.1%} {result.peak / 1e9:>8.2f} {_over(result, peer, 'peak')}"
                f" {_over(result, compiled, 'peak')} {result.rows[0].first_step:>8.1f} {result.rows[0].losses[0]:>8.4f}"
                f"{'  noisy' if result.noisy else ''}  {void(result, peer)}".rstrip()
            )
    return "\n".join(lines)


def _over(result: Result, other: Result | None, what: str) -> str:
    if other is None or not other.rows:
        return f"{'-':>6}"
    return f"{getattr(result, what) / getattr(other, what):>6.2f}"


def write_json(results: list[Result], limits: dict[str, float], machine: str, path: Path) -> None:
    """Everything, raw and summed up."""
    found: list[dict[str, Any]] = []
    for result in results:
        entry = asdict(result)
        if result.rows:
            entry |= {"best": result.best, "median": result.median, "gflops": result.gflops, "peak_bytes": result.peak}
        found.append(entry)
    path.write_text(json.dumps({"machine": machine, "ceilings": limits, "results": found}, indent=1) + "\n", encoding="utf-8")


def draw(results: list[Result], path: Path) -> None:
    """Bars of the best tokens/s, a group for each case."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        no_picture(path.name)
        return
    cases = list(dict.fromkeys(result.case for result in results))
    programs = [p for p in dict.fromkeys(r.program for r in results) if any(r.rows for r in results if r.program == p)]
    figure, axes = pyplot.subplots(figsize=(1.4 * len(cases) + 2, 4.5), layout="constrained")
    width = 0.8 / max(1, len(programs))
    for index, program in enumerate(programs):
        own = [(cases.index(r.case), r.best) for r in results if r.program == program and r.rows]
        positions = [x + (index - (len(programs) - 1) / 2) * width for x, _ in own]
        bars = axes.bar(positions, [y for _, y in own], width, label=program)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(cases)), [case.name.replace(", ", "\n") for case in cases], fontsize=8)
    axes.set_ylabel("useful tokens/s, best round")
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
