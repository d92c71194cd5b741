"""Which samples each process sees in each step: a pure function of (seed, epoch, index), whatever the world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=2)  # each step asks for its epoch's order: 0.3 s for ten million samples
def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """Sample indices (n,) in the order of an epoch: a pure function of its arguments. Not to be changed in place."""
    if not shuffle:
        return torch.arange(n)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator)


WINDOW = 64  # steps among which samples are exchanged


def by_length(lengths: Sequence[int], seed: int, epoch: int, global_batch: int) -> Tensor:
    """The epoch's order, in which the samples of a step are of like length, so that little is padded.

    In each window of 64 steps samples are sorted by length and cut into steps, which are then shuffled. Within a step the
    longest come first: its micro-batches are of like length too. A last step that is not full keeps what the order left.
    """
    order = epoch_order(len(lengths), seed, epoch, shuffle=True)
    sizes = torch.tensor(lengths)
    full = len(lengths) // global_batch * global_batch
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**63)
    windows = []
    for window in order[:full].split(WINDOW * global_batch):
        steps = window[sizes[window].argsort(descending=True, stable=True)].view(-1, global_batch)
        windows.append(steps[torch.randperm(len(steps), generator=generator)].flatten())
    return torch.cat((*windows, order[full:]))


@dataclass(frozen=True)
class Plan:
    """Which samples each process sees in each step.

    Step g of an epoch trains on samples [gG, (g+1)G) of its order, G = world * batch_size * grad_accum, whatever the world
    size; the last step of an epoch has what is left, so that every sample is seen exactly once per epoch.

    Attributes:
        lengths: tokens of each sample; where given, a shuffled order brings samples of like length together (`by_length`).
    """

    samples: int
    batch_size: int
    grad_accum: int
    world: int
    rank: int
    seed: int
    shuffle: bool
    lengths: Sequence[int] | None = field(default=None, compare=False)
    _orders: dict[int, Tensor] = field(default_factory=dict, compare=False)

    @property
    def global_batch(self) -> int:
        return self.world * self.batch_size * self.grad_accum

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch)

    def micro_batches(self, step: int) -> list[list[int]]:
        """This process's sample indices in global step `step`, one list per micro-batch; some may be empty at the end."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch
        indices = self._order(epoch)[start : start + self.global_batch].tolist()
        size = self.world * self.batch_size
        first = self.rank * self.batch_size
        return [indices[m * size : (m + 1) * size][first : first + self.batch_size] for m in range(self.grad_accum)]

    def _order(self, epoch: int) -> Tensor:
        if self.lengths is None or not self.shuffle:
            return epoch_order(self.samples, self.seed, epoch, self.shuffle)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = by_length(self.lengths, self.seed, epoch, self.global_batch)
        return self._orders[epoch]
