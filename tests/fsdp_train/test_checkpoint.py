"""Saving and resuming: bit-identical to a run that was never interrupted, refused when it would be another run."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from fsdp_train import run
from fsdp_train.checkpoint import Checkpoints, Progress
from fsdp_train.checkpoint_files import checkpoints
from fsdp_train.main import main
from fsdp_train.optim import LossScaler


class Interrupted(BaseException):
    """Stands for a killed process."""


EXTRA: dict[str, tuple[object, ...]] = {
    "lora": ("--finetune.lora.lora_dropout", 0.1),
    "fp16": ("--finetune.lora.r", 4, "--parallel.precision", "fp16"),  # the scale of its loss too
    "full": ("--finetune.method", "full"),
    "llama_adapter": ("--finetune.method", "llama_adapter", "--finetune.llama_adapter.adapter_layers", 2, "--optim.lr", 1e-2),
    "projected": (  # the MLP is in the checkpoint, though not in the file at the end
        *("--finetune.method", "prefix", "--finetune.prefix.num_virtual_tokens", 4, "--optim.lr", 1e-2),
        *("--finetune.prefix.prefix_projection", "true", "--finetune.prefix.encoder_hidden_size", 16),
    ),
}


def flags(model_dir: Path, data: Path, out: Path, *more: object) -> list[str]:
    chosen = [
        *("--model.path", model_dir, "--data.path", data, "--train.output_dir", out, "--train.max_steps", 12),
        *("--train.batch_size", 4, "--parallel.precision", "fp32", "--checkpoint.every", 5, "--log.every", 1),
        *("--train.samples", 0, *more),
    ]
    if "--finetune.method" not in more:
        chosen += EXTRA["lora"]
    return list(map(str, chosen))


KEPT = ("step", "loss", "lr", "grad_norm", "tokens", "loss_scale", "skipped")


def rows(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock and on memory."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k in KEPT} for row in found]


@pytest.fixture(autouse=True)
def fp16_changes_its_scale_often() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossScaler, "INTERVAL", 3)
        yield


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies just after the checkpoint of step 5."""
    saved = Checkpoints.save

    def save_and_die(self: Checkpoints, progress: Progress, samples: int, loss: float | None = None) -> None:
        saved(self, progress, samples, loss)
        self.finish()
        raise Interrupted

    monkeypatch.setattr(Checkpoints, "save", save_and_die)


@pytest.mark.parametrize("method", EXTRA)
def test_resumed_equals_uninterrupted(
    method: str, model_dir: Path, alpaca_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """12 steps over ~5 steps per epoch, dropout on; killed after step 5 of 12, mid-run and mid-epoch."""
    extra = () if method == "lora" else EXTRA[method]  # LoRA's are there already
    main(flags(model_dir, alpaca_file, tmp_path / "whole", *extra))
    request.getfixturevalue("interrupt")
    with pytest.raises(Interrupted):
        main(flags(model_dir, alpaca_file, tmp_path / "cut", *extra))
    request.getfixturevalue("monkeypatch").undo()
    assert [p.name for p in checkpoints(tmp_path / "cut" / "checkpoints")] == ["step_00000005"]
    main(flags(model_dir, alpaca_file, tmp_path / "cut", *extra))

    artefact = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    whole, cut = (load_file(tmp_path / name / artefact) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    assert [row["step"] for row in rows(tmp_path / "cut")] == list(range(1, 13))


@pytest.fixture(scope="module")
def finished(model_dir: Path, alpaca_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its checkpoints, as if it had been killed after step 10 of 12."""
    out = tmp_path_factory.mktemp("finished") / "out"
    main(flags(model_dir, alpaca_file, out))
    shutil.rmtree(out / "adapter")
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step_00000010", "step_00000012"]
    shutil.rmtree(out / "checkpoints" / "step_00000012")
    return out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--train.batch_size", 2), "batch"),
        (("--finetune.lora.r", 4), "finetune"),
        (("--optim.lr", 1e-3), "optim"),
        (("--train.seed", 1), "order"),
        (("--data.max_length", 20), "data"),
        (("--parallel.precision", "bf16"), "precision"),
        (("--train.max_steps", 9), "10 steps done, this run ends at 9"),
    ],
)
def test_another_run_is_refused(
    change: tuple[str, object], named: str, finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, out, *change))
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_longer_run_may_continue_and_overwrite_starts_over(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    main(flags(model_dir, alpaca_file, out, "--train.max_steps", 14))
    assert "10 steps done" in capsys.readouterr().out
    assert [row["step"] for row in rows(out)] == list(range(1, 15))
    shutil.rmtree(out / "adapter")
    main(flags(model_dir, alpaca_file, out, "--train.max_steps", 14))  # killed after the last step: only the result is missing
    assert (out / "adapter").is_dir()
    assert [row["step"] for row in rows(out)] == list(range(1, 15))
    main(flags(model_dir, alpaca_file, out, "--checkpoint.overwrite", "true", "--train.max_steps", 3))
    assert [row["step"] for row in rows(out)] == [1, 2, 3]


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def shorten(path: Path) -> None:
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:100])


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / SHARD).read_bytes())
    data[-5] ^= 1
    (path / SHARD).write_bytes(data)


def lose_the_state(path: Path) -> None:
    (path / "state.json").write_text("{")


@pytest.mark.parametrize("damage", [shorten, flip_a_bit, lambda path: (path / SHARD).unlink(), lose_the_state])
def test_a_damaged_checkpoint_is_passed_over_and_said_to_be(
    damage: Callable[[Path], None], model_dir: Path, alpaca_file: Path, tmp_path: Path, finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    main(flags(model_dir, alpaca_file, out, "--checkpoint.keep", 3))
    shutil.copytree(out / "adapter", tmp_path / "wanted")
    wanted = rows(out)
    shutil.rmtree(out / "adapter")
    _, tenth, last = checkpoints(out / "checkpoints")
    damage(last)
    damage(tenth)
    capsys.readouterr()
    main(flags(model_dir, alpaca_file, out))
    told = capsys.readouterr().out
    assert told.count("falling back to the one before") == 2
    assert str(last) in told
    assert "step_00000005: 5 steps done" in told
    assert rows(out) == wanted
    again, whole = (load_file(p / "adapter_model.safetensors") for p in (out / "adapter", tmp_path / "wanted"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    # Where it is named, or none is whole, it is refused.
    shutil.rmtree(out / "adapter")
    for path in checkpoints(out / "checkpoints"):
        damage(path)
    for named, where in (("auto", out), (path, tmp_path / "new")):
        with pytest.raises(SystemExit):
            main(flags(model_dir, alpaca_file, where, "--checkpoint.resume", named))
        assert "no checkpoint before it is whole" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_incomplete_checkpoints_do_not_exist(finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    directory = out / "checkpoints"
    assert [p.name for p in checkpoints(directory)] == ["step_00000010"]
    (directory / ".step_00000015.tmp").mkdir()
    (directory / "step_00000012").mkdir()  # no state.json: somebody has removed it
    (directory / "step_00000012" / "theirs").write_text("precious")
    assert [p.name for p in checkpoints(directory)] == ["step_00000010"]
    main(flags(model_dir, alpaca_file, out))
    assert not (directory / ".step_00000015.tmp").exists()  # what a killed writer left
    assert [p.name for p in checkpoints(directory)] == ["step_00000010", "step_00000012"]
    (aside,) = out.glob("replaced-*")
    assert (aside / "checkpoints" / "step_00000012" / "theirs").read_text() == "precious"


def test_only_what_trains_is_saved(finished: Path) -> None:
    """An adapter run's checkpoint holds three tensors of each trained one (and a step count), nothing of the base."""
    tensors = load_file(checkpoints(finished / "checkpoints")[-1] / SHARD)
    assert all(".lora.default." in name for name in tensors)
    assert {name.partition("/")[0] for name in tensors} == {"parameter", "exp_avg", "exp_avg_sq", "step"}


def test_the_best_is_kept_beside_the_newest(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter([5.0, 3.0, 4.0, 3.5, 2.0, 6.0, 7.0])  # at steps 2, 4, ..., 14
    extra = ["--data.eval_fraction", 0.2, "--train.eval_every", 2, "--checkpoint.keep", 1, "--checkpoint.every", 100]
    monkeypatch.setattr(run, "held_out_metrics", lambda *args: {"eval_loss": next(given)})
    out = tmp_path / "out"
    kept, saved = [], Checkpoints._write

    def write(self: Checkpoints, parts: Any, state: Any) -> None:
        saved(self, parts, state)
        kept.append([int(p.name[-2:]) for p in checkpoints(out / "checkpoints")])

    monkeypatch.setattr(Checkpoints, "_write", write)
    main(flags(model_dir, alpaca_file, out, *extra, "--train.max_steps", 16))
    assert kept == [[2], [4], [10], [10, 16]]
    # A resumed run still knows what the best was.
    shutil.rmtree(out / "adapter")
    given = iter([2.5, 1.5])  # at 18 and 20
    main(flags(model_dir, alpaca_file, out, *extra, "--train.max_steps", 22))
    assert kept[4:] == [[20], [20, 22]]


def test_training_goes_on_while_a_checkpoint_is_written(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write ends only when training is three steps on; the second begins only when the first has ended."""
    out, events, saved = tmp_path / "out", [], dcp.save

    def slow(*args: Any, **more: Any) -> None:
        events.append("begins")
        deadline = time.monotonic() + 60
        while len(events) == 1 and (out / "metrics.jsonl").read_text().count("\n") < 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        saved(*args, **more)
        events.append("ends")

    monkeypatch.setattr(dcp, "save", slow)
    main(flags(model_dir, alpaca_file, out))
    assert events == ["begins", "ends"] * 3
    monkeypatch.undo()
    main(flags(model_dir, alpaca_file, tmp_path / "undisturbed"))
    assert rows(out) == rows(tmp_path / "undisturbed")


def test_changes_that_are_safe_can_be_accepted(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    changed = ("--optim.lr", 1e-3, "--train.batch_size", 2)
    with pytest.raises(SystemExit):
        main(flags(model_dir, alpaca_file, out, *changed, "--checkpoint.accept_changes", "optim"))
    message = capsys.readouterr().err
    assert "batch was 4, is 2" in message
    assert "optim" not in message.partition("--checkpoint")[0]
    assert "--checkpoint.accept_changes batch takes the change on" in message
    main(flags(model_dir, alpaca_file, out, *changed, "--checkpoint.accept_changes", "optim,batch"))
    assert "accepted: batch was 4, is 2" in capsys.readouterr().out
    assert [row["step"] for row in rows(out)] == list(range(1, 13))
    with pytest.raises(SystemExit):
        main(flags(model_dir, alpaca_file, tmp_path / "x", "--checkpoint.accept_changes", "architecture"))
    assert "accept_changes architecture: expected data, optim, order, batch, precision" in capsys.readouterr().err


@pytest.mark.parametrize("step", [5, 10])
def test_a_full_disk_ends_the_run_and_spares_what_is_there(
    step: int, model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    saved = dcp.save

    def full(parts: Any, storage_writer: Any, **more: Any) -> None:
        if f"step_{step:08d}" in str(storage_writer.path):
            (storage_writer.path / "half").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved(parts, storage_writer=storage_writer, **more)

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, tmp_path / "out"))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert re.search(
        rf"step_{step:08d} cannot be written: No space left on device; 0.00 GB are needed, \S+ GB are free there", said
    )
    assert said.count("\n") == 1
    directory = tmp_path / "out" / "checkpoints"
    assert [p.name for p in directory.iterdir()] == ["step_00000005"] * (step == 10)


def test_a_row_that_was_half_written_is_dropped(finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    main(flags(model_dir, alpaca_file, out, "--train.max_steps", 14))
    assert [row["step"] for row in rows(out)] == list(range(1, 15))
