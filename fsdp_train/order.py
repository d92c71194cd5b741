"""Which samples each process sees in each step: a pure function of (seed, epoch, index), whatever the world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from llama.errors import InputError, listing


@lru_cache(maxsize=2)  # each step asks for its epoch's order: 0.3 s for ten million samples
def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """Sample indices (n,) in the order of an epoch: a pure function of its arguments. Not to be changed in place."""
    if not shuffle:
        return torch.arange(n)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(n, generator=generator)


WINDOW = 4096  # samples among which those of like length are brought together
BLOCK = 64  # samples of like length that stay together


def by_length(lengths: Sequence[int], seed: int, epoch: int) -> Tensor:
    """The epoch's order in which samples of like length stand together, so that little is padded.

    In each window of 4096 samples they are sorted by length and cut into blocks of 64; the blocks of
    a window, and the samples of a block, are then shuffled. What does not fill a block keeps its
    place at the end. The order knows nothing of batches: a run that goes on with another batch size
    still sees every sample of the epoch once.

    Args:
        lengths: tokens of each sample.

    Returns:
        Sample indices (n,).
    """
    order = epoch_order(len(lengths), seed, epoch, shuffle=True)
    full = len(lengths) // BLOCK * BLOCK
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + 1) % 2**63)
    sizes = torch.tensor(lengths)
    shuffled = [order[:0]]
    for window in order[:full].split(WINDOW):
        blocks = window[sizes[window].argsort(stable=True)].view(-1, BLOCK)
        blocks = blocks[torch.randperm(len(blocks), generator=generator)]
        within = torch.rand(blocks.shape, generator=generator).argsort(dim=1)
        shuffled.append(blocks.gather(1, within).flatten())
    return torch.cat((*shuffled, order[full:]))


@dataclass(frozen=True)
class Position:
    """How far a run has come through its data.

    Attributes:
        epoch: passes over the data that are complete.
        samples: consumed of the pass under way.
    """

    epoch: int
    samples: int


@dataclass(frozen=True)
class Plan:
    """Which samples each process sees in each step.

    Step g of an epoch trains on samples [gG, (g+1)G) of its order, G = world * batch_size *
    grad_accum, whatever the world size; the last step of an epoch has what is left, so that every
    sample is seen exactly once per epoch.

    Attributes:
        lengths: tokens of each sample; where given, a shuffled order brings samples of like length
            together (`by_length`).
        offset: what a step's number must be raised by to find its place in the data. Not zero after
            a run has gone on with another batch: its steps before were of another size.
    """

    samples: int
    batch_size: int
    grad_accum: int
    world: int
    rank: int
    seed: int
    shuffle: bool
    lengths: Sequence[int] | None = field(default=None, compare=False)
    offset: int = 0
    _orders: dict[int, Tensor] = field(default_factory=dict, compare=False)

    @property
    def global_batch(self) -> int:
        return self.world * self.batch_size * self.grad_accum

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch)

    def micro_batches(self, step: int) -> list[list[int]]:
        """This process's sample indices in global step `step`, one list per micro-batch; some may
        be empty at the end of an epoch."""
        position = self.position(step)
        order = self._order(position.epoch)
        indices = order[position.samples : position.samples + self.global_batch].tolist()
        size = self.world * self.batch_size
        first = self.rank * self.batch_size
        micro_batches = []
        for start in range(0, size * self.grad_accum, size):
            whole = indices[start : start + size]
            micro_batches.append(whole[first : first + self.batch_size])
        return micro_batches

    def position(self, step: int) -> Position:
        """Where in the data step `step` begins, which is what the steps before it have consumed."""
        epoch, within = divmod(step + self.offset, self.steps_per_epoch)
        return Position(epoch, within * self.global_batch)

    def starting_at(self, position: Position, step: int) -> Plan:
        """This plan with its step `step` at `position`.

        Raises:
            InputError: what is left of the epoch does not begin at a whole number of batches.
        """
        if position.samples % self.global_batch:
            fitting = [
                size
                for size in range(1, position.samples // (self.world * self.grad_accum) + 1)
                if position.samples % (size * self.world * self.grad_accum) == 0
            ]
            sizes = f"--train.batch_size {listing(map(str, fitting), 12)} fits" if fitting else "no --train.batch_size fits"
            raise InputError(
                f"{position.samples:,} samples of epoch {position.epoch + 1} are consumed, which is no"
                f" whole number of batches of {self.global_batch}; with {self.world} processes and"
                f" --train.grad_accum {self.grad_accum}, {sizes}"
            )
        within = position.samples // self.global_batch
        return replace(self, offset=position.epoch * self.steps_per_epoch + within - step)

    def _order(self, epoch: int) -> Tensor:
        if self.lengths is None or not self.shuffle:
            return epoch_order(self.samples, self.seed, epoch, self.shuffle)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = by_length(self.lengths, self.seed, epoch)
        return self._orders[epoch]
