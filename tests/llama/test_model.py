"""The forward pass and its gradients against Hugging Face's, bit for bit where the same kernels run."""

from __future__ import annotations

import cmath
import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama as hf_llama
from torch import Tensor, nn

import llama
from llama import PRESETS, InputError, Llama, LlamaConfig
from llama.model import Attention, RMSNorm, rotary_tables, rotate
from tests.llama.common import differing, gradients, tiny, tiny_hf, token_ids
from tests.oracle import SHAPES, STORIES, float64_oracle, hf_model, largest, needs_data

CASES = [*SHAPES, pytest.param("stories", marks=needs_data)]
FP32_ROUNDING = 1e-5  # SDPA's kernel and the eager formula sum in different orders; logits here are of size 2
FP64_ROUNDING = 1e-12  # the same in float64
ANGLE_ROUNDING = 2.5e-4  # half an ulp of an fp32 angle near 4095 (1.2e-4), plus that of the fp32 frequency times 4095


def hf_eager(self: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """HF's own eager attention in place of SDPA."""
    module = types.SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    blocked = torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    y, _ = hf_llama.eager_attention_forward(module, q, k, v, blocked[None, None], scaling=self.head_dim**-0.5)
    return y.transpose(1, 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_hfs_bit_for_bit(
    case: str, dtype: torch.dtype, attention: str, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same attention kernel on both sides, everything around it leaves no rounding to excuse."""
    if attention == "eager":
        monkeypatch.setattr(Attention, "attend", hf_eager)
    ours, oracle = llama.load(directories[case], dtype), hf_model(directories[case], dtype, attention)
    ids = token_ids(2, 19)
    logits, wanted = ours(ids), oracle(ids).logits
    assert logits.dtype == wanted.dtype == dtype
    assert torch.equal(logits, wanted)
    assert differing(gradients(ours, logits), gradients(oracle, wanted)) == []


@needs_data
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_real_model_is_hfs_bit_for_bit_over_its_whole_context(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two kernels HF's own logits differ by 3e-5 at 512 tokens, so each is compared with itself."""
    if attention == "eager":
        monkeypatch.setattr(Attention, "attend", hf_eager)
    ours, oracle = llama.load(STORIES), hf_model(STORIES, attention=attention)
    for length in (1, 100, ours.config.max_position_embeddings):
        ids = token_ids(1, length, vocabulary=512)
        with torch.no_grad():
            assert torch.equal(ours(ids), oracle(ids).logits), length


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_agrees_with_eager_attention(shape: str, directories: dict[str, Path]) -> None:
    ids = token_ids(2, 19)
    assert largest(llama.load(directories[shape])(ids), hf_model(directories[shape])(ids).logits) <= FP32_ROUNDING


@pytest.mark.parametrize("case", CASES)
def test_float64_agrees_with_the_oracle_without_its_down_casts(case: str, directories: dict[str, Path]) -> None:
    """Gradients are sums over all logits, up to 1e3 in size: their tolerance is relative to each tensor's largest entry."""
    with float64_oracle():
        ours, oracle = llama.load(directories[case], torch.float64), hf_model(directories[case], torch.float64)
        ids = token_ids(2, 19)
        logits, wanted = ours(ids), oracle(ids).logits
        assert logits.dtype == torch.float64
        assert largest(logits, wanted) <= FP64_ROUNDING
        found, expected = gradients(ours, logits), gradients(oracle, wanted)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert largest(found[name], gradient) <= FP64_ROUNDING * gradient.abs().max().item(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_have_hfs_names_and_shapes_and_there_are_no_buffers(shape: str) -> None:
    ours, oracle = tiny(shape), tiny_hf(SHAPES[shape])
    shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in oracle.named_parameters()}
    assert set(ours.state_dict()) == set(oracle.state_dict())
    assert list(ours.named_buffers()) == []


@pytest.mark.parametrize(
    ("preset", "count"),
    [("llama2-7b", 6_738_415_616), ("llama2-13b", 13_015_864_320), ("llama2-70b", 68_976_648_192)],
)
def test_presets_have_the_published_sizes(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = Llama(PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert len(list(model.parameters())) == 9 * PRESETS[preset].num_hidden_layers + 3
    assert PRESETS[preset].max_position_embeddings == 4096


def test_initialisation_is_hfs() -> None:
    """Projections and embeddings N(0, 0.02), norms 1."""
    torch.manual_seed(0)
    for name, parameter in Llama(PRESETS["demo"]).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            error = 5 / (2 * parameter.numel()) ** 0.5  # five standard errors of a standard deviation, relative
            assert abs(parameter.std().item() / 0.02 - 1) < error, name


def test_tied_weights_stay_one_parameter() -> None:
    model = tiny("tied").to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    untied = tiny("gqa")
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_rmsnorm_rounds_in_hfs_order() -> None:
    """bf16: normalised in fp32, cast, then multiplied. Multiplying before the cast, as F.rms_norm does, differs."""
    generator = torch.Generator().manual_seed(0)
    norm, oracle = RMSNorm(64, 1e-5), hf_llama.LlamaRMSNorm(64, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.1 * torch.randn(64, generator=generator))
        oracle.weight.copy_(norm.weight)
    x = torch.randn(50, 64, generator=generator).bfloat16()
    found = norm.bfloat16()(x)
    assert torch.equal(found, oracle.bfloat16()(x))
    assert not torch.equal(found, nn.functional.rms_norm(x, (64,), norm.weight, 1e-5))


def test_rotation_is_multiplication_of_complex_numbers() -> None:
    """The pair (i, i + D/2) is a complex number; position p turns it by p * theta^(-2i/D)."""
    D, theta = 8, 10000.0
    x = torch.randn(1, 1, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 1000, 4095])
    turned = rotate(x, *rotary_tables(positions, D, theta, torch.float64))
    for t, p in enumerate(positions.tolist()):
        for i in range(D // 2):
            wanted = complex(x[0, 0, t, i], x[0, 0, t, i + D // 2]) * cmath.exp(1j * p * theta ** (-2 * i / D))
            found = complex(turned[0, 0, t, i], turned[0, 0, t, i + D // 2])
            assert abs(found - wanted) <= FP64_ROUNDING


def test_rotary_tables_are_right_at_the_last_position_in_every_dtype() -> None:
    """bf16 rounds the finished cosines once; it never rounds an angle."""
    last = torch.tensor([4095])
    exact = rotary_tables(last, 128, 10000.0, torch.float64)
    single = rotary_tables(last, 128, 10000.0, torch.float32)
    for found, wanted in zip(single, exact, strict=True):
        assert largest(found, wanted) <= ANGLE_ROUNDING
    for found, wanted in zip(rotary_tables(last, 128, 10000.0, torch.bfloat16), single, strict=True):
        assert torch.equal(found, wanted.bfloat16())


def test_casting_the_model_does_not_touch_rotary_angles(directories: dict[str, Path]) -> None:
    """`.to(bf16)` equals HF's `from_pretrained(dtype=bf16)` at the end of the context; HF's own `.bfloat16()` does not."""
    ids, positions = token_ids(1, 6), torch.arange(4090, 4096)
    inputs = {"position_ids": positions[None], "attention_mask": torch.ones_like(ids)}
    found = llama.load(directories["gqa"]).to(torch.bfloat16)(ids, positions=positions)
    assert torch.equal(found, hf_model(directories["gqa"], torch.bfloat16, "sdpa")(ids, **inputs).logits)
    rounded = hf_model(directories["gqa"], torch.float32, "sdpa").bfloat16()
    assert not torch.equal(found, rounded(ids, **inputs).logits)


def test_fp32_master_weights_compute_like_a_bf16_model() -> None:
    """Same logits; gradients come back in fp32 with bf16's values (the embedding's own sum over tokens is finer)."""
    master, rounded = tiny("gqa"), tiny("gqa").bfloat16()
    master.model.compute_dtype = torch.bfloat16
    ids = token_ids(2, 19)
    logits, wanted = master(ids), rounded(ids)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, wanted)
    found = gradients(master, logits)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    expected = {name: gradient.float() for name, gradient in gradients(rounded, wanted).items()}
    assert differing(found, expected) == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("filler", [0, 2, 96])
def test_right_padding_changes_no_earlier_logits(filler: int) -> None:
    ids = token_ids(2, 12)
    model = tiny("gqa")
    padded = torch.cat((ids, torch.full((2, 5), filler)), dim=1)
    other = torch.cat((ids, token_ids(2, 5, seed=9)), dim=1)
    assert torch.equal(model(padded)[:, :12], model(other)[:, :12])
    assert largest(model(padded)[:, :12], model(ids)) <= FP32_ROUNDING


def test_explicit_positions_are_hfs_position_ids(directories: dict[str, Path]) -> None:
    """Shifted, with gaps, out of order, and different in each row."""
    ids = token_ids(2, 6)
    positions = torch.tensor([[0, 2, 4, 1, 3, 5], [7, 8, 9, 40, 41, 42]])
    oracle = hf_model(directories["gqa"], torch.float32, "sdpa")
    wanted = oracle(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    model = llama.load(directories["gqa"])
    assert torch.equal(model(ids, positions=positions), wanted)
    assert torch.equal(model(ids[:1], positions=positions[0]), model(ids[:1], positions=positions[:1]))
    assert torch.equal(model(ids, positions=torch.arange(6)), model(ids))


def test_a_mask_can_keep_two_documents_in_one_row_apart() -> None:
    """Block-causal mask and restarted positions: each document's logits are those it has alone."""
    model = tiny("gqa").double()
    ids = token_ids(1, 11)
    document = torch.tensor([0] * 4 + [1] * 7)
    mask = (document[:, None] == document[None, :]).tril()
    positions = torch.cat((torch.arange(4), torch.arange(7)))
    found = model(ids, positions=positions, mask=mask)
    alone = torch.cat((model(ids[:, :4]), model(ids[:, 4:])), dim=1)
    assert largest(found, alone) <= FP64_ROUNDING
    assert largest(model(ids), alone) > 0.1  # without the mask the second document sees the first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fully_masked_row_is_finite(dtype: torch.dtype) -> None:
    model = tiny("gqa").to(dtype)
    ids = token_ids(1, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[0] = False
    logits = model(ids, mask=mask)
    assert logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model, logits).values())


def test_last_selects_one_position_per_row() -> None:
    model, ids = tiny("gqa"), token_ids(3, 8)
    last = torch.tensor([7, 0, 3])
    found, wanted = model(ids, last=last), model(ids)[torch.arange(3), last][:, None]
    assert found.shape == (3, 1, 97)
    assert largest(found, wanted) <= FP32_ROUNDING  # the head multiplies one row instead of eight


def test_the_cache_takes_a_sequence_in_pieces() -> None:
    """Any cut into calls gives the logits of one call."""
    model, ids = tiny("gqa").double(), token_ids(2, 12)
    wanted = model(ids)
    for cuts in ([5, 7], [1, 1, 10], [1] * 12):
        cache = llama.KVCache(SHAPES["gqa"].num_hidden_layers, capacity=12)
        pieces = [model(piece, cache=cache) for piece in ids.split(cuts, dim=1)]
        assert largest(torch.cat(pieces, dim=1), wanted) <= FP64_ROUNDING
        with pytest.raises(ValueError, match="the cache has 12 slots; this call needs 13"):
            model(ids[:, :1], cache=cache)


def test_a_mask_counts_with_a_cache_too() -> None:
    """Later queries that may not look at the first token, in one call and in two."""
    model, ids = tiny("gqa").double(), token_ids(1, 9)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[4:, 0] = False
    wanted = model(ids, mask=mask)
    cache = llama.KVCache(SHAPES["gqa"].num_hidden_layers, capacity=9)
    pieces = [model(ids[:, :4], mask=mask[:4, :4], cache=cache), model(ids[:, 4:], mask=mask[4:], cache=cache)]
    assert largest(torch.cat(pieces, dim=1), wanted) <= FP64_ROUNDING
    assert largest(model(ids), wanted) > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; expected a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1; expected a positive integer"),
        ({"intermediate_size": 1.5}, "intermediate_size is 1.5; expected a positive integer"),
        ({"max_position_embeddings": True}, "max_position_embeddings is True; expected a positive integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a positive finite number"),
        ({"rope_theta": 10**400}, "expected a positive finite number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; expected a positive finite number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; expected a positive finite number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 60}, "= 15 is odd; rotary positions need pairs"),
    ],
)
def test_an_impossible_configuration_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        LlamaConfig(**{**dataclasses.asdict(SHAPES["mha"]), **settings})
    assert message in str(error.value)
