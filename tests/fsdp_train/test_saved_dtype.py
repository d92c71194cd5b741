"""What is saved is what was trained and measured: no rounding unless it was asked for, and then said
and measured, for every way to train and every strategy."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import llama
from fsdp_train.checkpoint_files import checkpoints
from fsdp_train.classification import load_classification
from fsdp_train.config import parse_config
from fsdp_train.data import load_dataset
from fsdp_train.main import complete, main
from fsdp_train.measure import held_out_metrics
from fsdp_train.run import Run
from fsdp_train.strategy import DTYPES, ParallelConfig
from fsdp_train.world import World, process_group
from llama import Tokenizer
from llama.weight_files import open_weights
from peft_impl import load_adapter, match_head
from tests.fsdp_train.conftest import CONTEXT, VOCAB, saved_model
from tests.launch import spawn

LOSS = 2e-6  # fp32, losses of about 6: other kernels, and sums over other batches; rounding costs 1e-4 and more
WEIGHTS, HEAD = "model.safetensors", "head.safetensors"
RATE = 2e-5  # at which most steps are smaller than half a bf16 step of a norm
PARTIAL = ("partial", "--finetune.partial.train")
METHODS = {"norms": (*PARTIAL, "norms"), "last": (*PARTIAL, "last:1"), "full": ("full",)}
CLASSIFIES = ("--finetune.head.kind", "classification")


def converted(base: Path, path: Path, dtype: torch.dtype) -> Path:
    """The same model, all tensors in `dtype`."""
    llama.save(llama.load(base), path, dtype, tokenizer_from=base)
    return path


@pytest.fixture(scope="module")
def bases(model_dir: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in each dtype, with fp32 norms beside bf16, and one that ties head and embedding."""
    root = tmp_path_factory.mktemp("bases")
    made = {name: converted(model_dir, root / name, dtype) for name, dtype in DTYPES.items()}
    model = llama.load(model_dir, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float() + 1e-4
    llama.save(model, root / "mixed", tokenizer_from=model_dir)
    tied = saved_model("tied", tokenizer_dir, root / "tied fp32")
    return {**made, "mixed": root / "mixed", "tied": converted(tied, root / "tied", torch.bfloat16)}


@pytest.fixture(scope="module")
def labels_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    words = ("one", "two", "three", "four", "five", "six")
    rows = [{"text": f"Say {word}.", "label": "ab"[len(word) % 2]} for word in words]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def flags(base: Path, data: Path, out: Path, method: Sequence[str], *more: object) -> list[str]:
    chosen = [
        *("--model.path", base, "--data.path", data, "--data.eval_path", data, "--train.output_dir", out),
        *("--train.samples", 0, "--train.max_steps", 4, "--optim.lr", RATE, "--optim.schedule", "constant"),
        *("--parallel.precision", "fp32", "--checkpoint.every", 0, "--finetune.method", *method, *more),
    ]
    return list(map(str, chosen))


def reported(out: Path) -> tuple[float, float]:
    """The held-out loss before and after training, as the run wrote them."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return losses[0], losses[-1]


def samples_of(data: Path, model: Path) -> list[Any]:
    return load_dataset(str(data), "auto", Tokenizer(model), VOCAB, CONTEXT).samples


def their_loss(model: Path, data: Path) -> float:
    """By transformers alone, in the dtype that it takes by itself: nothing may be rounded on the way."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model)
    stored = load_file(model / WEIGHTS)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(parameter.detach().float(), stored[name].float())
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples_of(data, model):
            labels = torch.tensor(sample.labels)[1:].long()
            logits = theirs.float()(torch.tensor(sample.ids)[None].long()).logits[0, :-1]
            total += F.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def our_loss(model: Path, data: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> float:
    """Of the directory opened anew; the base was held in `dtype`."""
    opened = llama.load(model, dtype).float()
    if adapter is not None:
        match_head(opened, adapter)
        load_adapter(opened, adapter)
    if opened.config.id2label:
        held_out: Any = load_classification(str(data), Tokenizer(model), CONTEXT, None, None)
    else:
        held_out = load_dataset(str(data), "auto", Tokenizer(model), VOCAB, CONTEXT)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    return held_out_metrics(opened, held_out, 4, world)["eval_loss"]


def check_figure(out: Path, data: Path, asked: str) -> None:
    """What the run reported is what the file is worth; and unless it rounded, something was learned."""
    before, after = reported(out)
    assert abs(their_loss(out / "model", data) - after) < LOSS
    assert abs(our_loss(out / "model", data) - after) < LOSS
    if asked != "bf16":
        assert before - after > 20 * LOSS


# --- the figure that is reported is the file's --------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["auto", "bf16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
def test_the_reported_loss_is_that_of_the_file(
    method: str, asked: str, bases: dict[str, Path], alpaca_file: Path, tmp_path: Path
) -> None:
    main(flags(bases["bf16"], alpaca_file, tmp_path, METHODS[method], "--model.dtype", asked))
    check_figure(tmp_path, alpaca_file, asked)


SPREAD = {
    "fsdp auto": ("norms", "auto", "fsdp"),
    "fsdp bf16": ("full", "bf16", "fsdp"),
    "fsdp fp32": ("last", "fp32", "fsdp"),
    "fsdp shard_grad_op": ("norms", "bf16", "fsdp", "--parallel.sharding", "shard_grad_op"),
    "fsdp2 bf16": ("last", "bf16", "fsdp2"),
    "fsdp2 auto": ("full", "auto", "fsdp2"),
    "ddp bf16": ("norms", "bf16", "ddp"),
}


def spread(rank: int, base: Path, data: Path, out: Path) -> None:
    with process_group(ParallelConfig()) as world:
        for name, (method, asked, strategy, *more) in SPREAD.items():
            given = ("--model.dtype", asked, "--parallel.strategy", strategy, *more)
            command = flags(base, data, out / name, METHODS[method], *given)
            complete(Run(parse_config(command), world))


def test_the_reported_loss_is_that_of_the_file_on_two_processes(
    bases: dict[str, Path], alpaca_file: Path, tmp_path: Path
) -> None:
    spawn(2, spread, bases["bf16"], alpaca_file, tmp_path, tmp_path=tmp_path)
    for name, (_, asked, *_) in SPREAD.items():
        check_figure(tmp_path / name, alpaca_file, asked)


HEADS = {  # base, whether the data has labels, flags, what trains
    "untied head": ("tied", False, ("head",), r"lm_head"),
    "deep head": ("bf16", False, ("head", "--finetune.head.hidden", "8"), r"lm_head"),
    "classifier on features": ("bf16", True, ("head", *CLASSIFIES), r"score"),
    "deep classifier": ("bf16", True, ("full", *CLASSIFIES, "--finetune.head.hidden", "8"), r".*"),
    "tied embedding": ("tied", False, (*PARTIAL, "embeddings"), r"model\.embed"),
    "unfreezing": ("bf16", False, (*PARTIAL, "*", "--finetune.partial.unfreeze_every", "3"), r".*"),
}


@pytest.mark.parametrize("asked", ["auto", "bf16"])
@pytest.mark.parametrize("case", HEADS)
def test_every_head_follows_the_same_rule(
    case: str,
    asked: str,
    bases: dict[str, Path],
    alpaca_file: Path,
    labels_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A head that is drawn anew has no update to lose, one that starts from the embedding has."""
    base, classifies, method, trains = HEADS[case]
    if case == "classifier on features":
        method = (*method, "--finetune.head.feature_cache", str(tmp_path / "cache"))
    data = labels_file if classifies else alpaca_file
    said = output(capsys, flags(bases[base], data, tmp_path / "out", method, "--model.dtype", asked))
    assert ("largest rounding error" in said) == (asked == "bf16")
    assert ("of the update lost" in said) == (asked == "bf16" and case != "classifier on features")
    model = tmp_path / "out" / "model"
    written = {name: t for file in model.glob("*.safetensors") for name, t in load_file(file).items()}
    wide = torch.float32 if asked == "auto" else torch.bfloat16
    for name, tensor in written.items():
        assert tensor.dtype == (wide if re.match(trains, name) else torch.bfloat16), name
    assert (model / HEAD).exists() == ("deep" in case)
    assert abs(our_loss(model, data) - reported(tmp_path / "out")[1]) < LOSS


def test_the_checkpoint_keeps_what_the_file_rounds(bases: dict[str, Path], alpaca_file: Path, tmp_path: Path) -> None:
    for asked in ("auto", "bf16"):
        more = ("--model.dtype", asked, "--checkpoint.every", 2)
        main(flags(bases["bf16"], alpaca_file, tmp_path / asked, METHODS["last"], *more))
    exact, rounded = (load_file(tmp_path / asked / "model" / WEIGHTS) for asked in ("auto", "bf16"))
    newest = checkpoints(tmp_path / "bf16" / "checkpoints")[-1]
    assert newest.name == "step_00000004"
    masters = {
        key.removeprefix("parameter/"): tensor
        for file in newest.glob("*.safetensors")
        for key, tensor in load_file(file).items()
        if key.startswith("parameter/")
    }
    assert len(masters) == 9
    for name, master in masters.items():
        assert torch.equal(master, exact[name].flatten())
        assert torch.equal(master.bfloat16(), rounded[name].flatten())
        assert not torch.equal(master, rounded[name].float().flatten())


# --- what the run says --------------------------------------------------------------------------------------------------


def output(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    main(command)
    return capsys.readouterr().out


def test_what_rounding_takes_is_said(
    bases: dict[str, Path], alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured here from the files of two runs, with and without rounding."""
    said = {}
    for asked in ("auto", "bf16"):
        command = flags(bases["bf16"], alpaca_file, tmp_path / asked, METHODS["full"], "--model.dtype", asked)
        said[asked] = output(capsys, command)
    base, exact, kept = (
        load_file(path / WEIGHTS) for path in (bases["bf16"], tmp_path / "auto" / "model", tmp_path / "bf16" / "model")
    )
    start, end, file = (torch.cat([t[n].double().flatten() for n in base]) for t in (base, exact, kept))
    share = 100 * (file - end).norm() / (end - start).norm()
    changed, undone = (end != start).sum(), ((end != start) & (file == start)).sum()
    assert 0 < undone < changed
    worst = (file - end).abs().max()
    assert (
        f"\ntrained weights: rounded to bf16, as --model.dtype asks: largest rounding error {worst:.3g},"
        f" {share:.3g} % of the update lost to rounding; {undone:,} of the {changed:,} elements that training changed are"
        " the base's again\nnote: --model.dtype fp32 keeps the whole update\n"
    ) in said["bf16"]
    size = sum(t.nbytes for t in exact.values())
    line = f"trained tensors are written in fp32 (base: bf16), {size / 1e6:.1f} MB; --model.dtype bf16 writes as the base"
    assert line in said["auto"]
    assert said["auto"].index(line) < said["auto"].index("before training")
    assert "rounded" not in said["auto"]
    assert "written in fp32" not in said["bf16"]


FROZEN = {  # base, what was asked: what is said
    ("fp32", "auto"): "unchanged, copied from the base's files",
    ("bf16", "auto"): "unchanged, copied from the base's files",
    ("bf16", "bf16"): "unchanged, copied from the base's files",
    ("mixed", "auto"): "unchanged, copied from the base's files",
    ("fp16", "fp16"): "unchanged, copied from the base's files",
    ("fp32", "bf16"): "rounded to bf16, as --model.dtype asks",
    ("fp32", "fp16"): "rounded to fp16, as --model.dtype asks",
    ("fp16", "bf16"): "rounded to bf16, as --model.dtype asks",
    ("mixed", "bf16"): "rounded to bf16, as --model.dtype asks",
    ("bf16", "fp32"): "widened without loss to fp32, as --model.dtype asks",
    ("mixed", "fp32"): "widened without loss to fp32, as --model.dtype asks",
}


@pytest.mark.parametrize(("base", "asked"), FROZEN)
def test_what_became_of_the_frozen_weights_is_said(
    base: str, asked: str, bases: dict[str, Path], alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = flags(bases[base], alpaca_file, tmp_path, METHODS["last"], "--model.dtype", asked)
    said = output(capsys, command)
    before, after = (load_file(path / WEIGHTS) for path in (bases[base], tmp_path / "model"))
    frozen = [name for name in before if not name.startswith("model.layers.2.")]
    changed = sum(int((before[name].double() != after[name].double()).sum()) for name in frozen)
    count = sum(before[name].numel() for name in frozen)
    same_bits = all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in frozen)
    [line] = re.findall(r"^frozen weights: (.*)$", said, re.MULTILINE)
    expected = FROZEN[base, asked]
    rounds = expected.startswith("rounded")
    assert line == expected + f" ({changed:,} of {count:,} elements changed)" * rounds
    assert (changed > 0, same_bits) == (rounds, expected.startswith("unchanged"))


ADAPTERS = {  # base, what was asked: where the weights are unchanged
    ("bf16", "auto"): "unchanged (checksum",
    ("bf16", "bf16"): "unchanged (checksum",
    ("fp32", "bf16"): "unchanged in the base's files, rounded to bf16 in this run (checksum",
    ("fp16", "bf16"): "unchanged in the base's files, rounded to bf16 in this run (checksum",
}


@pytest.mark.parametrize(("base", "asked"), ADAPTERS)
def test_an_adapter_is_fp32_and_its_base_is_what_is_said(
    base: str, asked: str, bases: dict[str, Path], alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = ("lora", "--finetune.lora.modules_to_save", "lm_head,norm")
    said = output(capsys, flags(bases[base], alpaca_file, tmp_path, method, "--model.dtype", asked))
    assert f"\nbase weights: {ADAPTERS[base, asked]}" in said
    assert "trained weights" not in said
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {"base_model.model.lm_head.weight", "base_model.model.model.norm.weight"} < set(written)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    held = torch.float32 if asked == "auto" else DTYPES[asked]
    found = our_loss(bases[base], alpaca_file, tmp_path / "adapter", held)
    assert abs(found - reported(tmp_path)[1]) < LOSS


# --- a directory of several dtypes --------------------------------------------------------------------------------------


def bits(path: Path) -> dict[str, tuple[torch.dtype, Tensor]]:
    weights = open_weights(path)
    return {name: (weights.dtype(name), weights.read(name)) for name in weights.shapes}


def test_training_goes_on_from_a_directory_of_several_dtypes(bases: dict[str, Path], alpaca_file: Path, tmp_path: Path) -> None:
    main(flags(bases["bf16"], alpaca_file, tmp_path / "one", METHODS["norms"]))
    first = tmp_path / "one" / "model"
    main(flags(first, alpaca_file, tmp_path / "two", METHODS["last"]))
    assert reported(tmp_path / "two")[0] == reported(tmp_path / "one")[1]
    before, after = bits(first), bits(tmp_path / "two" / "model")
    assert {dtype for dtype, _ in before.values()} == {torch.bfloat16, torch.float32}
    for name, (dtype, tensor) in after.items():
        if name.startswith("model.layers.2."):
            assert dtype == torch.float32
        else:
            assert dtype == before[name][0]
            assert torch.equal(tensor, before[name][1])
    check_figure(tmp_path / "two", alpaca_file, "auto")
