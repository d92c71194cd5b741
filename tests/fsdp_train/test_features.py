"""A frozen backbone's features: computed once, by any number of processes, kept, and found again while they still hold."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama
from fsdp_train import features
from fsdp_train.classification import ClassificationDataset, load_classification
from fsdp_train.features import FeatureDataset, HeadOnly, backbone_digest, cache_directory, file_of, with_features
from fsdp_train.main import main
from fsdp_train.world import World
from llama import Llama, Tokenizer, replace_head
from llama.errors import InputError
from llama.model import LlamaModel
from tests.fsdp_train.conftest import CONTEXT
from tests.fsdp_train.curves import run_on
from tests.llama.common import files_below, full_disk
from tests.oracle import largest

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, CPU)
LOSSES = 1e-5  # fp32: batches of other shapes take other kernels, and the difference goes through some steps of training
FEATURES = 1e-5  # fp32, features up to 10 in size: a batch of another shape takes other kernels
SCORES = 1e-5  # fp32, scores below 1: HF multiplies all positions by the head, we the last one
LABELS = ("no", "so so", "yes")
TEXTS, HELD_OUT, STEPS = 13, 5, 6  # with 4 samples a step, the last step of an epoch has one, and a second process none


def records(count: int = TEXTS, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged texts, with labels that have nothing to do with them."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices("one two thre", k=rng.randint(1, 80))) for _ in range(count)]
    return [{"text": text, "label": LABELS[i % 3]} for i, text in enumerate(texts)]


def written(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, found)))
    return path


@pytest.fixture(scope="module")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("texts") / "texts.jsonl", records())


@pytest.fixture(scope="module")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("texts") / "held_out.jsonl", records(HELD_OUT, seed=1))


@pytest.fixture(scope="module")
def first(model_dir: Path, texts_file: Path, held_out_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, `out`, and the features that it has computed, `cache`; for reading only."""
    path = tmp_path_factory.mktemp("first")
    main(flags(model_dir, texts_file, path / "out", path / "cache", data__eval_path=held_out_file))
    return path


class Calls(list[int]):
    """Rows of each call of a backbone."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found, forward = Calls(), LlamaModel.forward

    def counted(self: LlamaModel, input_ids: Tensor, *arguments: Any) -> Tensor:
        found.append(len(input_ids))
        return forward(self, input_ids, *arguments)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return found


def flags(model: Path, data: Path, out: Path, cache: object, **more: object) -> list[str]:
    """Of a run; `more` by setting, dots written as two underscores."""
    settings = {
        **{"model.path": model, "data.path": data, "train.output_dir": out, "finetune.head.feature_cache": cache},
        **{"finetune.method": "head", "finetune.head.kind": "classification", "parallel.precision": "fp32"},
        **{"train.max_steps": STEPS, "train.batch_size": 4, "optim.lr": 1e-2, "log.every": 1, "train.samples": 0},
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def rows(out: Path) -> list[dict[str, float]]:
    """What a run measured, without times."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_bytes")} for row in found]


def assert_close(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        for name, value in one.items():
            assert value == pytest.approx(other[name], abs=LOSSES, rel=LOSSES), (one["step"], name)


def dataset(path: Path, tokenizer_dir: Path, length: int = CONTEXT) -> ClassificationDataset:
    return load_classification(str(path), Tokenizer(tokenizer_dir), length, None, None)


def kept(data: ClassificationDataset, path: Path, model: Llama) -> FeatureDataset:
    return with_features(data, path, (64, torch.float32), lambda: model.model, ALONE, lambda text: None)


# --- a run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", ["", "8,6"], ids=["a linear head", "extra layers"])
def test_a_run_on_features_is_the_run_on_texts(
    hidden: str, first: Path, model_dir: Path, texts_file: Path, held_out_file: Path, tmp_path: Path, calls: Calls
) -> None:
    """Without the cache and with it; what is kept at the end is what transformers reads."""
    more = {"data__eval_path": held_out_file, "finetune__head__hidden": hidden}
    main(flags(model_dir, texts_file, tmp_path / "texts", "none", **more))
    on_texts = rows(tmp_path / "texts")
    assert [row["step"] for row in on_texts] == [0, *range(1, STEPS + 1), STEPS]
    assert {"eval_loss", "accuracy", "macro_f1"} <= on_texts[-1].keys()
    assert abs(on_texts[-1]["eval_loss"] - on_texts[0]["eval_loss"]) > 100 * LOSSES  # it learns something
    assert calls
    calls.clear()
    main(flags(model_dir, texts_file, tmp_path / "features", shutil.copytree(first / "cache", tmp_path / "cache"), **more))
    assert calls == []
    assert_close(rows(tmp_path / "features"), on_texts)
    if not hidden:
        assert rows(tmp_path / "features") == rows(first / "out")  # which computed them

    model, base = llama.load(tmp_path / "features" / "model"), load_file(model_dir / "model.safetensors")
    assert model.config.id2label == LABELS
    assert all(torch.equal(p, base[f"model.{name}"]) for name, p in model.model.named_parameters())
    kind = transformers.AutoModel if hidden else transformers.AutoModelForSequenceClassification
    oracle, report = kind.from_pretrained(tmp_path / "features" / "model", output_loading_info=True)
    assert {key: list(value) for key, value in report.items() if value} == {}
    lengths = torch.tensor([40, 3, 17])
    ids = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    ids = ids.masked_fill(torch.arange(40) >= lengths[:, None], 0)  # HF finds the last token by the padding's id
    with torch.no_grad():
        if hidden:
            last = oracle(ids).last_hidden_state[torch.arange(3), lengths - 1]
            theirs = model.score(last[:, None])
        else:
            assert oracle.config.id2label == dict(enumerate(LABELS))
            theirs = oracle(ids).logits
        assert largest(model(ids, last=lengths - 1), theirs) <= SCORES


def test_two_processes_are_one(first: Path, model_dir: Path, texts_file: Path, held_out_file: Path, tmp_path: Path) -> None:
    """Their features too, which the second process helps to compute with an empty batch."""
    more = {"data__eval_path": held_out_file, "train__batch_size": 2, "parallel__activation_checkpointing": "full"}
    run_on(2, [flags(model_dir, texts_file, tmp_path / "out", tmp_path / "cache", **more)], tmp_path)
    assert_close(rows(tmp_path / "out"), rows(first / "out"))
    one, two = (load_file(path / "out" / "model" / "model.safetensors") for path in (first, tmp_path))
    assert largest(one["score.weight"], two["score.weight"]) <= LOSSES
    names = [sorted(file.name for file in (path / "cache").iterdir()) for path in (first, tmp_path)]
    assert names[0] == names[1]
    for name in names[0]:
        one, two = (load_file(path / "cache" / name) for path in (first, tmp_path))
        assert largest(one["features"], two["features"]) <= FEATURES


class Silent(World):
    """A process of several that hears nothing of the others."""

    def add(self, values: Tensor) -> None:
        pass


@pytest.mark.parametrize("processes", [2, 3])
def test_the_batches_are_shared_between_processes(
    processes: int, model_dir: Path, tokenizer_dir: Path, texts_file: Path, tmp_path: Path, calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each text is one process's, the others have zeros for it; all make the same number of calls."""
    monkeypatch.setattr(features, "TOKENS", 150)
    data, backbone = dataset(texts_file, tokenizer_dir), llama.load(model_dir).model
    alone = kept(data, tmp_path / "x.safetensors", llama.load(model_dir)).features
    batches, parts = len(calls), []
    assert batches % processes
    for rank in range(processes):
        calls.clear()
        world = Silent(rank, processes, rank, processes, CPU)
        parts.append(features._computed(backbone, data, (TEXTS, 64), torch.float32, world, lambda text: None))
        assert len(calls) == -(-batches // processes)
    assert torch.equal(sum(parts), alone)  # type: ignore[arg-type]
    owned = torch.stack([part.abs().amax(1) > 0 for part in parts])
    assert torch.equal(owned.sum(0), torch.ones(TEXTS, dtype=torch.long))
    assert owned.any(1).all()


# --- what is computed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 150, 8192], ids=["one text", "some texts", "all texts"])
def test_features_are_hfs_hidden_states_at_the_last_token(
    tokens: int, model_dir: Path, tokenizer_dir: Path, texts_file: Path, tmp_path: Path, calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """HF sees each text by itself; we in batches of at most so many tokens, in the order of their lengths."""
    monkeypatch.setattr(features, "TOKENS", tokens)
    data = dataset(texts_file, tokenizer_dir, length=32)
    assert 0 < len(data.truncated) < TEXTS  # the last token is then the last that is left
    found = kept(data, tmp_path / "x.safetensors", llama.load(model_dir)).features
    oracle = transformers.AutoModel.from_pretrained(model_dir, attn_implementation="sdpa")
    with torch.no_grad():
        for row, sample in zip(found, data.samples, strict=True):
            ids = torch.from_numpy(sample.ids).long()[None]
            assert largest(row, oracle(ids).last_hidden_state[0, -1]) <= FEATURES
    assert 1 < found.abs().max() < 10
    assert sum(calls) == TEXTS
    assert calls[0] == {1: 1, 150: 150 // 32, 8192: TEXTS}[tokens]
    assert torch.equal(load_file(tmp_path / "x.safetensors")["features"], found)


def test_features_are_of_the_computations_dtype(model_dir: Path, texts_file: Path, tmp_path: Path) -> None:
    main(flags(model_dir, texts_file, tmp_path / "out", tmp_path / "cache", parallel__precision="bf16", train__max_steps=1))
    (file,) = (tmp_path / "cache").iterdir()
    assert load_file(file)["features"].dtype == torch.bfloat16


@pytest.mark.parametrize("labels", [["a", "b"], [["a"], ["b", "c"]], [0.5, 2]], ids=["single", "multi", "regression"])
def test_a_batch_of_features_has_the_labels_of_the_texts(
    labels: list[Any], model_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    found = [{"text": "one" * (i + 1), "label": label} for i, label in enumerate(labels * 2)]
    data = dataset(written(tmp_path / "data.jsonl", found), tokenizer_dir)
    model = replace_head(llama.load(model_dir), data.space.names, data.space.problem_type, (5,))
    featured = kept(data, tmp_path / "x.safetensors", model)
    assert featured.report() == data.report()
    texts, batch = data.batch([3, 0], CPU), featured.batch([3, 0], CPU)
    assert torch.equal(batch.inputs["hidden"], featured.features[[3, 0]][:, None])
    assert torch.equal(batch.labels, texts.labels)
    assert (batch.tokens, batch.targets, batch.where) == (texts.tokens, texts.targets, texts.where)
    head = HeadOnly(model.score)
    assert [name for name, _ in head.named_parameters()] == [n for n, _ in model.named_parameters() if "score" in n]
    assert largest(head(**batch.inputs), model(**texts.inputs)) <= SCORES
    # A process without samples takes part, and contributes nothing.
    batch, texts = featured.batch([], CPU), data.batch([], CPU)
    assert batch.inputs["hidden"].shape == (1, 1, 64)
    assert batch.labels.shape == texts.labels.shape
    assert (batch.tokens, batch.targets, batch.where) == (0, 0, [])
    loss = head(**batch.inputs, labels=batch.labels)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in head.parameters())


# --- when it is computed again ------------------------------------------------------------------------------------------


def changed_weights(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path, Path], dict[str, Any]]:
    def apply(model: Path, data: Path) -> dict[str, Any]:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
        return {}

    return apply


def changed_texts(change: Callable[[list[dict[str, Any]]], None]) -> Callable[[Path, Path], dict[str, Any]]:
    def apply(model: Path, data: Path) -> dict[str, Any]:
        found = records()
        change(found)
        written(data, found)
        return {}

    return apply


def settings(**more: object) -> Callable[[Path, Path], dict[str, Any]]:
    return lambda model, data: more


def flip(tensors: dict[str, Tensor], name: str = "model.layers.1.mlp.up_proj.weight") -> None:
    """The lowest bit of one number."""
    tensors[name].view(torch.int32).view(-1)[3] ^= 1


def swap_layers(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.0.")]:
        other = name.replace("layers.0", "layers.2")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def swap_texts(found: list[dict[str, Any]]) -> None:
    found[4]["text"], found[5]["text"] = found[5]["text"], found[4]["text"]


def relabel(found: list[dict[str, Any]]) -> None:
    for index, record in enumerate(found):
        record["label"] = ("x", "y")[index % 2]


def rename(found: list[dict[str, Any]]) -> None:
    for record in found:
        record["label"] = record["label"].upper()


def add_key(found: list[dict[str, Any]]) -> None:
    found[0]["id"] = "7"


def as_classifier(model: Path, data: Path) -> dict[str, Any]:
    """The same backbone with a head of the same labels, and a padding id of its own."""
    base = llama.load(model)
    base.config = dataclasses.replace(base.config, pad_token_id=5)
    llama.save(replace_head(base, LABELS, seed=9), model, tokenizer_from=data.parent / "tokenizer", replace=True)
    return {}


AGAIN: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], bool]] = {  # what changes, and whether features do
    "nothing": (settings(), False),
    "one bit of a weight": (changed_weights(flip), True),
    "one bit of the embedding": (changed_weights(lambda tensors: flip(tensors, "model.embed_tokens.weight")), True),
    "two layers swapped": (changed_weights(swap_layers), True),
    "max_length": (settings(data__max_length=40), True),
    "max_length, beyond the longest text": (settings(data__max_length=128), False),
    "one text": (changed_texts(lambda found: found[5].update(text=found[5]["text"] + "s")), True),
    "two texts swapped": (changed_texts(swap_texts), True),
    "one text more": (changed_texts(lambda found: found.append(found[0])), True),
    "one text less": (changed_texts(lambda found: found.pop()), True),
    "the dtype of the computation": (settings(parallel__precision="bf16"), True),
    "the head that is replaced": (changed_weights(lambda tensors: flip(tensors, "lm_head.weight")), False),
    "the base is a classifier": (as_classifier, False),
    "labels": (changed_texts(relabel), False),
    "label names": (changed_texts(rename), False),
    "a key that is not used": (changed_texts(add_key), False),
    "the training": (settings(optim__lr=1e-3, train__seed=5, train__batch_size=3, finetune__head__hidden=4), False),
}


@pytest.mark.parametrize("name", AGAIN)
def test_features_are_computed_again_exactly_when_they_change(
    name: str, first: Path, model_dir: Path, tokenizer_dir: Path, texts_file: Path, calls: Calls, tmp_path: Path
) -> None:
    change, computed = AGAIN[name]
    cache, model = shutil.copytree(first / "cache", tmp_path / "cache"), shutil.copytree(model_dir, tmp_path / "model")
    data = shutil.copy(texts_file, tmp_path / "texts.jsonl")
    shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    before = {file.name for file in cache.iterdir()}
    more = change(model, data)
    main(flags(model, data, tmp_path / "out", cache, **{"train__max_steps": 1, **more}))
    assert sum(calls) == (len(data.read_text().splitlines()) if computed else 0)
    after = {file.name for file in cache.iterdir()}
    assert before <= after
    assert len(after - before) == computed


def test_a_bit_of_any_weight_and_any_setting_makes_another_name(model_dir: Path) -> None:
    model = llama.load(model_dir)
    digests = {backbone_digest(model.model)}
    for _, parameter in model.model.named_parameters():
        bits = parameter.data.view(torch.int32).view(-1)
        for place in (0, -1):
            bits[place] ^= 1
            digests.add(backbone_digest(model.model))
            bits[place] ^= 1
    assert len(digests) == 1 + 2 * len(list(model.model.parameters()))
    for setting in ({"rope_theta": 5e5}, {"rms_norm_eps": 1e-6}, {"num_attention_heads": 2, "num_key_value_heads": 1}):
        other = Llama(dataclasses.replace(model.config, **setting)).model
        other.load_state_dict(model.model.state_dict())
        digests.add(backbone_digest(other))
    half = llama.load(model_dir, torch.float16).model
    digests.add(backbone_digest(half))
    for parameter in half.parameters():
        parameter.data = parameter.data.view(torch.bfloat16)  # the same bits
    digests.add(backbone_digest(half))
    model.model.compute_dtype = torch.bfloat16
    digests.add(backbone_digest(model.model))
    assert len(digests) == 1 + 2 * len(list(model.model.parameters())) + 6


def test_where_one_text_ends_makes_another_name(tmp_path: Path, tokenizer_dir: Path) -> None:
    """The same tokens in another grouping."""
    names = set()
    for parts in (("one", "two", "ten"), ("one two", "ten", ""), ("one", "two ten", ""), ("", "one two", "ten")):
        found = [{"text": text, "label": label} for text, label in zip(parts, "abc", strict=True)]
        data = dataset(written(tmp_path / "data.jsonl", found), tokenizer_dir)
        data.samples = [dataclasses.replace(sample, ids=sample.ids[1:]) for sample in data.samples]  # without BOS
        names.add(file_of(tmp_path, "backbone", data))
    assert len(names) == 4


# --- files --------------------------------------------------------------------------------------------------------------


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "truncated in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "a web page": lambda path: path.write_text("<html>404</html>" * 99),
    "another tensor": lambda path: save_file({"x": torch.zeros(TEXTS, 64)}, path),
    "too few rows": lambda path: save_file({"features": load_file(path)["features"][1:].clone()}, path),
    "another dtype": lambda path: save_file({"features": load_file(path)["features"].half()}, path),
    "not finite": lambda path: save_file({"features": load_file(path)["features"] / 0}, path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_computed_again(
    damage: Callable[[Path], object], model_dir: Path, tokenizer_dir: Path, texts_file: Path, calls: Calls, tmp_path: Path
) -> None:
    data, model, path = dataset(texts_file, tokenizer_dir), llama.load(model_dir), tmp_path / "x.safetensors"
    first = kept(data, path, model).features.clone()
    calls.clear()
    damage(path)
    assert torch.equal(kept(data, path, model).features, first)
    assert sum(calls) == TEXTS
    calls.clear()
    assert torch.equal(kept(data, path, model).features, first)
    assert calls == []
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_run_on_damaged_files_is_the_run_on_sound_ones(
    first: Path, model_dir: Path, texts_file: Path, held_out_file: Path, tmp_path: Path, calls: Calls
) -> None:
    cache = shutil.copytree(first / "cache", tmp_path / "cache")
    for file in cache.iterdir():
        DAMAGES["truncated"](file)
    main(flags(model_dir, texts_file, tmp_path / "out", cache, data__eval_path=held_out_file))
    assert sum(calls) == TEXTS + HELD_OUT  # each text once
    assert rows(tmp_path / "out") == rows(first / "out")
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == {
        file.name: file.read_bytes() for file in (first / "cache").iterdir()
    }


def a_file_in_its_place(tmp: Path, patch: pytest.MonkeyPatch) -> Path:
    (tmp / "cache").write_text("mine")
    return tmp / "cache"


def a_file_above_it(tmp: Path, patch: pytest.MonkeyPatch) -> Path:
    return a_file_in_its_place(tmp, patch) / "below"


def no_permission(tmp: Path, patch: pytest.MonkeyPatch) -> Path:
    """Root may write anywhere, and is told otherwise here."""
    access = features.os.access
    patch.setattr(features.os, "access", lambda path, mode: Path(path).name != "cache" and access(path, mode))
    return tmp / "cache"


def no_room(tmp: Path, patch: pytest.MonkeyPatch) -> Path:
    usage = shutil.disk_usage

    def little(path: Path) -> Any:
        return usage(path)._replace(free=TEXTS * 64 * 4 - 1) if Path(path).name == "cache" else usage(path)

    patch.setattr(features.shutil, "disk_usage", little)
    return tmp / "cache"


def a_system_directory(tmp: Path, patch: pytest.MonkeyPatch) -> Path:
    return Path("/proc/features")


UNWRITABLE: list[tuple[Callable[[Path, pytest.MonkeyPatch], Path], str]] = [
    (a_file_in_its_place, "File exists"),
    (a_file_above_it, "Not a directory"),
    (no_permission, "cannot be written"),
    (no_room, "the features take 0.00 GB, 0.00 GB are free"),
    (a_system_directory, ""),
]


@pytest.mark.parametrize(("place", "reason"), UNWRITABLE, ids=[row[0].__name__ for row in UNWRITABLE])
def test_a_directory_that_cannot_be_written_ends_the_run_before_its_first_step(
    place: Callable[[Path, pytest.MonkeyPatch], Path], reason: str, model_dir: Path, texts_file: Path, tmp_path: Path,
    calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And before the backbone's first call."""
    cache = place(tmp_path, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, texts_file, tmp_path / "out", cache))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"--finetune.head.feature_cache {cache}: {reason}" in said
    assert "Traceback" not in said
    assert calls == []
    assert not (tmp_path / "out").exists()
    assert not cache.is_file() or cache.read_text() == "mine"


@pytest.mark.parametrize("reason", ["a full disk", "a directory in its place"])
def test_a_file_that_cannot_be_written_in_the_end_is_said_and_leaves_nothing(
    reason: str, model_dir: Path, tokenizer_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    path, data, model = tmp_path / "cache" / "x.safetensors", dataset(texts_file, tokenizer_dir), llama.load(model_dir)
    (path if reason == "a directory in its place" else path.parent).mkdir(parents=True)
    before = files_below(tmp_path)
    disk = full_disk(1000) if reason == "a full disk" else nullcontext()
    with disk, pytest.raises(InputError, match=r"--finetune.head.feature_cache: \S+x.safetensors cannot be written: "):
        kept(data, path, model)
    assert files_below(tmp_path) == before


def test_features_that_are_not_finite_are_not_kept(
    model_dir: Path, tokenizer_dir: Path, texts_file: Path, tmp_path: Path
) -> None:
    model = llama.load(model_dir)
    model.model.norm.weight.data[3] = float("inf")
    with pytest.raises(InputError, match="the backbone's features are not finite: its weights are damaged"):
        kept(dataset(texts_file, tokenizer_dir), tmp_path / "cache" / "x.safetensors", model)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory("auto") == tmp_path / "llama-fsdp-finetuning" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory("auto") == Path.home() / ".cache" / "llama-fsdp-finetuning" / "features"
    assert cache_directory("here") == Path("here")
