"""What trains, chosen by name, kind or depth: each word against the names that it means, written out here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import pytest
import torch

from llama import Llama, LlamaConfig
from llama.errors import InputError
from peft_impl import count_parameters, select_parameters, train_only, trainable_table
from peft_impl.freeze import layer_of, layers_in
from tests.oracle import TINY

DEEP = 12  # layers: 1 is the beginning of 10 and 11
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm"]
TOP = ["model.norm.weight", "lm_head.weight"]
EMBEDDING = "model.embed_tokens.weight"


def within(layers: Iterable[int], modules: Iterable[str] = (*ATTENTION, *MLP, *NORMS)) -> set[str]:
    """Names of the weights of these modules in these layers."""
    return {f"model.layers.{layer}.{module}.weight" for layer, module in itertools.product(layers, modules)}


def model_of(**changes: object) -> Llama:
    """A Llama of 12 layers that takes no memory."""
    with torch.device("meta"):
        return Llama(LlamaConfig(**{**TINY, "num_hidden_layers": DEEP, **changes}))  # type: ignore[arg-type]


MODELS = {tied: model_of(tie_word_embeddings=tied) for tied in (False, True)}
EVERY = range(DEEP)
CASES: dict[str, set[str]] = {
    # words
    "attention": within(EVERY, ATTENTION),
    "mlp": within(EVERY, MLP),
    "norms": within(EVERY, NORMS) | {"model.norm.weight"},
    "embeddings": {EMBEDDING},
    "lm_head": {"lm_head.weight"},
    # depth
    "last:1": within([11]),
    "last:3": within([9, 10, 11]),
    "last:12": within(EVERY),
    "first:1": within([0]),
    "first:2": within([0, 1]),
    # names
    "layers.1": within([1]),
    "layers.10": within([10]),
    "model.layers.1": within([1]),
    "model.layers.1.mlp": within([1], MLP),
    "layers.1.self_attn.q_proj": within([1], ["self_attn.q_proj"]),
    "model.layers.3.mlp.up_proj.weight": within([3], ["mlp.up_proj"]),
    "layers": within(EVERY),
    "norm": {"model.norm.weight"},
    "model.norm": {"model.norm.weight"},
    "embed_tokens": {EMBEDDING},
    "q_proj": within(EVERY, ["self_attn.q_proj"]),
    "post_attention_layernorm": within(EVERY, NORMS[1:]),
    "lm_head.weight": {"lm_head.weight"},
    "model": within(EVERY) | {EMBEDDING, "model.norm.weight"},
    # globs
    "*": within(EVERY) | {EMBEDDING, *TOP},
    "layers.*": within(EVERY),
    "layers.*.q_proj": within(EVERY, ["self_attn.q_proj"]),
    "layers.1?.*_proj": within([10, 11], [*ATTENTION, *MLP]),
    "layers.[13].mlp": within([1, 3], MLP),
    "*layernorm": within(EVERY, NORMS),
    "*norm": within(EVERY, NORMS) | {"model.norm.weight"},
    # several
    "norms,lm_head": within(EVERY, NORMS) | set(TOP),
    "last:1,first:1,norm": within([0, 11]) | {"model.norm.weight"},
    "last:2,last:1": within([10, 11]),
    "attention,mlp,norms,embeddings,lm_head": within(EVERY) | {EMBEDDING, *TOP},
    # all but
    "last:2,-layers.11": within([10]),
    "attention,-layers.1": within(set(EVERY) - {1}, ATTENTION),
    "norms,-model.norm": within(EVERY, NORMS),
    "*,-layers,-embeddings": set(TOP),
    "*,-mlp,-attention,-norms,-lm_head": {EMBEDDING},
    "layers.*,-last:11": within([0]),
    "layers.*,-first:11,-q_proj": within([11], [*ATTENTION[1:], *MLP, *NORMS]),
    "last:1,-layers.0": within([11]),  # what was never in is out already
}


@pytest.mark.parametrize("patterns", CASES)
def test_patterns_mean_these_names_whatever_their_order(patterns: str) -> None:
    model, parts = MODELS[False], patterns.split(",")
    everything = [name for name, _ in model.named_parameters()]
    assert set(everything) == within(EVERY) | {EMBEDDING, *TOP}
    in_order = [name for name in everything if name in CASES[patterns]]
    assert len(in_order) == len(CASES[patterns])
    for order in itertools.permutations(parts):
        assert select_parameters(model, order) == in_order
    assert select_parameters(model, parts * 2) == in_order  # twice is once


def test_biases_are_those_of_extra_layers_in_the_head() -> None:
    names = {f"lm_head.extra.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}
    model = model_of(head_hidden=(8, 5))
    assert set(select_parameters(model, ["biases"])) == {name for name in names if name.endswith("bias")}
    assert set(select_parameters(model, ["lm_head"])) == names | {"lm_head.weight", "lm_head.back.weight"}
    assert set(select_parameters(model, ["lm_head", "-biases", "-back"])) == {
        "lm_head.weight", "lm_head.extra.0.weight", "lm_head.extra.1.weight"
    }  # fmt: skip


def test_a_classifiers_head_has_its_own_name() -> None:
    model = model_of(id2label=("bad", "good"), tie_word_embeddings=True)  # a classifier shares nothing
    assert select_parameters(model, ["score"]) == ["score.weight"]
    with pytest.raises(InputError, match=r"^'lm_head' matches no parameter$"):  # and proposes no word that would not
        select_parameters(model, ["lm_head"])


REFUSED = {
    "q_prj": "'q_prj' matches no parameter - did you mean 'q_proj'?",
    "norms,-q_prj": "'q_prj' matches no parameter - did you mean 'q_proj'?",  # an exclusion, too
    "-layers.12,norms": "'layers.12' matches no parameter - did you mean 'layers.",
    "layers.*.q_porj": "'layers.*.q_porj' matches no parameter - did you mean 'layers.*.q_proj'?",
    "normss": "'normss' matches no parameter - did you mean 'norms'?",
    "Attention": "'Attention' matches no parameter - did you mean 'attention'?",
    "lm_haed": "'lm_haed' matches no parameter - did you mean 'lm_head'?",
    "lst:2": "'lst:2' matches no parameter - did you mean 'last:N'?",
    "model.layers.1.mlp.up_proj.weigth": "did you mean 'model.layers.1.mlp.up_proj.weight'?",
    "layer.1": "'layer.1' matches no parameter - did you mean 'layers.1'?",
    "layers.1.": "'layers.1.' matches no parameter - did you mean 'layers.1'?",
    "layers.1.q_proj": "'layers.1.q_proj' matches no parameter - did you mean 'layers.*.q_proj'?",  # a run of parts, no gap
    "proj": "'proj' matches no parameter - did you mean 'v_proj'?",  # whole parts only
    "": "'' matches no parameter",
    "norms,-": "'' matches no parameter",
    "biases": "'biases' matches nothing: Llama 2's projections have none",
    "bias": "'bias' matches no parameter",
    "last:0": "'last:0': expected last:N with 1 <= N <= 12",
    "last:99": "'last:99': expected last:N with 1 <= N <= 12",
    "last:13": "'last:13': expected last:N with 1 <= N <= 12",
    "last:x": "'last:x': expected last:N with 1 <= N <= 12",
    "last:": "'last:': expected last:N with 1 <= N <= 12",
    "last:-1": "'last:-1': expected last:N",
    "last:1.5": "'last:1.5': expected last:N",
    "last:\N{SUPERSCRIPT TWO}": "expected last:N",  # a digit to Python, and no number
    "first:0": "'first:0': expected first:N with 1 <= N <= 12",
    "-first:13,norms": "'first:13': expected first:N with 1 <= N <= 12",
    "norms,-norms": "'norms,-norms' leaves nothing to train",
    "-norms": "'-norms' leaves nothing to train",
    "q_proj,-attention": "'q_proj,-attention' leaves nothing to train",
    "first:2,-layers.0,-layers.1": "leaves nothing to train",
}


@pytest.mark.parametrize("patterns", REFUSED)
def test_what_matches_nothing_or_leaves_nothing_is_refused(patterns: str) -> None:
    with pytest.raises(InputError) as error:
        select_parameters(MODELS[False], patterns.split(","))
    assert REFUSED[patterns] in str(error.value)
    if "did you mean" not in REFUSED[patterns]:
        assert "did you mean" not in str(error.value)


def test_what_is_proposed_would_match() -> None:
    """Whatever the slip of the pen, with a tied head too."""
    words = ("attention", "mlp", "norms", "biases", "embeddings", "lm_head", "q_proj", "model.norm.weight", "layers.7")
    slips = {slip for word in words for slip in (word[:-1], word[1:], word + "x", word.replace("e", "a"), word.upper())}
    proposed = set()
    for tied, slip in itertools.product((False, True), sorted(slips - {*words, "norm"})):
        with pytest.raises(InputError) as error:
            select_parameters(MODELS[tied], [slip])
        if found := re.search(r"did you mean '(.*)'", str(error.value)):
            assert select_parameters(MODELS[tied], [found[1].replace("N", "1")])
            proposed.add(found[1])
    assert {"attention", "mlp", "norms", "embeddings", "lm_head", "q_proj", "layers.7"} <= proposed


def test_a_tied_head_is_the_embedding() -> None:
    model = model_of(tie_word_embeddings=True)
    for patterns in (["lm_head"], ["norms", "-lm_head"]):
        with pytest.raises(InputError, match=r"'lm_head' shares the embedding's weight .*'embeddings' trains both"):
            select_parameters(model, patterns)
    assert select_parameters(model, ["embeddings"]) == [EMBEDDING]
    assert set(select_parameters(model, ["*"])) == within(EVERY) | {EMBEDDING, "model.norm.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_exactly_the_named_parameters_require_gradients(tied: bool) -> None:
    model = model_of(tie_word_embeddings=tied)
    for patterns in (["last:2", "embeddings"], ["norms"], ["*"], ["last:1"]):  # each time all flags are set anew
        names = select_parameters(model, patterns)
        train_only(model, names)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == names
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        assert count_parameters(model) == (sum(sizes[name] for name in names), sum(sizes.values()))
    train_only(model, [])
    assert count_parameters(model)[0] == 0


def test_the_table_counts_by_kind() -> None:
    model = model_of()
    train_only(model, select_parameters(model, ["last:2", "-mlp", "norm"]))
    rows = {line.split()[0]: (line.split()[1], line.split()[3]) for line in trainable_table(model).splitlines()}
    width, kv = TINY["hidden_size"], TINY["hidden_size"]
    expected = {f"model.layers.*.{name}.weight": ("2", f"{2 * width * kv:,}") for name in ATTENTION}
    expected |= {f"model.layers.*.{name}.weight": ("2", f"{2 * width:,}") for name in NORMS}
    assert rows == expected | {"model.norm.weight": ("1", f"{width:,}")}


def test_the_layer_of_a_name() -> None:
    for name, layer in {
        "model.layers.10.mlp": 10, "model.layers.1": 1, "layers.3.x": 3, "model.layers": None, "players.3": None,
        "model.norm.weight": None,
    }.items():  # fmt: skip
        assert layer_of(name) == layer, name
    assert layers_in(["layers.10.x", "norm", "layers.2.y", "layers.10.z"]) == [2, 10]
