"""The chunked loss against F.cross_entropy over all logits, and against Hugging Face's loss."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llama
from llama.loss import linear_cross_entropy
from tests.llama.common import tiny, token_ids
from tests.oracle import SHAPES, float64_oracle, hf_model, largest

N, C, V = 50, 16, 97
FP32_ROUNDING = 1e-6  # relative: sums of at most a few hundred fp32 terms in another order
FP64_ROUNDING = 1e-12  # the same in float64, absolute
BF16_ROUNDING = 2**-8  # relative: half an ulp, once; terms round too, but independently
CHUNKS = {"one row": 1, "7 rows": 7 * V, "not a whole row": 7 * V + V - 1, "all rows": N * V, "default": 2**24}


def chunks_of(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.loss.CHUNK_ELEMENTS", elements)
    monkeypatch.setattr("llama.loss.CHUNK_ELEMENTS_LARGE", elements)


def inputs(dtype: torch.dtype = torch.float32, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (n,), generator=generator)


def all_at_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition."""
    logits = hidden @ weight.t()
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def value_and_gradients(function: Any, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    hidden, weight, targets = inputs(dtype)
    loss = function(hidden, weight, targets)
    (loss * scale).backward()
    return [loss.detach(), hidden.grad, weight.grad]


class Recorder(TorchDispatchMode):
    """Sees every tensor that an operation makes, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("scale", [1.0, -0.37])
def test_value_and_gradients(chunk: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks_of(chunk, monkeypatch)
    for dtype, tolerance in ((torch.float32, FP32_ROUNDING), (torch.float64, FP64_ROUNDING)):
        found = value_and_gradients(linear_cross_entropy, dtype, scale)
        wanted = value_and_gradients(all_at_once, dtype, scale)
        for ours, oracle in zip(found, wanted, strict=True):
            assert ours.dtype == oracle.dtype == dtype
            size = oracle.abs().max().item() if dtype == torch.float32 else 1
            assert largest(ours, oracle) <= tolerance * size


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, which know nothing of cross-entropy."""
    chunks_of(2 * V, monkeypatch)
    hidden, weight, targets = inputs(torch.float64, n=5)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight), fast_mode=True)


def test_bf16_has_fp32_softmax_and_fp32_loss() -> None:
    """Value and d_hidden are those of bf16 autograd, bit for bit; d_weight comes back in the weight's dtype."""
    found = value_and_gradients(linear_cross_entropy, torch.bfloat16)
    wanted = value_and_gradients(all_at_once, torch.bfloat16)
    assert found[0].dtype == torch.float32
    assert largest(found[0], wanted[0]) <= FP32_ROUNDING * wanted[0].item()
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], wanted[2])
    hidden, weight, targets = inputs()
    linear_cross_entropy(hidden.detach().bfloat16(), weight, targets).backward()
    assert weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad.bfloat16(), wanted[2])


def test_bf16_chunks_add_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small contributions to d_weight: the sum is as good with a chunk per row as with one chunk."""
    hidden, weight, targets = inputs(torch.bfloat16, n=2000)
    exact = hidden.detach().double(), weight.detach().double().requires_grad_(), targets
    all_at_once(*exact).backward()
    size = exact[1].grad.abs().max().item()
    for chunk in (2**24, V):
        chunks_of(chunk, monkeypatch)
        weight.grad = None
        linear_cross_entropy(hidden, weight, targets).backward()
        assert largest(weight.grad, exact[1].grad) <= BF16_ROUNDING * size, chunk


def test_no_tensor_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, n = 16, 400
    chunks_of(rows * V, monkeypatch)
    for function, bound in ((linear_cross_entropy, max(n * C, V * C, rows * V)), (all_at_once, n * V)):
        hidden, weight, targets = inputs(n=n)
        with Recorder() as seen:
            function(hidden, weight, targets).backward()
        assert seen.largest == bound


@pytest.mark.parametrize(
    ("train_hidden", "train_weight", "grad_enabled", "products"),
    [(True, True, True, 3), (True, False, True, 2), (False, True, True, 2), (False, False, True, 1), (True, True, False, 1)],
)
def test_only_wanted_gradients_cost_anything(
    train_hidden: bool, train_weight: bool, grad_enabled: bool, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products per chunk: one for the logits, one for each gradient; a frozen head (LoRA) or no_grad saves them."""
    chunks_of(10 * V, monkeypatch)
    hidden, weight, targets = inputs()
    with torch.set_grad_enabled(grad_enabled), Recorder() as seen:
        loss = linear_cross_entropy(hidden.requires_grad_(train_hidden), weight.requires_grad_(train_weight), targets)
    assert seen.products == products * N // 10
    assert loss.requires_grad == (grad_enabled and (train_hidden or train_weight))
    assert largest(loss, all_at_once(*inputs())) <= FP32_ROUNDING * loss.item()


def test_no_targets_give_zero_loss_and_zero_gradients() -> None:
    hidden, weight, targets = inputs(n=0)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == (0, C)
    assert torch.equal(weight.grad, torch.zeros(V, C))


def test_a_model_without_targets_has_zero_gradients_and_no_nan() -> None:
    """A micro-batch whose samples are all prompt adds nothing; position 0 is never a target."""
    model, ids = tiny("gqa"), token_ids(2, 9)
    labels = torch.full_like(ids, -100)
    labels[:, 0] = 5
    loss = model(ids, labels)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


@functools.cache
def sample() -> tuple[Tensor, Tensor, int]:
    """ids, labels with holes, and the number of targets counted by hand."""
    ids = token_ids(3, 15)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[1, 4] = -100
    labels[2, 10:] = -100
    return ids, labels, 9 + 13 + 9


@pytest.mark.parametrize("shape", SHAPES)
def test_the_models_loss_is_hfs_mean_times_the_number_of_targets(shape: str, directories: dict[str, Path]) -> None:
    ids, labels, count = sample()
    ours, oracle = llama.load(directories[shape]), hf_model(directories[shape], attention="sdpa")
    loss, wanted = ours(ids, labels), oracle(ids, labels=labels).loss * count
    assert loss.dtype == torch.float32
    assert largest(loss, wanted) <= FP32_ROUNDING * wanted.item()
    loss.backward()
    wanted.backward()
    parameters = dict(oracle.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = parameters[name].grad
        assert largest(parameter.grad, expected) <= 10 * FP32_ROUNDING * expected.abs().max().item(), name  # through layers


@pytest.mark.parametrize("shape", SHAPES)
def test_the_models_loss_in_float64(shape: str, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's loss is spelled out here, since HF's casts logits to fp32. Relative, as in test_model."""
    chunks_of(4 * 97, monkeypatch)
    ids, labels, _ = sample()
    with float64_oracle():
        ours, oracle = llama.load(directories[shape], torch.float64), hf_model(directories[shape], torch.float64)
        loss = ours(ids, labels)
        logits = oracle(ids).logits
        wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)
        loss.backward()
        wanted.backward()
    assert largest(loss, wanted) <= FP64_ROUNDING * wanted.item()
    parameters = dict(oracle.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = parameters[name].grad
        assert largest(parameter.grad, expected) <= FP64_ROUNDING * expected.abs().max().item(), name


def test_labels_at_position_zero_never_count() -> None:
    ids, labels, _ = sample()
    model = tiny("gqa")
    changed = labels.clone()
    changed[:, 0] = torch.tensor([-100, 3, 96])
    assert torch.equal(model(ids, labels), model(ids, changed))
    changed[:, 1] = torch.tensor([2, 3, 96])
    assert not torch.equal(model(ids, labels), model(ids, changed))


def test_a_position_without_a_label_costs_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head multiplies the rows that have a target and no others."""
    rows = []
    original = linear_cross_entropy

    def spy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows.append(hidden.shape[0])
        return original(hidden, weight, targets)

    monkeypatch.setattr("llama.heads.linear_cross_entropy", spy)
    ids, labels, count = sample()
    tiny("gqa")(ids, labels)
    assert rows == [count]
