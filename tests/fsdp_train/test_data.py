"""Samples of a file: what is cut and left out, the windows of plain text, tokens as they are, ids that the model has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama.errors import InputError
from tests.fsdp_train.conftest import VOCAB, dataset

BOS, EOS, IGNORE = 1, 2, -100


class Letters:
    """A tokenizer of one token per character, so that lengths are known in advance."""

    vocab_size, bos_id, eos_id = VOCAB, BOS, EOS

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [BOS] * bos + [ord(c) for c in text] + [EOS] * eos


def masked(ids: list[int], prompt: int) -> list[int]:
    return [IGNORE] * prompt + ids[prompt:]


# --- what is cut, what is left out --------------------------------------------------------------------------------------


def test_cut_and_left_out_are_counted_with_their_places(tmp_path: Path) -> None:
    """At 8 tokens: BOS + prompt + response + EOS."""
    lengths = [(3, 3), (3, 4), (6, 9), (7, 1), (8, 8), (1, 1)]  # fits exactly, loses EOS, keeps one, none, none, fits
    records = [{"prompt": "p" * a, "completion": "r" * b} for a, b in lengths]
    data = dataset(tmp_path, records, Letters(), length=8)
    whole = [[BOS, *[ord("p")] * a, *[ord("r")] * b, EOS] for a, b in lengths]
    kept = [0, 1, 2, 5]
    assert [s.ids.tolist() for s in data.samples] == [whole[i][:8] for i in kept]
    assert [s.labels.tolist() for s in data.samples] == [masked(whole[i][:8], 1 + lengths[i][0]) for i in kept]
    assert [Path(place).name for place in data.truncated] == [f"data.jsonl:{line}" for line in (2, 3, 4, 5)]
    assert [Path(place).name for place in data.dropped] == [f"data.jsonl:{line}" for line in (4, 5)]
    report = data.report()
    assert "format completion, 4 samples, 28 tokens, 11 of them learned" in report
    assert "4 samples were cut at --data.max_length: :2, :3, :4 and 1 more" in report
    assert "2 samples left out, nothing to learn in them: :4, :5" in report


def test_nothing_to_learn_in_the_whole_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of its 2 samples has anything to learn; 2 were cut at 8 tokens, before their"):
        dataset(tmp_path, [{"prompt": "p" * 9, "completion": "r"}, {"prompt": "p" * 8, "completion": "r"}], Letters(), length=8)
    only_the_first = {"input_ids": [5, 6, 7], "labels": [5, -100, -100]}  # the first token is never predicted
    for record in ({"input_ids": [5, 6], "labels": [-100, -100]}, {"input_ids": []}, {"input_ids": [5]}, only_the_first):
        with pytest.raises(InputError, match="none of its 1 samples has anything to learn; every label is masked"):
            dataset(tmp_path, [record])


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is text \(format completion\), and the model directory has no tokenizer.model"):
        dataset(tmp_path, [{"prompt": "a", "completion": "b"}])


# --- plain text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 4, 5, 7, 100])
@pytest.mark.parametrize("characters", range(12))
def test_windows_predict_every_token_once(characters: int, length: int, tmp_path: Path) -> None:
    """n ids with BOS and EOS make ceil((n - 1) / (length - 1)) windows; n - 1 tokens are predicted, in order."""
    text = "abcdefghijklm"[:characters]
    ids = [BOS, *map(ord, text), EOS]
    data = dataset(tmp_path, [{"text": text}], Letters(), length=length)
    windows = [s.ids.tolist() for s in data.samples]
    assert len(windows) == -(-(len(ids) - 1) // (length - 1))
    assert max(map(len, windows)) <= length
    assert [token for window in windows for token in window[1:]] == ids[1:]
    assert [window[0] for window in windows] == [ids[0], *(window[-1] for window in windows[:-1])]
    assert all((s.labels == s.ids).all() and s.prompt == 1 for s in data.samples)
    assert not data.truncated
    assert not data.dropped


def test_several_texts_do_not_run_into_each_other(tmp_path: Path) -> None:
    data = dataset(tmp_path, [{"text": "abc"}, {"text": "de"}], Letters(), length=4)
    assert [s.ids.tolist() for s in data.samples] == [[BOS, 97, 98, 99], [99, EOS], [BOS, 100, 101, EOS]]
    assert [s.where.partition(".jsonl")[2] for s in data.samples] == [":1[token 0]", ":1[token 3]", ":2[token 0]"]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    data = dataset(tmp_path, "ab\ncd", Letters(), length=5)
    assert [s.ids.tolist() for s in data.samples] == [[BOS, 97, 98, 10, 99], [99, 100, EOS]]


def test_a_context_of_one_token_has_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of its 4 samples has anything to learn"):
        dataset(tmp_path, "abc", Letters(), length=1)


# --- tokens -------------------------------------------------------------------------------------------------------------


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    records = [
        {"input_ids": [5, 6, 7]},
        {"input_ids": [5, 6, 7], "labels": None},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 9, 0]},
        {"input_ids": [5, 6, 7], "labels": [5, -100, 7]},
        {"input_ids": [VOCAB - 1, 0]},
    ]
    data = dataset(tmp_path, records)
    assert data.format == "tokens"
    assert [s.ids.tolist() for s in data.samples] == [record["input_ids"] for record in records]
    assert [s.labels.tolist() for s in data.samples] == [record.get("labels") or record["input_ids"] for record in records]
    assert [s.prompt for s in data.samples] == [1, 1, 2, 2, 1]  # what generation would be given ends at the first label


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [5, VOCAB]}, f"token id {VOCAB} is outside the model's vocabulary 0..{VOCAB - 1}"),
        ({"input_ids": [5, -1, 6]}, "token id -1 is outside"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, VOCAB]}, f"token id {VOCAB} is outside"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, -1]}, "token id -1 is outside"),
        ({"input_ids": [5, 2**31]}, "a token id does not fit 32 bits"),
        ({"input_ids": [5, 2**32 + 5]}, "a token id does not fit 32 bits"),
        ({"input_ids": [5, 6], "labels": [5]}, "2 input_ids but 1 labels"),
        ({"input_ids": [5, 6], "labels": []}, "2 input_ids but 0 labels"),
    ],
)
def test_ids_that_the_model_has_not_are_refused_with_their_place(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        dataset(tmp_path, [{"input_ids": [5, 6]}, record])
    assert str(error.value).startswith(f"{tmp_path / 'data.jsonl'}:2: ")
    assert message in str(error.value)
