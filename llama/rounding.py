"""What is lost where weights are kept in a dtype that cannot hold them: of an update, and how many elements of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Rounding:
    """Sums over tensors, which are added one by one.

    Attributes:
        max_error: largest |kept - exact| over all elements.
        changed: elements that differ from the base's before rounding.
        undone: how many of those are the base's again after it.
    """

    max_error: float = 0.0
    changed: int = 0
    undone: int = 0
    _lost: float = field(default=0.0, repr=False)  # squares
    _wanted: float = field(default=0.0, repr=False)

    def add(self, exact: Tensor, kept: Tensor, base: Tensor | None) -> None:
        """Count one tensor, exact and as it is kept; `base` is what the update started from, None for a new tensor."""
        error = kept.to(exact.dtype) - exact
        self.max_error = max(self.max_error, error.abs().max().item())
        if base is None:
            return
        start = base.to(exact.dtype)
        update = exact - start
        self._lost += error.double().pow(2).sum().item()
        self._wanted += update.double().pow(2).sum().item()
        changed = update != 0
        self.changed += int(changed.sum())
        self.undone += int((changed & (kept.to(exact.dtype) == start)).sum())

    @property
    def relative_error(self) -> float:
        """||kept - exact|| / ||exact - base|| over all tensors that have a base: the part of the update that is lost."""
        return (self._lost / self._wanted) ** 0.5 if self._wanted else 0.0

    @property
    def is_large(self) -> bool:
        """Whether more than a hundredth of the update is lost."""
        return self.relative_error > 0.01

    def __str__(self) -> str:
        share = f", {100 * self.relative_error:.3g} % of the update lost to rounding"
        return f"largest rounding error {self.max_error:.3g}" + share * (self._wanted > 0)
