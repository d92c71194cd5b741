"""Meta's directories: shards cut by the published table, and logits of Meta's own forward pass over Meta's own tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import llama
from llama import InputError, LlamaConfig
from llama.config_files import config_from_meta, config_to_meta
from llama.meta import to_hf_rows, to_meta_rows
from tests.llama.common import differing, files_below, tiny, token_ids
from tests.llama.meta_files import MODELS, ROWS, meta_forward, meta_tensors, write_meta
from tests.oracle import largest

FP64_ROUNDING = 1e-10  # complex multiplication and HF's half rotation in float64, through three layers


CASES = [("mha", 1), ("mha", 2), ("mha", 8), ("gqa", 1), ("gqa", 2), ("70b", 1), ("70b", 8)]


@pytest.mark.parametrize(("kind", "shards"), CASES)
def test_logits_are_metas(kind: str, shards: int, tmp_path: Path) -> None:
    """Whatever the number of shards, the model computes what Meta's code computes from the unsharded tensors."""
    model = llama.load(write_meta(tmp_path / "meta", kind, shards), torch.float64)
    ids = token_ids(2, 11, vocabulary=ROWS)
    assert largest(model(ids), meta_forward(MODELS[kind][0], meta_tensors(kind), ids)) <= FP64_ROUNDING
    assert model.config == LlamaConfig(
        vocab_size=ROWS,
        hidden_size=64,
        intermediate_size=MODELS[kind][1],
        num_hidden_layers=3,
        num_attention_heads=MODELS[kind][0]["n_heads"],
        num_key_value_heads=MODELS[kind][0].get("n_kv_heads", MODELS[kind][0]["n_heads"]),
        max_position_embeddings=4096,
        rms_norm_eps=MODELS[kind][0]["norm_eps"],
        rope_theta=MODELS[kind][0].get("rope_theta", 10000.0),
    )


def test_without_the_permutation_the_logits_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above sees it."""
    monkeypatch.setattr("llama.weight_files.to_hf_rows", lambda weight, head_dim: weight)
    model = llama.load(write_meta(tmp_path / "meta", "gqa"), torch.float64)
    ids = token_ids(2, 11, vocabulary=ROWS)
    assert largest(model(ids), meta_forward(MODELS["gqa"][0], meta_tensors("gqa"), ids)) > 0.1


@pytest.mark.parametrize(("kind", "shards"), CASES)
def test_shards_merge_and_are_cut_to_the_bit(kind: str, shards: int, tmp_path: Path) -> None:
    """Meta -> HF -> Meta, cut into any number of shards: the files that Meta's table gives."""
    write_meta(tmp_path / "meta", kind, 1)
    wanted = write_meta(tmp_path / "cut", kind, shards)
    llama.save(llama.load(tmp_path / "meta"), tmp_path / "hf")
    llama.save_meta(llama.load(tmp_path / "hf"), tmp_path / "again", shards)
    assert files_below(tmp_path / "again") == [f"consolidated.{i:02d}.pth" for i in range(shards)] + ["params.json"]
    for index in range(shards):
        file = f"consolidated.{index:02d}.pth"
        found, expected = (torch.load(d / file, weights_only=True) for d in (tmp_path / "again", wanted))
        del expected["rope.freqs"]
        assert differing(found, expected) == []
        # a view would carry the whole tensor's storage into every shard
        assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize for tensor in found.values())
    assert llama.load(tmp_path / "again").config == llama.load(tmp_path / "meta").config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["mha", "gqa", "mqa", "tied"])
def test_hf_to_meta_to_hf_is_bit_identical(shape: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(shape).to(dtype)
    llama.save_meta(model, tmp_path / "meta")
    again = llama.load(tmp_path / "meta", dtype)
    assert not again.config.tie_word_embeddings  # Meta's format has no tying: the head is written out
    assert differing(again.state_dict(), model.state_dict()) == []
    assert torch.equal(again(token_ids(2, 9)), model(token_ids(2, 9)))


def test_row_order_of_a_head_of_eight() -> None:
    """Written out: HF's rows are Meta's even rows, then its odd ones; two heads are permuted each for itself."""
    rows = torch.arange(16.0)[:, None].expand(16, 3).contiguous()
    even_odd = [0, 2, 4, 6, 1, 3, 5, 7]
    assert to_hf_rows(rows, 8)[:, 0].tolist() == even_odd + [8 + i for i in even_odd]
    assert to_meta_rows(rows, 8)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(to_meta_rows(to_hf_rows(rows, 8), 8), rows)


@pytest.mark.parametrize("name", ["rope.freqs", "layers.2.attention.inner_attention.rope.freqs"])
def test_stored_rotary_tables_are_ignored(name: str, tmp_path: Path) -> None:
    """Even wrong ones, of any shape, in one shard only."""
    write_meta(tmp_path / "meta", "gqa", 2)
    part = torch.load(tmp_path / "meta" / "consolidated.01.pth", weights_only=True)
    torch.save({**part, name: torch.zeros(5)}, tmp_path / "meta" / "consolidated.01.pth")
    wanted = llama.load(write_meta(tmp_path / "plain", "gqa")).state_dict()
    assert differing(llama.load(tmp_path / "meta").state_dict(), wanted) == []


@pytest.mark.parametrize("vocabulary", [-1, ROWS, None])
def test_vocabulary_comes_from_the_embedding(vocabulary: int | None, tmp_path: Path) -> None:
    assert llama.load(write_meta(tmp_path / "meta", "mha", vocab_size=vocabulary)).config.vocab_size == ROWS


def test_the_feed_forward_formula_gives_the_published_sizes() -> None:
    published = {"llama2-7b": (256, None), "llama2-13b": (256, None), "llama2-70b": (4096, 1.3)}
    for preset, (multiple_of, multiplier) in published.items():
        config = llama.PRESETS[preset]
        params = {
            **{"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads},
            **{"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier, "norm_eps": 1e-5, "vocab_size": -1},
            "n_kv_heads": config.num_key_value_heads,
        }
        assert config_from_meta(params, 32000, config.intermediate_size, "params.json") == config
        written = config_to_meta(config)
        assert (written["multiple_of"], written.get("ffn_dim_multiplier")) == (multiple_of, multiplier)


def test_the_feed_forward_formula_rounds_as_metas() -> None:
    """Down after each step, then up to the multiple: 2/3 * 4 * 64 = 170.67 -> 170; 170 * 1.004 = 170.68 -> 170."""
    for multiple_of, multiplier, wanted in (
        (1, None, 170),
        (1, 1.004, 170),
        (1, 1.006, 171),
        (32, 1.004, 192),
        (256, 2.0, 512),
    ):
        params = {"dim": 64, "n_layers": 1, "n_heads": 1, "norm_eps": 1e-5, "multiple_of": multiple_of}
        config = config_from_meta({**params, "ffn_dim_multiplier": multiplier}, 8, wanted, "params.json")
        assert config.intermediate_size == wanted


def test_any_feed_forward_size_can_be_stated_through_the_formula() -> None:
    for dim in (2, 64, 4096, 8192):
        for size in [*range(1, 40), 172, 11008, 13824, 14336, 28671, 28672]:
            config = LlamaConfig(
                vocab_size=8, hidden_size=dim, intermediate_size=size, num_hidden_layers=1, num_attention_heads=1
            )
            assert config_from_meta(config_to_meta(config), 8, size, "params.json") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 128}, "dim, multiple_of and ffn_dim_multiplier give a feed-forward size of 352, but feed_forward.w1.weight"),
        ({"multiple_of": 256}, "give a feed-forward size of 256, but feed_forward.w1.weight has 192 rows"),
        ({"ffn_dim_multiplier": 2.0}, "give a feed-forward size of 352, but feed_forward.w1.weight has 192 rows"),
        ({"ffn_dim_multiplier": float("nan")}, "params.json: cannot convert float NaN to integer"),
        ({"multiple_of": 0}, "params.json: "),
        ({"dim": "64"}, "params.json: "),
        ({"n_layers": 2}, "the weights have 3 layers; the configuration says 2"),
        ({"n_layers": 10**9}, "the weights have 3 layers; the configuration says 1000000000"),
        ({"n_kv_heads": 4}, "k_proj.weight has shape (16, 64); the configuration says (32, 64)"),
        ({"n_kv_heads": None}, "k_proj.weight has shape (16, 64); the configuration says (64, 64)"),
        ({"n_heads": 5}, "params.json: hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"vocab_size": 32000}, "params.json: vocab_size = 32000, but tok_embeddings.weight has 96 rows"),
        ({"norm_eps": float("nan")}, "params.json: rms_norm_eps is nan"),
        ({"norm_eps": None, "dim": None}, "params.json: missing dim, norm_eps"),
        ({"rope_theta": -1.0}, "params.json: rope_theta is -1.0"),
        ({"use_scaled_rope": True}, "params.json: use_scaled_rope is not supported; Llama 2 has no rope scaling"),
    ],
)
def test_params_that_lie_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        llama.load(write_meta(tmp_path / "meta", "gqa", **changes))
    assert message in str(error.value)


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    for shards in (0, -1):
        with pytest.raises(InputError, match=f"shards is {shards}; expected a positive integer"):
            llama.save_meta(tiny("gqa"), tmp_path / "meta", shards)
    with pytest.raises(InputError, match="2 key/value heads cannot be cut into 3 shards"):
        llama.save_meta(tiny("gqa"), tmp_path / "meta", shards=3)
    with pytest.raises(InputError, match=r"output\.weight has 97 entries along dimension 0; 2 shards do not divide it"):
        llama.save_meta(tiny("mha"), tmp_path / "meta", shards=2)
    assert files_below(tmp_path) == []


def test_export_can_cast_and_carries_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"a sentencepiece model")
    model = tiny("gqa")
    llama.save_meta(model, tmp_path / "meta", dtype=torch.bfloat16, tokenizer_from=tmp_path)
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == b"a sentencepiece model"
    stored = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    wanted = model.bfloat16().state_dict()
    assert differing(llama.load(tmp_path / "meta", torch.bfloat16).state_dict(), wanted) == []
