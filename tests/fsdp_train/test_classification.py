"""Texts with labels: which labels there are, what is refused, batches of them, and how well a classifier does."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_train.classification import (
    MULTI,
    REGRESSION,
    SINGLE,
    ClassificationDataset,
    LabelSpace,
    evaluate_classifier,
    load_classification,
)
from fsdp_train.formats import read_records
from fsdp_train.step import NonFiniteError
from fsdp_train.world import World
from llama.errors import InputError
from llama.heads import classification_loss
from tests.fsdp_train.conftest import VOCAB, dataset

BOS = 1
CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
RATIOS = 1e-12  # of counts, in float64
MEAN_LOSS = 1e-6  # relative: sums of some tens of fp32 losses in another order


class Letters:
    """A tokenizer of one token per character, so that lengths are known in advance."""

    vocab_size = VOCAB

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [BOS] * bos + [ord(c) for c in text]


def written(directory: Path, records: Sequence[Any], name: str = "data.jsonl") -> Path:
    (directory / name).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return directory / name


def texts(labels: Sequence[Any]) -> list[dict[str, Any]]:
    """Records of ragged texts with these labels."""
    return [{"text": chr(97 + i % 26) * (1 + i % 4), "label": label} for i, label in enumerate(labels)]


def classified(
    directory: Path, labels: Sequence[Any], number: int | None = None, space: LabelSpace | None = None, length: int = 99
) -> ClassificationDataset:
    """A dataset of texts with these labels."""
    return load_classification(str(written(directory, texts(labels))), Letters(), length, space, number)  # type: ignore[arg-type]


# --- which labels there are ---------------------------------------------------------------------------------------------


INFERRED: dict[str, tuple[list[Any], int | None, tuple[str, ...], str, list[list[float]]]] = {
    # labels, num_labels -> names, problem type, targets
    "texts": (["spam", "ham", "spam"], None, ("ham", "spam"), SINGLE, [[1], [0], [1]]),
    "texts, number given": (["b", "c", "a"], 3, ("a", "b", "c"), SINGLE, [[1], [2], [0]]),
    "texts with upper case and spaces": (["B c", "a", "Ä"], None, ("B c", "a", "Ä"), SINGLE, [[0], [1], [2]]),
    "whole numbers": ([10, 2, 9, 2], None, ("2", "9", "10"), SINGLE, [[2], [0], [1], [0]]),
    "whole numbers in texts": (["10", "2", "9"], None, ("2", "9", "10"), SINGLE, [[2], [0], [1]]),
    "whole numbers below zero": ([1, -1, 0], None, ("-1", "0", "1"), SINGLE, [[2], [0], [1]]),
    "whole numbers, some of which do not occur": ([3, 0], 5, ("0", "1", "2", "3", "4"), SINGLE, [[3], [0]]),
    "one whole number of several": ([1, 1], 2, ("0", "1"), SINGLE, [[1], [1]]),
    "true and false": ([True, False], None, ("false", "true"), SINGLE, [[1], [0]]),
    "true and false, number given": ([True, False], 2, ("false", "true"), SINGLE, [[1], [0]]),
    "lists": ([["b", "a"], [], ["c"]], None, ("a", "b", "c"), MULTI, [[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
    "lists, the first without any": ([[], ["b"], ["a", "a"]], 2, ("a", "b"), MULTI, [[0, 0], [0, 1], [1, 0]]),
    "numbers with fractions": ([0.5, -2.25], None, ("LABEL_0",), REGRESSION, [[0.5], [-2.25]]),
    "numbers with and without": ([0.5, 3, -1], None, ("LABEL_0",), REGRESSION, [[0.5], [3], [-1]]),
    "whole numbers first": ([4, 3.5], None, ("LABEL_0",), REGRESSION, [[4], [3.5]]),
    "numbers with fractions, one label": ([0.5, 3], 1, ("LABEL_0",), REGRESSION, [[0.5], [3]]),
    "whole numbers, one label": ([4, 0, -1], 1, ("LABEL_0",), REGRESSION, [[4], [0], [-1]]),
}


@pytest.mark.parametrize("name", INFERRED)
def test_the_labels_kind_decides_the_problem(name: str, tmp_path: Path) -> None:
    labels, number, names, problem, targets = INFERRED[name]
    data = classified(tmp_path, labels, number)
    assert (data.space.names, data.space.problem_type) == (names, problem)
    assert [sample.labels.tolist() for sample in data.samples] == targets
    assert {sample.labels.dtype for sample in data.samples} == {np.dtype(np.int64 if problem == SINGLE else np.float32)}
    assert [Path(sample.where).name for sample in data.samples] == [f"data.jsonl:{i + 1}" for i in range(len(labels))]


def test_held_out_data_have_the_training_datas_labels(tmp_path: Path) -> None:
    """In its order, whether or not all of them occur; and a base that is a classifier brings its own."""
    space = classified(tmp_path, ["b", "c", "a"]).space
    held_out = classified(tmp_path, ["c", "c"], space=space)
    assert held_out.space == space
    assert [sample.labels.tolist() for sample in held_out.samples] == [[2], [2]]
    reversed_names = LabelSpace(("z", "y", "x"), MULTI)
    unnamed = LabelSpace(("LABEL_0", "LABEL_1"), SINGLE)  # as HF calls them: whole numbers are their ids
    assert [sample.labels.tolist() for sample in classified(tmp_path, [1, "LABEL_0"], space=unnamed).samples] == [[1], [0]]
    assert classified(tmp_path, [["x"], ["y", "z"]], space=reversed_names).samples[1].labels.tolist() == [1, 1, 0]


WRONG_LABELS: dict[str, tuple[list[Any], int | None, str]] = {
    "fewer than said": (["a", "b"], 3, r"--finetune.head.num_labels 3, but the training data has 2 labels: a, b$"),
    "more than said": (["a", "b", "c"], 2, r"--finetune.head.num_labels 2, but the training data has 3 labels: a, b, c$"),
    "true and false for a regression": ([True, False], 1, "num_labels 1, but the training data has 2 labels: false, true"),
    "texts for a regression": (["1.5", "2"], 1, "num_labels 1, but the training data has 2 labels"),
    "a fraction among several": (
        [0.5, 1],
        2,
        r"--finetune.head.num_labels 2, but \S+:1 has the label 0.5 of a regression; expected 1$",
    ),
    "lists of fewer": ([["a"], ["b", "c"]], 4, "num_labels 4, but the training data has 3 labels: a, b, c"),
    "one text": (["a", "a"], None, "the training data has one label only, 'a'; expected at least two"),
    "one whole number": ([1, 1], None, "the training data has one label only, '1'; expected at least two"),
    "one in lists": ([["a"], []], None, "the training data has one label only, 'a'; expected at least two"),
    "one text, one label": (["a", "a"], 1, "the training data has one label only, 'a'; expected at least two"),
    "none in lists": ([[], []], None, "the training data has no labels, only empty lists; expected at least two"),
    "a whole number too large": ([0, 1, 2], 2, r"data.jsonl:3: label '2' is none of 0, 1$"),
    "a whole number below zero": ([0, -1], 2, r"data.jsonl:2: label '-1' is none of 0, 1"),
    "text, then a list": (
        ["a", "b", ["a"]],
        None,
        f"data.jsonl:3: label \\['a'\\] is for {MULTI}; expected one for {SINGLE}",
    ),
    "list, then a text": ([["a"], ["b"], "a"], None, f"data.jsonl:3: label 'a' is for {SINGLE}; expected one for {MULTI}"),
    "text, then a fraction": (["a", 0.5], None, f"data.jsonl:2: label 0.5 is for {REGRESSION}; expected one for {SINGLE}"),
    "fraction, then a text": ([0.5, "a"], None, f"data.jsonl:2: label 'a' is for {SINGLE}; expected one for {REGRESSION}"),
    "fraction, then a truth": (
        [0.5, True],
        None,
        f"data.jsonl:2: label True is for {SINGLE}; expected one for {REGRESSION}",
    ),
    "a fraction beyond fp32": ([0.5, 1e39], None, r"data.jsonl:2: label 1e\+39 is beyond the numbers of 32 bits"),
    "a whole number beyond fp32": ([0.5, -(10**400)], None, r"data.jsonl:2: label -1000000000000000000 is beyond the numbers"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels_are_refused_with_their_place(name: str, tmp_path: Path) -> None:
    labels, number, message = WRONG_LABELS[name]
    with pytest.raises(InputError, match=message):
        classified(tmp_path, labels, number)


def test_an_unknown_label_in_held_out_data_is_named_with_the_nearest(tmp_path: Path) -> None:
    space = LabelSpace(("negative", "neutral", "positive"), SINGLE)
    with pytest.raises(InputError) as refused:
        classified(tmp_path, ["positive", "neutral", "postive"], space=space)
    assert str(refused.value) == (
        f"{tmp_path}/data.jsonl:3: label 'postive' is none of negative, neutral, positive - did you mean 'positive'?"
    )
    with pytest.raises(InputError, match=r"data.jsonl:2: label 'x' is none of negative, neutral, positive$"):
        classified(tmp_path, [["neutral"], ["positive", "x"]], space=LabelSpace(space.names, MULTI))


def test_a_regression_of_several_numbers_is_not_trained_on_one(tmp_path: Path) -> None:
    """As a base, HF has such heads; one number would be compared with each of them, and nothing said."""
    with pytest.raises(InputError, match=r"data.jsonl:1: label 0.5 is one number, but the base is a regression of 3"):
        classified(tmp_path, [0.5, 1.5], space=LabelSpace(("x", "y", "z"), REGRESSION))


# --- records ------------------------------------------------------------------------------------------------------------


GOOD = '{"text": "a", "label": "x"}\n'
RECORDS: list[tuple[str, str]] = [  # the second line, what is said after the file's name
    ('{"text": 3, "label": "x"}', ":2: 'text' is a number; expected text"),
    ('{"text": null, "label": "x"}', ":2: 'text' is null; expected text"),
    ('{"text": ["a"], "label": "x"}', ":2: 'text' is a list; expected text"),
    ('{"text": "\\ud83e", "label": "x"}', ":2: 'text' holds half a character (\\ud83e)"),
    ('{"text": "a", "label": null}', ":2: 'label' is null; expected text, a number, or a list of texts"),
    ('{"text": "a", "label": {"x": 1}}', ":2: 'label' is an object; expected text, a number, or a list of texts"),
    ('{"text": "a", "label": [1, 2]}', ":2: 'label' is a list of more than texts; expected the names of labels"),
    ('{"text": "a", "label": ["x", null]}', ":2: 'label' is a list of more than texts; expected the names of labels"),
    ('{"text": "a", "label": [["x"]]}', ":2: 'label' is a list of more than texts; expected the names of labels"),
    ('{"text": "a", "label": NaN}', ":2: 'label' is nan; expected a finite number"),
    ('{"text": "a", "label": -Infinity}', ":2: 'label' is -inf; expected a finite number"),
    ('{"text": "a", "label": 1e999}', ":2: 'label' is inf; expected a finite number"),
    ('{"text": "a", "label": "\\udc00"}', ":2: 'label' holds half a character (\\udc00)"),
    ('{"text": "a", "label": ["x", "\\udc00"]}', ":2: 'label' holds half a character (\\udc00)"),
    ('{"text": "a", "lable": "x"}', ":2: no 'label' (format classification); found text, lable - did you mean 'lable'?"),
    ('{"txt": "a", "label": "x"}', ":2: no 'text' (format classification); found txt, label - did you mean 'txt'?"),
    ("{}", ":2: no 'text' (format classification); found no keys"),
]


@pytest.mark.parametrize("format", ["auto", "classification"])
@pytest.mark.parametrize(("line", "message"), RECORDS, ids=[row[0] for row in RECORDS])
def test_a_wrong_record_is_refused_with_its_place(line: str, message: str, format: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + line)
    with pytest.raises(InputError) as refused:
        read_records(path, format)
    assert str(refused.value).startswith(f"{path}{message}")


@pytest.mark.parametrize("label", ['"x"', "1", "-2.5", "true", "[]", '["x", "y"]', '""'])
def test_every_kind_of_label_is_read_as_it_stands(label: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(f'[{{"id": 7, "label": {label}, "text": ""}}]')
    format, (record,) = read_records(tmp_path / "data.json", "auto")
    assert (format, record.where) == ("classification", f"{tmp_path}/data.json[0]")
    assert record.fields["label"] == json.loads(label)
    assert type(record.fields["label"]) is type(json.loads(label))


def test_a_language_model_does_not_guess_what_to_do_with_labels(tmp_path: Path) -> None:
    """The texts alone would be learned, and the labels lost."""
    with pytest.raises(InputError) as refused:
        dataset(tmp_path, texts(["a", "b"]), Letters())
    assert str(refused.value) == (
        f"{tmp_path}/data.jsonl has labels (format classification), which --finetune.head.kind classification learns;"
        " --data.format text learns the text itself"
    )
    assert dataset(tmp_path, texts(["a", "b"]), Letters(), format="text").format == "text"


def test_texts_need_a_tokenizer_and_labels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is text, and the model directory has no tokenizer\.model; give --model.tokenizer"):
        load_classification(str(written(tmp_path, texts(["a", "b"]))), None, 99, None, None)
    (tmp_path / "story.txt").write_text("Once upon a time")
    with pytest.raises(InputError, match=r"story.txt:1:1: not JSON"):
        load_classification(str(tmp_path / "story.txt"), Letters(), 99, None, None)  # type: ignore[arg-type]


# --- what is told of them -----------------------------------------------------------------------------------------------


def test_what_is_cut_is_counted_with_its_place(tmp_path: Path) -> None:
    """At 4 tokens: BOS and three letters; the classifier then looks at the third."""
    data = classified(tmp_path, ["x", "y", "x", "y", "x", "x", "x", "x"], length=4)  # of 1, 2, 3, 4, 1, 2, 3, 4 letters
    assert [len(sample.ids) for sample in data.samples] == [2, 3, 4, 4, 2, 3, 4, 4]
    assert [sample.prompt for sample in data.samples] == [2, 3, 4, 4, 2, 3, 4, 4]
    assert data.samples[3].ids.tolist() == [BOS, *map(ord, "ddd")]
    assert [Path(place).name for place in data.truncated] == ["data.jsonl:4", "data.jsonl:8"]
    report = data.report()
    assert "format classification, 8 samples, 26 tokens, 8 of them learned" in report
    assert "2 samples were cut at --data.max_length: :4, :8" in report


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["spam", "ham", "spam", "spam"], f"{SINGLE}: ham 1, spam 3"),
        ([["a", "b"], ["b"], [], ["b", "c"]], f"{MULTI}: a 1, b 3, c 1"),
        ([1.0, 2, 4, 5], f"{REGRESSION}: mean 3, standard deviation 1.581"),
        ([i % 14 for i in range(1400)], f"{SINGLE}: " + ", ".join(f"{i} 100" for i in range(12)) + " and 2 more"),
        (["a"] * 1999 + ["b"], f"{SINGLE}: a 1,999, b 1"),
    ],
)
def test_the_report_shows_the_distribution(labels: list[Any], told: str, tmp_path: Path) -> None:
    assert classified(tmp_path, labels).report().split("\n")[-1] == f"  {told}"


def test_a_label_that_does_not_occur_is_shown_too(tmp_path: Path) -> None:
    space = LabelSpace(("a", "b", "c"), SINGLE)
    assert classified(tmp_path, ["c", "a"], space=space).report().endswith(f"{SINGLE}: a 1, b 0, c 1")


def test_scores_and_references_by_name(tmp_path: Path) -> None:
    scores = torch.tensor([[0.1, -3, 0.2], [-1, -2, -3], [4, 5, 0.001]])
    single = classified(tmp_path, ["b", "c", "a"])
    assert single.named(scores) == ["c", "a", "b"]
    assert [single.reference(i) for i in range(3)] == ["b", "c", "a"]
    multi = classified(tmp_path, [["b", "a"], [], ["c"]])
    assert multi.named(scores) == ["a, c", "none", "a, b, c"]
    assert [multi.reference(i) for i in range(3)] == ["a, b", "none", "c"]
    regression = classified(tmp_path, [0.5, 3, -1e-3])
    assert regression.named(scores[:, :1]) == ["0.1", "-1", "4"]
    assert [regression.reference(i) for i in range(3)] == ["0.5", "3", "-0.001"]


def test_held_out_samples_keep_their_labels_meaning(tmp_path: Path) -> None:
    data = classified(tmp_path, ["b", "c", "a", "b", "b"])
    rest, held = data.without(2, seed=0)
    assert isinstance(rest, ClassificationDataset)
    assert isinstance(held, ClassificationDataset)
    assert rest.space == held.space == data.space
    assert sorted(sample.where for sample in (*rest.samples, *held.samples)) == [sample.where for sample in data.samples]


# --- batches ------------------------------------------------------------------------------------------------------------


BATCHES: dict[str, tuple[list[Any], Tensor]] = {
    SINGLE: (["b", "c", "a", "b"], torch.tensor([1, 2, 0, 1])),
    MULTI: ([["a"], ["b", "c"], [], ["a", "c"]], torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]])),
    REGRESSION: ([0.5, 1, -2, 3e-3], torch.tensor([[0.5], [1], [-2], [3e-3]])),
}


@pytest.mark.parametrize("problem", BATCHES)
def test_a_batch_is_padded_on_the_right_and_knows_the_last_tokens(problem: str, tmp_path: Path) -> None:
    labels, wanted = BATCHES[problem]
    data = classified(tmp_path, labels)  # of 1, 2, 3, 4 letters, with BOS in front
    batch = data.batch([2, 0, 3], CPU)
    a, c, d = map(ord, "acd")
    rows = [[BOS, c, c, c, 0], [BOS, a, 0, 0, 0], [BOS, d, d, d, d]]
    assert batch.inputs.keys() == {"input_ids", "last"}
    assert torch.equal(batch.inputs["input_ids"], torch.tensor(rows))
    assert torch.equal(batch.inputs["last"], torch.tensor([3, 1, 4]))
    assert batch.inputs["input_ids"].dtype == batch.inputs["last"].dtype == torch.int64
    assert torch.equal(batch.labels, wanted[[2, 0, 3]])
    assert batch.labels.dtype == wanted.dtype
    assert batch.tokens == 4 + 2 + 5
    assert batch.targets == wanted[[2, 0, 3]].numel()
    assert [Path(place).name for place in batch.where] == ["data.jsonl:3", "data.jsonl:1", "data.jsonl:4"]


@pytest.mark.parametrize("problem", BATCHES)
def test_an_empty_batch_contributes_nothing(problem: str, tmp_path: Path) -> None:
    """It has a row all the same: its process takes part in every collective."""
    data = classified(tmp_path, BATCHES[problem][0])
    batch, width = data.batch([], CPU), len(data.space.names)
    assert batch.inputs["input_ids"].shape == (1, 1)
    assert batch.inputs["last"].tolist() == [0]
    assert (batch.tokens, batch.targets, batch.where) == (0, 0, [])
    full = data.batch([0], CPU)
    assert batch.labels.shape == full.labels.shape
    assert batch.labels.dtype == full.labels.dtype
    scores = torch.randn(1, width, requires_grad=True)
    loss = classification_loss(scores, batch.labels, problem)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(scores.grad, torch.zeros(1, width))


# --- how well a classifier does -----------------------------------------------------------------------------------------


class Answers(nn.Module):
    """A classifier that knows its scores (N, K) by heart: text number i begins with the token i."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores
        self.seen: list[int] = []

    def forward(self, input_ids: Tensor, last: Tensor) -> Tensor:
        assert not self.training
        self.seen.append(len(input_ids))
        return self.scores[input_ids[:, 0]]


def numbered(labels: Sequence[Any], space: LabelSpace, directory: Path) -> ClassificationDataset:
    data = classified(directory, labels, space=space)
    for index, sample in enumerate(data.samples):
        sample.ids[0] = index
    return data


def by_hand(given: list[set[str]], right: list[set[str]], names: Sequence[str]) -> tuple[float, float]:
    """(accuracy, macro-F1) by precision and recall of each label, over sets of names."""
    scores = []
    for name in names:
        predicted = [i for i, answer in enumerate(given) if name in answer]
        actual = [i for i, truth in enumerate(right) if name in truth]
        both = [i for i in predicted if i in actual]
        if not predicted and not actual:
            continue
        if not both:
            scores.append(0.0)
            continue
        precision, recall = len(both) / len(predicted), len(both) / len(actual)
        scores.append(2 / (1 / precision + 1 / recall))
    correct = sum(answer == truth for answer, truth in zip(given, right, strict=True))
    return correct / len(right), sum(scores) / len(scores) if scores else 0.0


def drawn(problem: str, count: int = 23, labels: int = 6, used: int = 4) -> tuple[list[Any], Tensor]:
    """Random labels and scores; the label before the last is never right and the last one neither right nor given."""
    rng = random.Random(labels)
    scores = torch.randn(count, labels, generator=torch.Generator().manual_seed(0))
    scores[:, -1] = -9
    if problem == SINGLE:
        return [f"L{rng.randrange(used)}" for _ in range(count)], scores
    right = [[f"L{i}" for i in range(used) if rng.random() < 0.4] for _ in range(count)]
    for index in range(0, count, 3):  # some rows are exactly right, which chance gives rarely
        scores[index] = torch.tensor([3.0 if f"L{i}" in right[index] else -3.0 for i in range(labels)])
    return right, scores


NAMES = tuple(f"L{i}" for i in range(6))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_accuracy_and_f1_are_those_counted_by_hand(problem: str, batch_size: int, tmp_path: Path) -> None:
    labels, scores = drawn(problem)
    data = numbered(labels, LabelSpace(NAMES, problem), tmp_path)
    if problem == SINGLE:
        right = [{label} for label in labels]
        given = [{NAMES[max(range(6), key=row.__getitem__)]} for row in scores.tolist()]
        loss = F.cross_entropy(scores, torch.tensor([NAMES.index(label) for label in labels]))
    else:
        right = [set(label) for label in labels]
        given = [{NAMES[i] for i in range(6) if 1 / (1 + math.exp(-row[i])) > 0.5} for row in scores.tolist()]
        targets = torch.tensor([[float(name in label) for name in NAMES] for label in labels])
        loss = F.binary_cross_entropy_with_logits(scores, targets)
    accuracy, f1 = by_hand(given, right, NAMES)
    model = Answers(scores)
    found = evaluate_classifier(model.train(), data, batch_size, ALONE)
    assert found.keys() == {"eval_loss", "accuracy", "macro_f1"}
    assert 0.1 < accuracy < 0.9
    assert 0.1 < f1 < 0.9
    assert found["accuracy"] == pytest.approx(accuracy, abs=RATIOS)
    assert found["macro_f1"] == pytest.approx(f1, abs=RATIOS)
    assert found["eval_loss"] == pytest.approx(loss.item(), rel=MEAN_LOSS)
    assert model.training  # as it was
    assert max(model.seen) <= batch_size
    assert sum(model.seen) == len(labels)


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_accuracy_and_f1_are_scikit_learns(problem: str, tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels, scores = drawn(problem)
    data = numbered(labels, LabelSpace(NAMES, problem), tmp_path)
    found = evaluate_classifier(Answers(scores), data, 3, ALONE)
    right = np.array([[name in label for name in NAMES] for label in ([x] if problem == SINGLE else x for x in labels)])
    given = (scores > 0).numpy()
    if problem == SINGLE:
        right, given = right.argmax(1), scores.argmax(1).numpy()
    f1 = metrics.f1_score(right, given, average="macro", zero_division=np.nan)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(right, given), abs=RATIOS)
    assert found["macro_f1"] == pytest.approx(f1, abs=RATIOS)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_regression_has_a_loss_only(batch_size: int, tmp_path: Path) -> None:
    labels, scores = [0.5, 1, -2, 3e-3, 7], torch.tensor([[0.0], [1], [2], [3], [4]])
    data = numbered(labels, LabelSpace(("stars",), REGRESSION), tmp_path)
    found = evaluate_classifier(Answers(scores), data, batch_size, ALONE)
    assert found == {"eval_loss": pytest.approx((0.25 + 0 + 16 + 2.997**2 + 9) / 5, rel=MEAN_LOSS)}


EXTREMES: list[tuple[str, list[Any], Callable[[Tensor], Tensor], float, float]] = [
    ("all right", ["a", "b", "c"], lambda right: right, 1.0, 1.0),
    ("all wrong", ["a", "b", "c"], lambda right: right.roll(1, 1), 0.0, 0.0),
    ("always the same", ["a", "a", "a", "b"], lambda right: torch.tensor([[1.0, 0, 0]] * 4), 0.75, (6 / 7 + 0) / 2),
    ("nothing to find, and nothing found", [[], []], lambda right: right - 1, 1.0, 0.0),
]


@pytest.mark.parametrize(("name", "labels", "answer", "accuracy", "f1"), EXTREMES, ids=[row[0] for row in EXTREMES])
def test_accuracy_and_f1_at_the_extremes(
    name: str, labels: list[Any], answer: Callable[[Tensor], Tensor], accuracy: float, f1: float, tmp_path: Path
) -> None:
    right = torch.tensor([[float(letter in label) for letter in "abc"] for label in labels])
    space = LabelSpace(("a", "b", "c"), MULTI if isinstance(labels[0], list) else SINGLE)
    found = evaluate_classifier(Answers(answer(right)), numbered(labels, space, tmp_path), 2, ALONE)
    assert found["accuracy"] == accuracy
    assert found["macro_f1"] == pytest.approx(f1, abs=RATIOS)


def test_an_evaluation_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    data = numbered(["a", "b"], LabelSpace(("a", "b"), SINGLE), tmp_path)
    with pytest.raises(NonFiniteError, match=r"the evaluation loss on \S+data.jsonl is nan"):
        evaluate_classifier(Answers(torch.tensor([[0.0, 1], [float("nan"), 0]])), data, 1, ALONE)
