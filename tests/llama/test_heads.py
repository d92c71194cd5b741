"""Heads: classifiers as transformers has them, their losses, extra fully connected layers, and heads that are exchanged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import llama
from llama import InputError, Llama, LlamaConfig, generate, replace_head
from llama.config_files import config_from_hf
from llama.heads import classification_loss
from llama.weight_files import HEAD_FILE
from tests.llama.common import differing, files_below, tiny, token_ids
from tests.oracle import SHAPES, float64_oracle, hf_model, largest, randomise

SCORES = 2e-5  # fp32, scores up to 20 in size: HF multiplies all positions by the head, we the last one; sums in another order
FP64_ROUNDING = 1e-12
SUMMED = 1e-11  # float64: sums over some tens of positions, up to 1000 in size, in another order
NAMES = ("très bien", "so lala ☃", "bad")
HIDDEN = (8, 6)
PAD = 0
LENGTHS = torch.tensor([9, 4, 1, 7])
PROBLEMS = {  # problem type -> targets of four rows
    "single_label_classification": torch.tensor([2, 0, 1, 2]),
    "multi_label_classification": torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
    "regression": torch.tensor([[0.5, -1, 2], [0, 3, 1e-3], [-7, 0.1, 0.2], [4, 5, 6]]),
}
NOTHING = {"single_label_classification": -100, "multi_label_classification": float("nan"), "regression": float("nan")}


def ragged() -> Tensor:
    """Ids (4, 9) of the lengths `LENGTHS`, padded on the right as HF wants it; no text has the padding's id."""
    ids = 1 + token_ids(4, 9, vocabulary=96)
    return ids.masked_fill(torch.arange(9) >= LENGTHS[:, None], PAD)


def classifier(
    shape: str = "gqa", names: Sequence[str] = NAMES, problem: str | None = None, hidden: Sequence[int] = ()
) -> Llama:
    """A classifier with random weights that are not small."""
    model = replace_head(tiny(shape), names, problem, hidden)
    randomise(model.score, seed=7)
    model.score.weight.data *= 10
    return model


def language_model(shape: str = "gqa", hidden: Sequence[int] = HIDDEN) -> Llama:
    """A language model whose head has extra layers that do something."""
    model = replace_head(tiny(shape), hidden=hidden)
    for seed, layer in enumerate((model.lm_head.extra, model.lm_head.back)):
        randomise(layer, seed)
    return model


def opened(path: Path, kind: Any = transformers.AutoModelForSequenceClassification, **settings: Any) -> nn.Module:
    """What transformers makes of a directory, with nothing missing, unexpected or of another shape."""
    settings = {"dtype": torch.float32, "attn_implementation": "sdpa", **settings}
    model, report = kind.from_pretrained(path, output_loading_info=True, **settings)
    assert {key: list(value) for key, value in report.items() if value} == {}
    return model.eval()


def agree(ours: Llama, oracle: nn.Module) -> None:
    """Bit for bit, but for the order of summation in the head's product, of which HF makes one for all positions."""
    ids, rows = ragged(), torch.arange(4)
    with torch.no_grad():
        scores = ours(ids, last=LENGTHS - 1)
        assert torch.equal(scores, oracle.score(oracle.model(ids).last_hidden_state[rows, LENGTHS - 1]))
        assert largest(scores, oracle(ids).logits) <= SCORES
        assert largest(scores, oracle(ids, attention_mask=(ids != PAD).long()).logits) <= SCORES
    assert 1 < scores.abs().max() < 20
    assert scores.std(0).min() > 0.1  # the rows differ, so that a wrong last token would be seen


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def value_and_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of the loss itself, under "loss", and of every parameter; none is without one."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


# --- classifiers, as transformers has them ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["mha", "gqa", "tied"])
def test_hf_opens_our_classifier(shape: str, tmp_path: Path) -> None:
    model = classifier(shape)
    llama.save(model, tmp_path / "saved")
    oracle = opened(tmp_path / "saved")
    assert type(oracle) is transformers.LlamaForSequenceClassification
    assert differing(parameters(oracle), parameters(model)) == []
    assert oracle.config.id2label == dict(enumerate(NAMES))
    assert oracle.config.label2id == {name: i for i, name in enumerate(NAMES)}
    assert oracle.config.problem_type == "single_label_classification"
    agree(model, oracle)
    again = llama.load(tmp_path / "saved")
    assert again.config == model.config
    assert differing(parameters(again), parameters(model)) == []


@pytest.mark.parametrize("shape", ["mha", "gqa", "tied"])
def test_scores_are_hfs_in_float64(shape: str, tmp_path: Path) -> None:
    llama.save(classifier(shape).double(), tmp_path / "saved")
    with float64_oracle(), torch.no_grad():
        oracle = opened(tmp_path / "saved", dtype=torch.float64, attn_implementation="eager")
        ours = llama.load(tmp_path / "saved", torch.float64)
        assert largest(ours(ragged(), last=LENGTHS - 1), oracle(ragged()).logits) <= FP64_ROUNDING


HF_HEADS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {  # HF's settings, names and problem type that we read
    "two labels, which HF leaves out": ({}, ("LABEL_0", "LABEL_1"), "single_label_classification"),
    "one label": ({"num_labels": 1}, ("LABEL_0",), "regression"),
    "five labels": ({"num_labels": 5}, tuple(f"LABEL_{i}" for i in range(5)), "single_label_classification"),
    "names": ({"id2label": dict(enumerate(NAMES))}, NAMES, "single_label_classification"),
    "multi-label": (
        {"id2label": dict(enumerate(NAMES)), "problem_type": "multi_label_classification"},
        NAMES,
        "multi_label_classification",
    ),
    "regression": ({"num_labels": 3, "problem_type": "regression"}, ("LABEL_0", "LABEL_1", "LABEL_2"), "regression"),
}


@pytest.mark.parametrize("name", HF_HEADS)
def test_we_read_hfs_classifier(name: str, tmp_path: Path) -> None:
    """Where HF leaves the problem type out, null means the same."""
    settings, names, problem = HF_HEADS[name]
    sizes = {key: value for key, value in vars(SHAPES["tied"]).items() if key in transformers.LlamaConfig().to_dict()}
    sizes |= {"pad_token_id": PAD, "problem_type": None, "id2label": None, **settings}
    oracle = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))
    randomise(oracle, seed=3)
    oracle.score.weight.data *= 10
    oracle.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert ("id2label" in found) == (len(names) != 2)
    ours = llama.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"problem_type": None, **found}))
    assert llama.load(tmp_path).config == ours.config
    assert (ours.config.id2label, ours.config.problem_type) == (names, problem)
    assert differing(parameters(ours), parameters(oracle)) == []
    agree(ours, opened(tmp_path))


def test_labels_in_a_language_models_configuration_make_no_classifier(tmp_path: Path) -> None:
    """HF writes `id2label` for any model that has one, a language model that was a classifier once."""
    llama.save(tiny(), tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "config.json").read_text())
    found |= {"id2label": dict(enumerate(NAMES)), "problem_type": "regression"}
    assert config_from_hf(found, "config.json") == SHAPES["gqa"]


def test_a_classifier_looks_at_the_last_column_without_being_told() -> None:
    model, ids = classifier(), token_ids(2, 6)
    assert torch.equal(model(ids), model(ids, last=torch.tensor([5, 5])))
    assert largest(model(ids), model(ids, last=torch.tensor([4, 4]))) > 0.1


# --- losses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_and_all_gradients_are_hfs(problem: str, tmp_path: Path) -> None:
    """HF's is a mean over targets, ours a sum."""
    targets = PROBLEMS[problem].clone()
    if problem == "single_label_classification":
        targets[1] = -100  # HF's convention too
    model = classifier("tied", problem=problem).double()
    llama.save(model, tmp_path / "saved")
    ours = value_and_gradients(model, model(ragged(), targets, last=LENGTHS - 1))
    with float64_oracle():
        oracle = opened(tmp_path / "saved", dtype=torch.float64, attn_implementation="eager")
        mean = oracle(ragged(), labels=targets if targets.dim() == 1 else targets.double()).loss
        theirs = value_and_gradients(oracle, mean * (targets != -100).sum())
    assert ours.keys() == theirs.keys()
    assert ours["loss"] > 1
    assert max(largest(ours[name], theirs[name]) for name in ours) <= SUMMED


def test_one_label_is_hfs_regression(tmp_path: Path) -> None:
    """HF squeezes scores and targets of one label to (B,)."""
    model, targets = classifier(names=("stars",)).double(), torch.tensor([[0.5], [-1], [2], [3]], dtype=torch.float64)
    assert model.config.problem_type == "regression"
    llama.save(model, tmp_path / "saved")
    with float64_oracle(), torch.no_grad():
        oracle = opened(tmp_path / "saved", dtype=torch.float64, attn_implementation="eager")
        loss = oracle(ragged(), labels=targets).loss
    assert largest(model(ragged(), targets, last=LENGTHS - 1), 4 * loss) <= SUMMED


@pytest.mark.parametrize("problem", PROBLEMS)
def test_rows_without_a_target_contribute_nothing(problem: str) -> None:
    model, targets = classifier(problem=problem).double(), PROBLEMS[problem].clone()
    kept = torch.tensor([0, 3])
    without = value_and_gradients(model, model(ragged()[kept], targets[kept], last=LENGTHS[kept] - 1))
    targets[1:3] = NOTHING[problem]
    masked = value_and_gradients(model, model(ragged(), targets, last=LENGTHS - 1))
    assert max(largest(masked[name], without[name]) for name in masked) <= SUMMED


def test_a_single_missing_target_of_a_row_contributes_nothing() -> None:
    """Against the definitions, element by element."""
    scores = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for problem in ("multi_label_classification", "regression"):
        targets = PROBLEMS[problem].double()
        right = scores.sigmoid().log() * targets + (1 - scores.sigmoid()).log() * (1 - targets)
        losses = -right if problem == "multi_label_classification" else (scores - targets) ** 2
        losses[0, 1] = losses[3, 2] = 0
        targets[0, 1] = targets[3, 2] = float("nan")
        assert largest(classification_loss(scores, targets, problem), losses.sum()) <= SUMMED


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_batch_without_targets_gives_zero_and_zero_gradients(problem: str) -> None:
    model = classifier(problem=problem, hidden=HIDDEN)
    targets = torch.full_like(PROBLEMS[problem], NOTHING[problem])
    for name, found in value_and_gradients(model, model(ragged(), targets, last=LENGTHS - 1)).items():
        assert torch.equal(found, torch.zeros_like(found)), name


@pytest.mark.parametrize("problem", PROBLEMS)
def test_scores_of_few_bits_are_widened_before_the_loss(problem: str) -> None:
    scores = 10 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        found = classification_loss(scores.to(dtype), PROBLEMS[problem], problem)
        assert found.dtype == wide
        assert torch.equal(found, classification_loss(scores.to(dtype).to(wide), PROBLEMS[problem], problem))
    model = classifier(problem=problem).bfloat16()
    assert model(ragged(), last=LENGTHS - 1).dtype == torch.bfloat16
    assert model(ragged(), PROBLEMS[problem], last=LENGTHS - 1).dtype == torch.float32


# --- extra fully connected layers ---------------------------------------------------------------------------------------


def plain_layers(head: nn.Module) -> nn.Sequential:
    """A head's extra layers, by PyTorch's own modules."""
    layers: list[nn.Module] = []
    for first, (inputs, outputs) in zip(head.extra, ((64, 8), (8, 6)), strict=True):
        layer = nn.Linear(inputs, outputs).to(first.weight.dtype)
        layer.load_state_dict({"weight": first.weight, "bias": first.bias})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def test_a_classifiers_extra_layers_are_those_of_pytorch() -> None:
    model, ids = classifier(hidden=HIDDEN), ragged()
    pooled = model.model(ids, None, None, None)[torch.arange(4), LENGTHS - 1]
    plain = nn.Sequential(plain_layers(model.score), nn.Linear(6, 3, bias=False))
    plain[1].weight = model.score.weight
    assert torch.equal(model(ids, last=LENGTHS - 1), plain(pooled))
    assert {name: tuple(p.shape) for name, p in model.score.named_parameters()} == {
        **{"weight": (3, 6), "extra.0.weight": (8, 64), "extra.0.bias": (8,)},
        **{"extra.1.weight": (6, 8), "extra.1.bias": (6,)},
    }


def test_a_language_models_extra_layers_stand_beside_a_residual_connection() -> None:
    model, ids = language_model(), token_ids(2, 9)
    hidden = model.model(ids, None, None, None)
    beside = F.linear(plain_layers(model.lm_head)(hidden), model.lm_head.back.weight)
    assert beside.abs().mean() > 1e-3
    assert torch.equal(model(ids), F.linear(hidden + beside, model.lm_head.weight))


@pytest.mark.parametrize("make", [classifier, language_model])
def test_extra_layers_compute_in_the_dtype_of_their_input(make: Callable[..., Llama]) -> None:
    """fp32 master weights under bf16 activations: as if the weights were bf16."""
    model, ids = make(hidden=HIDDEN), ragged()
    model.model.compute_dtype = torch.bfloat16
    found = model(ids)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, model.bfloat16()(ids))


@pytest.mark.parametrize("shape", ["gqa", "tied"])
def test_a_language_model_with_extra_layers_starts_as_the_one_without(shape: str) -> None:
    ids = token_ids(2, 9)
    plain, model = tiny(shape), replace_head(tiny(shape), hidden=HIDDEN)
    assert torch.equal(model(ids), plain(ids))
    assert torch.equal(model(ids, ids), plain(ids, ids))
    model(ids, ids).backward()
    assert model.lm_head.back.weight.grad.abs().max() > 0  # it can leave its start


def test_the_chunked_loss_with_extra_layers_is_that_of_the_models_own_logits() -> None:
    model, ids, labels = language_model("tied").double(), token_ids(3, 9), token_ids(3, 9, seed=1)
    labels[0, :5] = labels[2, 3] = -100
    logits = model(ids)[:, :-1]
    plain = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    wanted = value_and_gradients(model, plain)
    found = value_and_gradients(model, model(ids, labels))
    assert max(largest(found[name], wanted[name]) for name in wanted) <= SUMMED
    assert all(gradient.any() for gradient in wanted.values())


@pytest.mark.parametrize("limit", [10**9, 100_000], ids=["one file", "shards"])
@pytest.mark.parametrize("make", [classifier, language_model])
def test_extra_layers_are_kept_in_a_file_of_their_own(make: Callable[..., Llama], limit: int, tmp_path: Path) -> None:
    """transformers opens the rest, the backbone, with nothing missing and nothing that it does not know."""
    model, ids = make("tied", hidden=HIDDEN), ragged()
    llama.save(model, tmp_path / "saved", max_shard_bytes=limit)
    kept = load_file(tmp_path / "saved" / HEAD_FILE)
    assert differing(kept, {name: p for name, p in parameters(model).items() if not name.startswith("model.")}) == []
    again = llama.load(tmp_path / "saved")
    assert again.config == model.config
    assert differing(parameters(again), parameters(model)) == []
    assert torch.equal(again(ids), model(ids))
    oracle = opened(tmp_path / "saved", transformers.AutoModel)
    assert type(oracle) is transformers.LlamaModel
    assert oracle.config.architectures == ["LlamaModel"]
    assert torch.equal(oracle(ids).last_hidden_state, model.model(ids, None, None, None))


def test_extra_layers_on_a_tied_head_survive_the_round_trip(tmp_path: Path) -> None:
    """`replace_head` unties; a configuration may say otherwise, and then only the layers are in the head's file."""
    model = Llama(dataclasses.replace(SHAPES["tied"], head_hidden=HIDDEN))
    randomise(model)
    llama.save(model, tmp_path / "saved")
    assert not any(name == "lm_head.weight" for name in load_file(tmp_path / "saved" / HEAD_FILE))
    again = llama.load(tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(ragged()), model(ragged()))
    opened(tmp_path / "saved", transformers.AutoModel)


# --- heads that are exchanged -------------------------------------------------------------------------------------------


def test_a_tied_head_gets_a_weight_of_its_own(tmp_path: Path) -> None:
    ids = token_ids(2, 9)
    plain, model = tiny("tied"), replace_head(tiny("tied"))
    assert not model.config.tie_word_embeddings
    assert torch.equal(model(ids), plain(ids))
    with torch.no_grad():
        model.lm_head.weight += 1
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, plain.model.embed_tokens.weight + 1)
    llama.save(model, tmp_path / "saved")
    oracle = opened(tmp_path / "saved", transformers.AutoModelForCausalLM)
    assert type(oracle) is transformers.LlamaForCausalLM
    assert oracle.lm_head.weight is not oracle.model.embed_tokens.weight
    assert torch.equal(oracle(ids).logits, model(ids))


def test_an_exchange_leaves_the_backbone_as_it_is() -> None:
    for labels, hidden in (((), HIDDEN), (NAMES, ()), (NAMES, HIDDEN)):
        plain, model = tiny("gqa").bfloat16(), tiny("gqa").bfloat16()
        assert replace_head(model, labels, hidden=hidden) is model
        assert differing(parameters(model.model), parameters(plain.model)) == []
        assert model.model.config is model.config
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert hasattr(model, "lm_head") == (not labels)
        assert dataclasses.replace(model.config, id2label=(), problem_type=None, head_hidden=(), pad_token_id=None) == (
            plain.config
        )


def test_hf_needs_a_padding_id_which_a_classifier_gets() -> None:
    assert classifier().config.pad_token_id == PAD
    own = Llama(dataclasses.replace(SHAPES["gqa"], pad_token_id=5))
    assert replace_head(own, NAMES).config.pad_token_id == 5
    assert language_model().config.pad_token_id is None


def test_a_classifier_can_become_another_one() -> None:
    model = replace_head(classifier(hidden=HIDDEN), ("x", "y"), "multi_label_classification")
    assert model(ragged()).shape == (4, 2)
    assert {name for name, _ in model.score.named_parameters()} == {"weight"}


@pytest.mark.parametrize(("labels", "hidden"), [(NAMES, ()), (NAMES, HIDDEN), ((), HIDDEN)])
def test_the_draw_depends_on_the_seed_alone(labels: Sequence[str], hidden: Sequence[int]) -> None:
    """Not on the state of the global generator, which is left as it was; nor on the model's dtype, beyond its rounding."""
    drawn = []
    for state, seed, dtype in ((1, 3, torch.float32), (2, 3, torch.float32), (2, 4, torch.float32), (5, 3, torch.bfloat16)):
        model = tiny("gqa").to(dtype)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        drawn.append(parameters(replace_head(model, labels, hidden=hidden, seed=seed).head))
        assert torch.equal(torch.get_rng_state(), before)
    first, other_state, other_seed, rounded = drawn
    assert differing(first, other_state) == []
    kept = set() if labels else {"weight", "back.weight"}  # a language model's head keeps its weight, and starts at zero
    assert set(differing(first, other_seed)) == first.keys() - kept
    assert differing(rounded, {name: tensor.bfloat16() for name, tensor in first.items()}) == []


# --- refusals -----------------------------------------------------------------------------------------------------------


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"labels": NAMES, "problem_type": "multi_label"}, "problem_type is 'multi_label'; expected one of single_label_class"),
    ({"problem_type": "regression"}, "problem_type is 'regression'; expected one of .*, with labels"),
    ({"labels": ("a", "b", "a")}, r"id2label is \('a', 'b', 'a'\); expected names of labels, none of them twice"),
    ({"labels": (0, 1)}, r"id2label is \(0, 1\); expected names of labels"),
    ({"labels": NAMES, "hidden": (0,)}, r"head_hidden is \(0,\); expected positive integers"),
    ({"hidden": (8, 0)}, r"head_hidden is \(8, 0\); expected positive integers"),
    ({"hidden": (8, -1)}, "head_hidden is"),
    ({"hidden": (8.0,)}, "head_hidden is"),
    ({"hidden": (True,)}, "head_hidden is"),
]


@pytest.mark.parametrize(("arguments", "message"), IMPOSSIBLE, ids=[str(row[0]) for row in IMPOSSIBLE])
def test_a_head_that_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    """And the model is what it was."""
    model, ids = tiny("tied"), token_ids(1, 5)
    with pytest.raises(InputError, match=message):
        replace_head(model, **arguments)
    assert model.config == SHAPES["tied"]
    assert torch.equal(model(ids), tiny("tied")(ids))


IN_CONFIG_JSON: list[tuple[dict[str, Any], str]] = [
    ({"id2label": ["a", "b", "c"]}, r"id2label = \['a', 'b', 'c'\]; expected a name for each of the ids 0, 1, ..."),
    ({"id2label": {"0": "a", "2": "b"}}, "id2label = {'0': 'a', '2': 'b'}; expected a name for each of the ids"),
    ({"id2label": {"1": "a", "2": "b"}}, "expected a name for each of the ids"),
    ({"id2label": {"a": 0, "b": 1}}, "expected a name for each of the ids"),
    ({"id2label": {}}, "id2label = {}; expected a name for each of the ids"),
    ({"id2label": None}, "id2label = None; expected a name for each of the ids"),
    ({"id2label": {"0": "a", "1": "a"}}, r"id2label is \('a', 'a'\); expected names of labels, none of them twice"),
    ({"id2label": {"0": 0, "1": 1}}, r"id2label is \(0, 1\); expected names of labels"),
    ({"id2label": {"0": ["a"], "1": None}}, r"id2label is \(\['a'\], None\); expected names of labels"),
    ({"id2label": {"0": "a", "1": "b"}}, r"score.weight has shape \(3, 64\); the configuration says \(2, 64\)"),
    ({"problem_type": "multi"}, "problem_type is 'multi'; expected one of"),
    ({"problem_type": ["regression"]}, r"problem_type is \['regression'\]; expected one of"),
    ({"head_hidden": 8}, "head_hidden = 8; expected a list of widths"),
    ({"head_hidden": [0]}, r"head_hidden is \(0,\); expected positive integers"),
    ({"head_hidden": [8]}, f"{HEAD_FILE} cannot be read: No such file"),
]


@pytest.mark.parametrize(("changes", "message"), IN_CONFIG_JSON, ids=[str(row[0]) for row in IN_CONFIG_JSON])
def test_a_head_that_cannot_be_is_refused_in_a_file(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    llama.save(classifier(), tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**found, **changes}))
    with pytest.raises(InputError, match=message) as refused:
        llama.load(tmp_path / "saved")
    assert str(tmp_path / "saved") in str(refused.value)


def test_what_a_classifier_is_not_asked_for_it_refuses(tmp_path: Path) -> None:
    model = classifier()
    with pytest.raises(InputError, match="this model is a classifier; it has no language model's head to generate with"):
        generate(model, [[1, 2, 3]], 4)
    with pytest.raises(InputError, match="this model is a classifier, which has no language model's head to go on from"):
        replace_head(model)
    assert torch.equal(model(ragged()), classifier()(ragged()))
    for made in (model, language_model()):
        with pytest.raises(InputError, match="Meta's format has no place for this head"):
            llama.save_meta(made, tmp_path / "saved")
    assert files_below(tmp_path) == []


def test_hf_has_no_name_for_what_only_we_have(tmp_path: Path) -> None:
    """A configuration without extra layers names none of ours, so that older readers see nothing new."""
    llama.save(tiny(), tmp_path / "saved")
    assert not {"head_hidden", "id2label", "problem_type"} & json.loads((tmp_path / "saved" / "config.json").read_text()).keys()
    assert config_from_hf({"model_type": "llama", "rms_norm_eps": 1e-5}, "x").id2label == LlamaConfig().id2label == ()
    hf_model(tmp_path / "saved")


def test_a_classifiers_head_shares_nothing_whatever_its_file_says() -> None:
    """HF's classifiers keep the base's tie_word_embeddings, which means nothing to them."""
    config = dataclasses.replace(SHAPES["tied"], id2label=("no", "yes"))
    assert SHAPES["tied"].ties_head
    assert not config.ties_head
    names = [name for name, _ in Llama(config).named_parameters()]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == "score.weight"
