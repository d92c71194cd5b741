"""One backbone, many adapters: rows of one batch through adapters of every kind equal the models with one adapter each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llama import KVCache, Llama, generate
from llama.errors import InputError
from llama.model import DecoderLayer
from peft_impl import LlamaAdapterConfig, LoraConfig, PrefixTuningConfig, add_adapter, merge, remove_adapter, set_adapter
from peft_impl.adapters import adapters_of
from tests.oracle import largest
from tests.peft_impl.common import assert_same, perturb, snapshot, tiny

RESIDENT: dict[str, Any] = {
    "lora_a": LoraConfig(r=3, lora_alpha=7, target_modules="all-linear"),
    "lora_b": LoraConfig(r=2, use_dora=True, modules_to_save=("lm_head", "embed_tokens")),
    "prompts": LlamaAdapterConfig(adapter_len=4, adapter_layers=2),
    "heads": LlamaAdapterConfig(3, 3, "head", "tanh"),
    "short": PrefixTuningConfig(num_virtual_tokens=2),
    "long": PrefixTuningConfig(num_virtual_tokens=7),
    "mlp": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16),
}
ROWS = [*RESIDENT, None]
IDS = torch.randint(97, (len(ROWS), 9), generator=torch.Generator().manual_seed(4))
# A row with a prefix attends through a dense mask in a mixed batch and causally by itself; the others' sums gain exact zeros.
FLOAT64 = 1e-13
FLOAT32 = 1e-5


def with_all(shape: str = "gqa", dtype: torch.dtype = torch.float64) -> Llama:
    model = tiny(shape, dtype)
    for name, config in RESIDENT.items():
        add_adapter(model, config, name)
    perturb(model)
    return model


def alone(model: Llama, name: str | None, shape: str, dtype: torch.dtype = torch.float64) -> Llama:
    """The adapter `name` of a model with several, by itself on a fresh base."""
    single = tiny(shape, dtype)
    if name is not None:
        add_adapter(single, RESIDENT[name], name)
    own = snapshot(model)
    with torch.no_grad():
        for key, parameter in single.named_parameters():
            parameter.copy_(own[key])
    return single


@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa", "tied"])
def test_a_mixed_batch_equals_the_separate_models(shape: str) -> None:
    model = with_all(shape)
    set_adapter(model, ROWS)
    mixed = model(IDS)
    for row, name in enumerate(ROWS):
        whole = alone(model, name, shape)(IDS)[row]
        assert largest(mixed[row], whole) <= FLOAT64, name
    assert len({round(mixed[row].sum().item(), 6) for row in range(len(ROWS))}) == len(ROWS)


def test_without_prefixes_a_mixed_batch_is_equal_to_the_bit() -> None:
    """Everything is then computed as in the separate models, in the same order; rows are only chosen."""
    model = with_all()
    for name in ("short", "long", "mlp"):
        remove_adapter(model, name)
    rows = ["lora_a", None, "prompts", "lora_b", "heads", None, "lora_a", "lora_b"]
    set_adapter(model, rows)
    mixed = model(IDS)
    for row, name in enumerate(rows):
        assert torch.equal(mixed[row], alone(model, name, "gqa")(IDS)[row]), name


@pytest.mark.parametrize("order", [ROWS, ROWS[::-1], ["long"] * 4 + ["lora_b"] * 4, [None] * 8])
def test_generation_of_a_mixed_batch(order: list[str | None]) -> None:
    """Prompts and prefixes of different lengths, with the cache and without."""
    model = with_all()
    prompts = [IDS[row, : 2 + row].tolist() for row in range(len(order))]
    set_adapter(model, order)
    cached = generate(model, prompts, 10)
    assert cached == generate(model, prompts, 10, use_cache=False)
    for row, name in enumerate(order):
        set_adapter(model, name)
        assert generate(model, [prompts[row]], 10)[0] == cached[row], name


def test_cached_logits_of_a_mixed_batch() -> None:
    model = with_all()
    set_adapter(model, ROWS)
    whole = model(IDS)
    cache = KVCache(model.config.num_hidden_layers, IDS.shape[1])
    parts = [model(IDS[:, :4], cache=cache), *(model(IDS[:, i : i + 1], cache=cache) for i in range(4, IDS.shape[1]))]
    assert largest(torch.cat(parts, dim=1), whole) <= FLOAT64


def losses_and_gradients(model: Llama, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss = model(IDS, labels)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), grads


def test_training_a_mixed_batch_gives_each_adapter_its_own_rows_gradient() -> None:
    model = with_all()
    set_adapter(model, ROWS)
    loss, grads = losses_and_gradients(model, IDS)
    total = 0.0
    for row, name in enumerate(ROWS):
        single = alone(model, name, "gqa")
        only = torch.full_like(IDS, -100)
        only[row] = IDS[row]
        part = single(IDS, only)
        total += part.item()
        if name is None:
            continue
        part.backward()
        for key, parameter in single.named_parameters():
            if parameter.grad is not None:
                assert largest(grads[key], parameter.grad) <= 1e-10 * max(1, parameter.grad.abs().max().item()), key
    assert abs(loss - total) <= 1e-9 * total


def test_recomputation_reads_the_choice_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With activation checkpointing every gradient is the same, bit for bit."""
    model = with_all(dtype=torch.float32)
    set_adapter(model, ROWS)
    plain = losses_and_gradients(model, IDS)
    forward: Callable[..., Tensor] = DecoderLayer.forward
    monkeypatch.setattr(DecoderLayer, "forward", lambda self, *args: checkpoint(forward, self, *args, use_reentrant=False))
    again = losses_and_gradients(model, IDS)
    assert again[0] == plain[0]
    assert_same(again[1], plain[1])


def test_an_adapter_without_rows_takes_part() -> None:
    """No data-dependent skipping: its gradient is there, and zero."""
    model = with_all()
    set_adapter(model, ["lora_a"] * 8)
    model(IDS, IDS).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == (".lora_a." in name), name


def test_a_broken_adapter_spoils_no_other_row() -> None:
    model = with_all()
    set_adapter(model, ROWS)
    before = model(IDS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_a." in name:
                parameter.fill_(torch.nan)
    after = model(IDS)
    assert after[0].isnan().any()
    assert torch.equal(after[1:], before[1:])


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_switching_costs_nothing_and_removal_restores_the_base(shape: str) -> None:
    model = tiny(shape)
    types, before, logits = {p: type(m) for p, m in model.named_modules()}, snapshot(model), model(IDS)
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    storage = {name: p.data_ptr() for name, p in model.named_parameters()}
    for name, config in RESIDENT.items():
        add_adapter(model, config, name)
    perturb(model)
    for choice in (ROWS, "long", None, "mlp", ROWS[::-1]):
        set_adapter(model, choice)
        model(IDS)
        assert {n: p.data_ptr() for n, p in model.named_parameters() if n in storage} == storage
    set_adapter(model, None)
    assert torch.equal(model(IDS), logits)
    for name in ("mlp", "heads", "lora_b", "short", "lora_a", "long", "prompts"):
        remove_adapter(model, name)
    assert {p: type(m) for p, m in model.named_modules()} == types
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert_same(snapshot(model), before)
    assert torch.equal(model(IDS), logits)


def test_wrong_choices_are_refused() -> None:
    model = with_all()
    with pytest.raises(InputError, match=r"no adapter 'lng'; it has .* - did you mean 'long'"):
        set_adapter(model, ["long", "lng"])
    set_adapter(model, ["long", None])
    with pytest.raises(InputError, match="set_adapter chose for 2 rows, but the batch has 8"):
        model(IDS)
    remove_adapter(model, "long")  # it was in use: every row goes through the base
    assert adapters_of(model).active is None
    merge(model, "lora_a")
    with pytest.raises(InputError, match="'lora_a' is merged"):
        set_adapter(model, ["short", None])
    with pytest.raises(InputError, match="is no LoRA"):
        merge(with_all(), "short")


def test_a_new_choice_replaces_the_old_one() -> None:
    model = with_all()
    set_adapter(model, ROWS)
    model(IDS)
    set_adapter(model, ROWS[::-1])
    again, fresh = model(IDS), with_all()
    set_adapter(fresh, ROWS[::-1])
    assert torch.equal(again, fresh(IDS))
