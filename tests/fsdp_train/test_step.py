"""A step waits for nothing, and a step that would spoil the weights changes none, whoever notices when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_train.build import wrap_model
from fsdp_train.data import collate
from fsdp_train.host import undisturbed
from fsdp_train.optim import OptimConfig
from fsdp_train.step import NonFiniteError, begin_step
from fsdp_train.strategy import ParallelConfig
from fsdp_train.world import World
from tests.fsdp_train.common import build, samples

WORLD = World(0, 1, 0, 1, torch.device("cpu"))


class Waits(TorchDispatchMode):
    """Operations for which a host would wait for a GPU: numbers that are read, and results whose size depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "aten.equal.")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        read = torch.Tensor.tolist  # is not dispatched
        monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: [self.seen.append("tolist"), read(tensor)][1])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in self.FORBIDDEN):
            self.seen.append(str(function))
        if "aten.index." in str(function) and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen.append("index by mask")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["full", "lora", "prefix"])
def test_nothing_in_a_step_waits_for_the_device(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = wrap_model(build(method), ParallelConfig(precision="fp32"), OptimConfig(), WORLD)
    batches = [collate(samples(3), WORLD.device)]
    begin_step(model, optimizer, batches, WORLD, 1.0, 0)
    with Waits(monkeypatch) as waits:
        pending = begin_step(model, optimizer, batches, WORLD, 1.0, 1)
    assert waits.seen == []
    with waits:
        pending.result()
    assert waits.seen == ["tolist"]  # this is what waiting looks like


def test_a_spoilt_step_and_all_after_it_change_nothing() -> None:
    model, optimizer = wrap_model(build("lora"), ParallelConfig(precision="fp32"), OptimConfig(lr=0.1), WORLD)
    batches = [collate(samples(3), WORLD.device)]

    def state() -> list[torch.Tensor]:
        moments = [v for s in optimizer.state.values() for v in s.values()]
        return [t.detach().clone() for t in (*model.parameters(), *moments)]

    begin_step(model, optimizer, batches, WORLD, 1.0, 0).result()
    before = state()
    hook = model.model.norm.register_forward_hook(lambda module, args, output: output * float("inf"))
    spoilt = begin_step(model, optimizer, batches, WORLD, 1.0, 1)
    hook.remove()
    begin_step(model, optimizer, batches, WORLD, 1.0, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is nan, from the samples of rank 0: 0, 1, 2"):
        spoilt.result()
    begin_step(model, optimizer, batches, WORLD, 1.0, 1).result()
    assert not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_the_collector_rests_and_wakes_again() -> None:
    import gc

    with undisturbed(WORLD.device):
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError), undisturbed(WORLD.device):  # noqa: PT011
        raise ValueError
    assert gc.isenabled()
