"""LoRA, rsLoRA and DoRA equal PEFT's: logits through files in both directions, gradients, dropout, low precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llama
from llama.linear import Linear
from peft_impl import load_adapter, save_adapter
from peft_impl.lora import DoraLowRank
from tests.oracle import STORIES, float64_oracle, hf_model, largest, needs_data
from tests.peft_impl.common import CASES, IDS, adapted, peft_keys, peft_model, peft_parameters

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, for the tied shape

# fp64 sums of a few hundred terms of size 1, in another order: some 1e-14; a formula that differs shows at 1e-8 and above.
FLOAT64 = 1e-12
# Gradients in fp32 relative to the largest: our loss and HF's attention backward add in another order (eps 1.2e-7, depth 3).
FLOAT32_GRADIENT = 1e-5

EVERY = [("gqa", case) for case in CASES] + [
    (shape, case) for shape in ("mha", "mqa", "tied") for case in ("default", "dora", "head", "embedding")
]


@pytest.mark.parametrize(("shape", "case"), EVERY)
def test_what_peft_wrote_gives_pefts_logits(bases: dict[str, Path], tmp_path: Path, shape: str, case: str) -> None:
    theirs = peft_model(bases[shape], **CASES[case])
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama.load(bases[shape])
    base = model(IDS)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(IDS), theirs(IDS).logits)
    assert not torch.equal(model(IDS), base)


@pytest.mark.parametrize(("shape", "case"), EVERY)
def test_peft_reads_what_we_wrote(bases: dict[str, Path], tmp_path: Path, shape: str, case: str) -> None:
    model = adapted(shape, **CASES[case])
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hf_model(bases[shape], attention="sdpa"), tmp_path / "adapter").eval()
    assert torch.equal(theirs(IDS).logits, model(IDS))


@needs_data
@pytest.mark.parametrize("case", ["all-linear", "dora"])
def test_real_weights_in_both_directions(tmp_path: Path, case: str) -> None:
    theirs = peft_model(STORIES, **CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    model = llama.load(STORIES)
    load_adapter(model, tmp_path / "theirs")
    assert torch.equal(model(IDS), theirs(IDS).logits)
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(hf_model(STORIES, attention="sdpa"), tmp_path / "ours").eval()
    assert torch.equal(again(IDS).logits, model(IDS))


def test_the_first_pattern_that_matches_wins(bases: dict[str, Path], tmp_path: Path) -> None:
    """Against the alphabet, which is the order PEFT writes them in: what matters is the order of the file."""
    patterns = {"q_proj": 3, "layers.1.self_attn.q_proj": 5}
    model = adapted(rank_pattern=patterns, alpha_pattern=patterns)
    assert peft_keys(model)["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape[0] == 3
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hf_model(bases["gqa"], attention="sdpa"), tmp_path / "adapter").eval()
    assert torch.equal(theirs(IDS).logits, model(IDS))


def losses(model: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
    """Ours and PEFT's, backpropagated."""
    ours = model(IDS, IDS)
    ours.backward()
    logits = theirs(IDS).logits[:, :-1]
    wanted = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), IDS[:, 1:].reshape(-1), reduction="sum")
    wanted.backward()
    return ours.detach(), wanted.detach()


@pytest.mark.parametrize(("shape", "case"), EVERY)
def test_logits_and_gradients_in_float64(bases: dict[str, Path], tmp_path: Path, shape: str, case: str) -> None:
    theirs = peft_model(bases[shape], torch.float64, "eager", **CASES[case]).double()
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama.load(bases[shape], torch.float64)
    load_adapter(model, tmp_path / "adapter", trainable=True)
    with float64_oracle():
        assert largest(model(IDS), theirs(IDS).logits) <= FLOAT64
        losses(model, theirs)
    wanted = peft_parameters(theirs)
    assert peft_keys(model).keys() == wanted.keys()
    for key, parameter in peft_keys(model).items():
        assert parameter.grad.dtype == torch.float64
        assert largest(parameter.grad, wanted[key].grad) <= FLOAT64 * wanted[key].grad.abs().max().clamp(min=1), key


@pytest.mark.parametrize("case", ["default", "dora", "head"])
def test_gradients_in_float32(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    theirs = peft_model(bases["gqa"], **CASES[case])
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama.load(bases["gqa"])
    load_adapter(model, tmp_path / "adapter", trainable=True)
    ours, wanted = losses(model, theirs)
    assert largest(ours, wanted) <= FLOAT32_GRADIENT * wanted
    for key, parameter in peft_parameters(theirs).items():
        assert largest(peft_keys(model)[key].grad, parameter.grad) <= FLOAT32_GRADIENT * parameter.grad.abs().max(), key


@pytest.mark.parametrize("settings", [{"target_modules": "all-linear"}, {"use_dora": True, "r": 3, "lora_alpha": 7}])
def test_dropout_draws_as_peft_does(bases: dict[str, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs = peft_model(bases["gqa"], lora_dropout=0.3, **settings).train()
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama.load(bases["gqa"]).train()
    load_adapter(model, tmp_path / "adapter")
    torch.manual_seed(5)
    wanted = theirs(IDS).logits
    torch.manual_seed(5)
    ours = model(IDS)
    assert torch.equal(ours, wanted)
    assert not torch.equal(model(IDS), ours)  # another draw
    model.eval()
    assert torch.equal(model(IDS), model(IDS))
    assert torch.equal(model(IDS), theirs.eval()(IDS).logits)


def test_dora_with_dropout_is_the_papers_formula() -> None:
    """y = W x + (c - 1) W d(x) + c s B A d(x), one mask d, c = m / ||W + s B A||."""
    torch.manual_seed(0)
    linear, x = Linear(6, 4).double(), torch.randn(3, 6, dtype=torch.float64)
    W, s = linear.weight.detach(), 7 / 3
    leaf = DoraLowRank(linear, r=3, scale=s, dropout=0.5)
    leaf.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        leaf.B.normal_()
        leaf.magnitude.mul_(1.5)
    torch.manual_seed(1)
    d = F.dropout(torch.ones_like(x), 0.5) * x
    c = leaf.magnitude / (W + s * leaf.B @ leaf.A).pow(2).sum(1).sqrt()
    wanted = x @ W.T + (c - 1) * (d @ W.T) + c * s * (d @ leaf.A.T @ leaf.B.T)
    torch.manual_seed(1)
    y = linear(x)
    assert largest(y + leaf(x, y, linear.weight), wanted) <= FLOAT64


# Both errors are noise of one size: 1.00 to 1.30 over these cases and three sets of tokens. A rounding of the base or a lost
# term is tens of times larger.
AS_GOOD_AS_PEFT = 1.5


@pytest.mark.parametrize("case", ["all-linear", "dora", "head"])
def test_a_bfloat16_base_is_as_accurate_as_pefts(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    """PEFT computes the update in fp32, we compute it in the base's dtype: the logits must not be worse for it."""
    theirs = peft_model(bases["gqa"], torch.bfloat16, **CASES[case])
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama.load(bases["gqa"], torch.bfloat16)
    load_adapter(model, tmp_path / "adapter")
    assert model(IDS).dtype == torch.bfloat16
    exact = llama.load(bases["gqa"], torch.bfloat16).double()  # the rounded weights, without further rounding
    load_adapter(exact, tmp_path / "adapter")
    ids = torch.randint(97, (8, 32), generator=torch.Generator().manual_seed(0))
    truth = exact(ids)
    error = (model(ids).double() - truth).norm()
    assert error <= AS_GOOD_AS_PEFT * (theirs(ids).logits.double() - truth).norm()


def test_a_small_change_of_magnitude_survives_bfloat16() -> None:
    """c = 1.002 rounds to one in bf16; what DoRA adds, (c - 1) y, must not."""
    linear = Linear(16, 8).bfloat16()
    leaf = DoraLowRank(linear, r=2, scale=1.0, dropout=0.0)
    leaf.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        leaf.magnitude.mul_(1.002)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = linear(x)
    added = leaf(x, y, linear.weight)
    assert ((added.float() - 0.002 * y.float()).abs() <= 2**-7 * 0.002 * y.float().abs()).all()  # two roundings of 2^-9
