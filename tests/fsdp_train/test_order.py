"""The order of a run, who sees what when, and batches: nothing twice, nothing lost, the same however the work is split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import llama
from fsdp_train.data import Sample, collate, load_dataset
from fsdp_train.order import BLOCK, Plan, by_length, epoch_order
from llama.errors import InputError
from tests.fsdp_train.conftest import CONTEXT, VOCAB, alpaca_records
from tests.oracle import SHAPES, randomise


@pytest.mark.parametrize("count", [1, 4, 19])
def test_held_out_samples_are_disjoint_and_repeatable(count: int, tokenizer_dir: Path, alpaca_file: Path) -> None:
    data = load_dataset(str(alpaca_file), "auto", llama.Tokenizer(tokenizer_dir), VOCAB, CONTEXT)
    everything = [s.where for s in data.samples]
    assert len(everything) == len(alpaca_records()) == 20
    rest, held = ([s.where for s in part.samples] for part in data.without(count, seed=3))
    assert len(held) == count
    assert not set(rest) & set(held)
    assert [where for where in everything if where in {*rest, *held}] == everything
    assert rest == [where for where in everything if where in rest]  # in the file's order
    assert held == [where for where in everything if where in held]
    assert [[s.where for s in part.samples] for part in data.without(count, seed=3)] == [rest, held]
    assert any([s.where for s in data.without(count, seed)[1].samples] != held for seed in range(5))
    assert [s.where for s in data.samples] == everything  # the dataset itself is as it was


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_each_epoch_is_a_permutation(n: int) -> None:
    for seed, epoch in [(0, 0), (0, 1), (5, 0), (2**63, 3)]:
        order = epoch_order(n, seed, epoch, shuffle=True)
        assert sorted(order.tolist()) == list(range(n))
        assert torch.equal(order, epoch_order(n, seed, epoch, shuffle=True))
        assert epoch_order(n, seed, epoch, shuffle=False).tolist() == list(range(n))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(50, seed, epoch, True).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert tuple(range(50)) not in orders


def test_the_order_is_a_function_of_its_arguments_only() -> None:
    """Not of torch's own random state, which it leaves alone; and a resumed run of another version has the same order."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert epoch_order(10, 0, 0, True).tolist() == [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]
    assert epoch_order(10, 7, 3, True).tolist() == [2, 6, 9, 5, 4, 3, 1, 0, 8, 7]
    assert torch.equal(torch.get_rng_state(), state)


SPLITS = [(world, batch, 8 // world // batch) for world in (1, 2, 4) for batch in (1, 2, 4, 8) if world * batch <= 8]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 29])
def test_a_step_has_the_same_samples_however_it_is_split(n: int, shuffle: bool) -> None:
    """Global step g trains on samples [8g, 8g + 8) of the epoch's order, over any processes and micro-batches."""
    per_epoch = -(-n // 8)
    for world, batch, accum in SPLITS:
        plans = [Plan(n, batch, accum, world, rank, 5, shuffle) for rank in range(world)]
        assert {plan.global_batch for plan in plans} == {8}
        assert {plan.steps_per_epoch for plan in plans} == {per_epoch}
        for step in range(3 * per_epoch):
            epoch, within = divmod(step, per_epoch)
            expected = epoch_order(n, 5, epoch, shuffle).tolist()[8 * within : 8 * within + 8]
            micro = [plan.micro_batches(step) for plan in plans]
            assert all(len(batches) == accum for batches in micro)  # every process makes as many calls
            assert all(len(indices) <= batch for batches in micro for indices in batches)
            seen = [i for batches in micro for indices in batches for i in indices]
            assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("n", [1, 7, 8, 29])
def test_each_epoch_has_every_sample_once(n: int) -> None:
    for world, batch, accum in SPLITS:
        for epoch in range(3):
            steps = range(epoch * -(-n // 8), (epoch + 1) * -(-n // 8))
            plans = [Plan(n, batch, accum, world, rank, 5, True) for rank in range(world)]
            seen = [i for step in steps for plan in plans for indices in plan.micro_batches(step) for i in indices]
            assert sorted(seen) == list(range(n))


# --- like lengths together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 63, 64, 200, 5000])
def test_an_order_by_length_is_an_order(n: int) -> None:
    """Every sample once, another order in each epoch, and a function of its arguments."""
    lengths = [1 + (i * 7919) % 97 for i in range(n)]
    for epoch in range(3):
        order = by_length(lengths, 5, epoch).tolist()
        assert sorted(order) == list(range(n))
        assert order == by_length(lengths, 5, epoch).tolist()
        rest = epoch_order(n, 5, epoch, True).tolist()[n // BLOCK * BLOCK :]
        assert order[n // BLOCK * BLOCK :] == rest
    if n > BLOCK:
        orders = {tuple(by_length(lengths, seed, epoch).tolist()) for seed in (5, 6) for epoch in (0, 1)}
        assert len(orders) == 4


def test_an_order_by_length_does_not_know_the_batch() -> None:
    """Steps of any size are cut from one and the same order."""
    lengths = [1 + (i * 7919) % 97 for i in range(200)]
    for epoch in range(2):
        order = by_length(lengths, 5, epoch).tolist()
        for world, batch, accum in ((1, 1, 1), (1, 3, 2), (2, 4, 2), (4, 8, 1), (2, 100, 1)):
            plans = [Plan(200, batch, accum, world, rank, 5, True, lengths) for rank in range(world)]
            size, per_epoch = plans[0].global_batch, plans[0].steps_per_epoch
            for within in range(per_epoch):
                step = epoch * per_epoch + within
                seen = [i for plan in plans for one in plan.micro_batches(step) for i in one]
                assert sorted(seen) == sorted(order[within * size : (within + 1) * size])


def test_an_order_by_length_pads_little() -> None:
    lengths = [int(x) for x in np.random.default_rng(0).integers(10, 500, 4096)]

    def padded(order: torch.Tensor, rows: int) -> float:
        batches = [[lengths[i] for i in order[start : start + rows].tolist()] for start in range(0, 4096, rows)]
        return sum(len(batch) * max(batch) for batch in batches) / sum(lengths)

    for rows in (4, 8, 32, 64):
        assert padded(epoch_order(4096, 0, 0, True), rows) > 1.5
        assert padded(by_length(lengths, 0, 0), rows) < 1.03
    plan = Plan(4096, 8, 1, 1, 0, 0, False, lengths)
    assert plan.micro_batches(1) == [list(range(8, 16))]  # as in the file means as in the file


# --- another batch on the way -------------------------------------------------------------------


CHANGES = [  # samples, (world, batch, accum) before and after, steps done before
    (32, (1, 4, 1), (1, 8, 1), 4),
    (32, (1, 8, 1), (1, 4, 1), 2),
    (30, (1, 4, 1), (1, 8, 1), 6),
    (30, (2, 2, 1), (1, 3, 2), 3),
    (30, (1, 4, 1), (1, 7, 1), 8),  # at the end of an epoch any batch fits
    (30, (1, 4, 2), (4, 1, 1), 9),
    (100, (2, 4, 1), (4, 4, 2), 17),
]


@pytest.mark.parametrize("by_lengths", [False, True], ids=["shuffled", "by length"])
@pytest.mark.parametrize(("n", "before", "after", "done"), CHANGES)
def test_another_batch_still_sees_every_sample_of_an_epoch_once(
    n: int, before: tuple[int, int, int], after: tuple[int, int, int], done: int, by_lengths: bool
) -> None:
    """Counted over all processes, from before the change to the end of the next epoch."""
    lengths = [1 + (i * 7919) % 97 for i in range(n)] if by_lengths else None

    def plans(split: tuple[int, int, int]) -> list[Plan]:
        world, batch, accum = split
        return [Plan(n, batch, accum, world, rank, 5, True, lengths) for rank in range(world)]

    def seen(of: list[Plan], step: int) -> list[int]:
        return [i for plan in of for micro in plan.micro_batches(step) for i in micro]

    old = plans(before)
    consumed = [i for step in range(done) for i in seen(old, step)]
    position = old[0].position(done)
    assert position.epoch * n + position.samples == len(consumed)
    new = [plan.starting_at(position, done) for plan in plans(after)]
    assert {plan.position(done) for plan in new} == {position}
    step = done
    while len(consumed) < (position.epoch + 2) * n:
        consumed += seen(new, step)
        step += 1
    assert len(consumed) == (position.epoch + 2) * n
    for epoch in range(position.epoch + 2):
        assert sorted(consumed[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_batch_that_does_not_fit_is_refused_with_those_that_do() -> None:
    position = Plan(32, 4, 1, 1, 0, 5, True).position(3)
    with pytest.raises(InputError) as refused:
        Plan(32, 4, 1, 2, 0, 5, True).starting_at(position, 3)
    message = str(refused.value)
    assert "12 samples of epoch 1 are consumed, which is no whole number of batches of 8" in message
    assert "with 2 processes and --train.grad_accum 1, --train.batch_size 1, 2, 3, 6 fits" in message
    odd = Plan(32, 3, 1, 1, 0, 5, True).position(1)
    with pytest.raises(InputError, match=r"no --train\.batch_size fits"):
        Plan(32, 1, 2, 1, 0, 5, True).starting_at(odd, 1)


# --- batches ------------------------------------------------------------------------------------------------------------


def sample(ids: list[int], labels: list[int]) -> Sample:
    return Sample(str(ids), np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), 1)


def test_a_batch_is_padded_on_the_right() -> None:
    """The labels of real ids stay, whatever their id: 0, which pads, and EOS, which others pad with."""
    batch = collate([sample([1, 0, 5, 0, 2], [-100, -100, 5, 0, 2]), sample([1, 2], [-100, 2])], torch.device("cpu"))
    assert batch.inputs["input_ids"].tolist() == [[1, 0, 5, 0, 2], [1, 2, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, 5, 0, 2], [-100, 2, -100, -100, -100]]
    assert batch.inputs["input_ids"].dtype == batch.labels.dtype == torch.int64
    assert (batch.tokens, batch.targets) == (7, 4)
    assert batch.where == ["[1, 0, 5, 0, 2]", "[1, 2]"]


def test_the_first_label_is_no_target() -> None:
    """Nothing predicts the first token."""
    assert collate([sample([1, 5], [1, 5]), sample([1], [1])], torch.device("cpu")).targets == 1


def test_an_empty_batch_is_one_masked_row() -> None:
    batch = collate([], torch.device("cpu"))
    assert batch.inputs["input_ids"].shape == batch.labels.shape == (1, 2)
    assert (batch.labels == -100).all()
    assert (batch.tokens, batch.targets, batch.where) == (0, 0, [])
    model = llama.Llama(SHAPES["gqa"])
    randomise(model)
    assert model(batch.inputs["input_ids"], batch.labels).item() == 0.0


@pytest.mark.parametrize("pad", [1, 2, 96])
def test_the_loss_does_not_depend_on_the_pad(pad: int) -> None:
    """Which is why Llama 2 needs no pad token: no real token sees one, and none has a label."""
    model = llama.Llama(SHAPES["gqa"])
    randomise(model)
    samples = [sample(list(range(3, 20)), list(range(3, 20))), sample([5, 6, 2], [-100, 6, 2])]
    batch = collate(samples, torch.device("cpu"))
    other = batch.inputs["input_ids"].clone()
    other[1, 3:] = pad
    with torch.no_grad():
        assert torch.equal(model(batch.inputs["input_ids"], batch.labels), model(other, batch.labels))
        assert torch.equal(model(batch.inputs["input_ids"])[1, :3], model(other)[1, :3])
        other[1, 1] = 7  # a real one does matter
        assert not torch.equal(model(batch.inputs["input_ids"], batch.labels), model(other, batch.labels))
