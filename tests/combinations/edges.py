"""Sizes at the edges, each a row of its own, beside every strategy: too few samples, too short ones, too long ones.

Their settings are the first values of the array's, but for those named in `BESIDE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import llama
from tests.combinations.array import SETTINGS
from tests.combinations.case import LENGTH, TOKENIZER, Case, make_base, token_samples, write_texts, write_tokens
from tests.combinations.covering import Row
from tests.combinations.oracle import Sample

BESIDE: list[Row] = [
    {"method": "full", "strategy": "none", "processes": "1"},
    {"method": "lora", "strategy": "ddp", "processes": "2"},
    {"method": "full", "strategy": "fsdp", "processes": "2", "shuffle": "yes"},
    {"method": "lora", "strategy": "fsdp2", "processes": "4", "checkpointing": "selective"},
    {"method": "full, classifier", "strategy": "ddp", "processes": "4"},
    {"method": "prefix", "strategy": "hsdp", "processes": "4", "checkpointing": "full"},
]


@dataclass(frozen=True)
class Edge:
    """Data and a model at one edge.

    Attributes:
        samples: how many, of a case.
        shape: what becomes of each sample, by its place; a classifier's texts stay as they are.
        settings: that the edge is about.
    """

    samples: Callable[[Case], int]
    shape: Callable[[int, Sample], Sample] = lambda index, sample: sample
    settings: tuple[tuple[str, str], ...] = ()
    layers: int = 3


def of_length_2(index: int, sample: Sample) -> Sample:
    return sample[0][:2], sample[0][:2]


def first_learns_most(index: int, sample: Sample) -> Sample:
    """All of the first sample, which the first process has, and one token of each other."""
    ids = sample[0] * 4 if index == 0 else sample[0]
    ids = ids[:LENGTH]
    return ids, (ids if index == 0 else [-100] * (len(ids) - 1) + ids[-1:])


def beyond_the_context(index: int, sample: Sample) -> Sample:
    """Every second one is cut, in the middle of what is learned."""
    ids = sample[0] * (1 + 5 * (index % 2))
    return ids, [-100, -100, *ids[2:]]


EDGES = {
    "fewer samples than a batch": Edge(lambda case: case.global_batch - 1),
    "one sample": Edge(lambda case: 1),  # all targets are one process's, the others have none
    "fewer samples at the end than processes": Edge(lambda case: case.global_batch + max(1, case.processes - 1)),
    "a micro-batch without samples": Edge(lambda case: case.micro_batch, settings=(("grad_accum", "2"),)),
    "a process with most targets": Edge(lambda case: case.global_batch, first_learns_most),
    "samples of 2 tokens": Edge(lambda case: case.global_batch, of_length_2),
    "one layer": Edge(lambda case: case.global_batch + 1, layers=1),
    "samples beyond the context": Edge(lambda case: case.global_batch + 1, beyond_the_context),
}


@dataclass(frozen=True)
class EdgeCase(Case):
    """A row whose data is at an edge."""

    edge: str = ""

    @cached_property
    def base(self) -> Path:
        layers = EDGES[self.edge].layers
        path = self.work / f"base-{self['heads']}-{self['attention']}-{layers}"
        if not path.exists():
            make_base(path, self["heads"], self["attention"], layers)
        return path

    @cached_property
    def data(self) -> tuple[Path, list[Sample]]:
        edge = EDGES[self.edge]
        path = self.work / f"{self.name}-{self.seed}.jsonl"
        if self.classifies:
            return path, write_texts(path, max(3, edge.samples(self)), self.seed)  # of each label one at least
        samples = token_samples(edge.samples(self), False, llama.Tokenizer(TOKENIZER).vocab_size, self.seed)
        shaped = [edge.shape(index, sample) for index, sample in enumerate(samples)]
        write_tokens(path, shaped)
        return path, [(ids[:LENGTH], labels[:LENGTH]) for ids, labels in shaped]


def edge_cases(work: Path) -> list[Case]:
    """Every edge beside every one of `BESIDE`; and a run of 1,000 steps."""
    first = {name: next(iter(values)) for name, values in SETTINGS.items()}
    found: list[Case] = []
    for name, edge in EDGES.items():
        for beside in BESIDE:
            row = {**first, **beside, **dict(edge.settings)}
            found.append(EdgeCase(row, work, f"{name}, {beside['method']} {beside['strategy']}", edge=name))
    return [*found, Case({**first, "shuffle": "yes", "batch_size": "3", "grad_accum": "2"}, work, "1,000 steps", 1000)]
