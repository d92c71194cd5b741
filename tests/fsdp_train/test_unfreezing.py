"""Gradual unfreezing: what trains in which step, what has changed at the end, and resuming in the middle of a stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fsdp_train.checkpoint_files import checkpoints
from fsdp_train.main import main
from fsdp_train.partial import Unfreezing
from fsdp_train.parts import digest_of
from peft_impl import select_parameters, train_only
from tests.fsdp_train.common import build
from tests.fsdp_train.conftest import saved_model
from tests.fsdp_train.curves import run_on

LOSS = 1e-5  # fp32: other orders of summation
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"

# Shape, patterns -> what trains from the first stage on, from the second on, ...; a number is a decoder layer.
STAGES: dict[tuple[str, str], list[set[str | int]]] = {
    ("gqa", "*"): [{HEAD, NORM}, {2}, {1}, {0}, {EMBEDDING}],
    ("tied", "*"): [{EMBEDDING, NORM}, {2}, {1}, {0}],
    ("gqa", "last:2"): [{2}, {1}],
    ("tied", "last:2"): [{2}, {1}],
    ("gqa", "embeddings,last:1"): [{2}, {EMBEDDING}],
    ("tied", "embeddings,last:1"): [{EMBEDDING}, {2}],
    ("gqa", "norms"): [{NORM}, {2}, {1}, {0}],
    ("gqa", "layers.*.q_proj,lm_head"): [{HEAD}, {2}, {1}, {0}],
    ("gqa", "attention,-layers.1"): [{2}, {0}],
    ("gqa", "embeddings,layers.0,lm_head"): [{HEAD}, {0}, {EMBEDDING}],
    ("gqa", "lm_head"): [{HEAD}],
}


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize(("shape", "patterns"), STAGES)
def test_each_stage_adds_what_lies_below(shape: str, patterns: str, every: int) -> None:
    model = build("full", shape)
    names = select_parameters(model, patterns.split(","))
    train_only(model, names)
    stages = STAGES[shape, patterns]
    unfreezing = Unfreezing(model, every, shape == "tied")
    assert unfreezing.count == len(stages)

    def training() -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    for step in [*range(every * len(stages) + 2), 0, 1000, every]:  # in whatever order: a resumed run begins anywhere
        unfreezing.before_step(step)
        reached = set().union(*stages[: step // every + 1])
        layers = {f".{layer}." for layer in reached if isinstance(layer, int)}
        assert training() == {n for n in names if n in reached or (".layers." in n and any(i in n for i in layers))}
    unfreezing.before_step(0)
    unfreezing.finish()
    assert training() == set(names)


def test_without_stages_everything_trains_from_the_first_step() -> None:
    model = build("full")
    train_only(model, names := select_parameters(model, ["norms", "last:1"]))
    Unfreezing(model, 0, False).before_step(0)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names


# --- the program --------------------------------------------------------------------------------------------------------

# Steps 0..2 train the top, 3..5 the last layer too, 6 and 7 the one below. A checkpoint after 4 is inside a stage.
RUN = ("--finetune.partial.unfreeze_every", 3, "--train.max_steps", 8, "--checkpoint.every", 4)
TOP = {"gqa": ("lm_head.", "model.norm."), "tied": ("model.embed_tokens.", "model.norm.", "_flat_param")}  # and FSDP's root
LAST, NEXT, FIRST = "model.layers.2.", "model.layers.1.", "model.layers.0."


def flags(model_dir: Path, data: Path, out: Path, *more: object) -> list[str]:
    chosen = [
        *("--model.path", model_dir, "--data.path", data, "--train.output_dir", out, "--train.samples", 0, "--log.every", 1),
        *("--finetune.method", "partial", "--finetune.partial.train", "*,-mlp", "--parallel.precision", "fp32"),
        *("--optim.schedule", "constant", "--optim.lr", 1e-3, "--optim.weight_decay", 0.1, *RUN, *more),
    ]
    return list(map(str, chosen))


def rows(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock and on memory."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k in ("step", "loss", "lr", "grad_norm", "tokens")} for row in found]


def changed(base: Path, out: Path) -> set[str]:
    before, after = (load_file(path / "model.safetensors") for path in (base, out / "model"))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def check_states(out: Path, shape: str) -> None:
    """After 4 steps: parameters of all that trains, optimizer state of what has been reached."""
    directory = checkpoints(out / "checkpoints")[0]
    tensors = {name for file in directory.glob("*.safetensors") for name in load_file(file)}
    names = {name.partition("/")[2] for name in tensors if name.startswith("parameter/")}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        has = {name.partition("/")[2] for name in tensors if name.startswith(f"{key}/")}
        assert has == {n for n in names if n.startswith((*TOP[shape], LAST))} != set()
    assert any(n.startswith(FIRST) for n in names)
    assert any("embed_tokens" in n for n in names) or shape == "tied"
    assert not any("mlp" in n for n in names)


def cut(whole: Path, out: Path) -> Path:
    """The run as it was after its checkpoint."""
    return shutil.copytree(whole, out, ignore=shutil.ignore_patterns("model", "step_00000008"))


def check_resumed(whole: Path, out: Path, base: Path, shape: str) -> None:
    """Bit for bit the run that was not interrupted, and exactly what had its turn is changed."""
    one, two = (load_file(path / "model" / "model.safetensors") for path in (whole, out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert rows(whole) == rows(out)
    assert [row["step"] for row in rows(out)] == list(range(1, 9))
    reached = {name for name in one if name.startswith((*TOP[shape], LAST, NEXT)) and "mlp" not in name}
    assert changed(base, out) == changed(base, whole) == reached
    assert len(reached) == 2 + 2 * 6


@pytest.fixture(scope="module")
def tied_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `model_dir`, head and embedding sharing a weight."""
    return saved_model("tied", tokenizer_dir, tmp_path_factory.mktemp("tied") / "model")


@pytest.fixture(scope="module")
def whole(model_dir: Path, alpaca_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    main(flags(model_dir, alpaca_file, out))
    return out


def test_a_run_resumed_within_a_stage_is_the_same_to_the_bit(
    whole: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_states(whole, "gqa")
    out = cut(whole, tmp_path / "cut")
    main(flags(model_dir, alpaca_file, out))
    said = capsys.readouterr().out
    assert "4 steps done" in said
    assert "gradual unfreezing: 3 of 5 stages, one every 3 steps, from the top" in said
    check_resumed(whole, out, model_dir, "gqa")


def test_two_processes_unfreeze_and_resume_alike(tied_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    """A head that shares the embedding's weight, which the root unit holds."""
    main(flags(tied_dir, alpaca_file, tmp_path / "one"))
    run_on(2, [flags(tied_dir, alpaca_file, tmp_path / "two", "--train.batch_size", 2)], tmp_path)
    check_states(tmp_path / "two", "tied")
    again = flags(tied_dir, alpaca_file, cut(tmp_path / "two", tmp_path / "cut"), "--train.batch_size", 2)
    run_on(2, [again], tmp_path)
    check_resumed(tmp_path / "two", tmp_path / "cut", tied_dir, "tied")
    one, two = ([row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two"))
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < LOSS


def test_half_an_optimizer_state_is_refused(
    whole: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None at all is what has not been reached; two of three is damage."""
    out = cut(whole, tmp_path / "cut")
    path = checkpoints(out / "checkpoints")[0]
    file = path / "shard-00001-model-00001-of-00001.safetensors"
    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    del tensors["exp_avg_sq/model.norm.weight"]
    save_file(tensors, file, metadata)
    state = json.loads((path / "state.json").read_text())
    state["files"] = {file.name: digest_of(file)}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(SystemExit):
        main(flags(model_dir, alpaca_file, out))
    assert (
        "does not fit this model: exp_avg_sq/model.norm.weight is missing, incomplete or of another size"
        in capsys.readouterr().err
    )


def test_another_pace_is_another_run(
    whole: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(flags(model_dir, alpaca_file, cut(whole, tmp_path / "cut"), "--finetune.partial.unfreeze_every", 2))
    error = capsys.readouterr().err
    assert "belongs to another run: --finetune.partial.unfreeze_every was 3, is 2." in error
