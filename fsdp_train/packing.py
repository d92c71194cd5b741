"""Several documents in one row, none of which sees another: no padding to speak of, and rows of one width.

Which documents share a row is a function of their lengths alone, so it is the same in every run, epoch and process; the order
of rows is shuffled as that of samples is. Each document has positions from 0 and attends to itself (`llama.attention`), so a
row computes what its documents would compute alone.

Sources: best-fit decreasing, Johnson 1973; for language models, Ding et al. 2024 (arXiv 2404.10830).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fsdp_train.data import Batch, Dataset, on_device
from llama.attention import Documents
from llama.heads import learned_positions
from llama.loss import IGNORE


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of documents by row: the longest first, each into the fullest row that has room, or a new one.

    At most 11/9 of the least number of rows, plus one (Johnson 1973); with documents of text, within 1 % of it.
    """
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # rows by the room that is left
    rooms = 0  # bit r is set where a row has room r
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the least that is enough
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


@dataclass
class PackedDataset(Dataset):
    """A dataset whose batches consist of rows of documents. `samples` are still the documents.

    Attributes:
        rows: indices of documents; a `batch` is asked for by indices of rows.
        width: tokens of the longest row, to which all are padded: batches of one shape.
    """

    rows: list[list[int]] = field(default_factory=list)
    width: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def packing_report(self) -> str:
        """For people."""
        tokens = sum(len(s.ids) for s in self.samples)
        share = tokens / (len(self.rows) * self.width)
        return f"  packed into {len(self.rows):,} rows of {self.width:,} tokens, {share:.1%} of them used"

    def lengths(self) -> list[int]:
        return [self.width] * len(self.rows)

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """The rows of these indices. Nothing predicts a document's first token."""
        rows = [[self.samples[i] for i in self.rows[index]] for index in indices]
        ids = np.zeros((max(1, len(rows)), self.width), dtype=np.int64)
        labels = np.full_like(ids, IGNORE)
        for row, documents in enumerate(rows):
            start = 0
            for document in documents:
                end = start + len(document.ids)
                ids[row, start:end] = document.ids
                labels[row, start + 1 : end] = document.labels[1:]
                start = end
        lengths = [[len(d.ids) for d in documents] for documents in rows] or [[self.width]]
        where, learned = Documents.of(lengths, self.width), learned_positions(torch.from_numpy(labels))
        return Batch(
            {
                "input_ids": on_device(torch.from_numpy(ids), device),
                "documents": Documents(on_device(where.positions, device), on_device(where.bounds, device)),
                "learned": on_device(learned, device),
            },
            on_device(torch.from_numpy(labels), device),
            sum(len(d.ids) for documents in rows for d in documents),
            len(learned),
            [d.where for documents in rows for d in documents],
        )


def packed(data: Dataset, capacity: int) -> PackedDataset:
    """The same documents in rows of at most `capacity` tokens, none of them cut.

    Raises:
        ValueError: a document is longer than a row.
    """
    lengths = [len(sample.ids) for sample in data.samples]
    if max(lengths) > capacity:
        raise ValueError(f"a document of {max(lengths)} tokens in rows of {capacity}")
    rows = best_fit(lengths, capacity)
    width = max(sum(lengths[i] for i in row) for row in rows)
    return PackedDataset(**vars(data), rows=rows, width=width)
