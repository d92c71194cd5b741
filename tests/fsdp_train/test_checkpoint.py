"""Saving and resuming: bit-identical to a run that was never interrupted, refused when it would be another run."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from fsdp_train import run
from fsdp_train.checkpoint import Checkpoints, Progress
from fsdp_train.checkpoint_files import checkpoints
from fsdp_train.data import Dataset
from fsdp_train.main import main
from fsdp_train.optim import LossScaler, OptimConfig


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


saving = Checkpoints.save


def saving_and_dying(self: Checkpoints, progress: Progress, samples: int, loss: float | None = None) -> None:
    """The process dies just after its first checkpoint."""
    saving(self, progress, samples, loss)
    self.finish()
    raise Interrupted


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies just after the checkpoint of step 5."""
    monkeypatch.setattr(Checkpoints, "save", saving_and_dying)


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
        (("--train.batch_size", 2), "batch was 4, is 2"),
        (("--finetune.lora.r", 4), "--finetune.lora.r was 8, is 4"),
        (("--finetune.lora.lora_alpha", 32), "--finetune.lora.lora_alpha was 16, is 32"),
        (("--optim.lr", 1e-3), "--optim.lr was 0.0002, is 0.001"),
        (("--train.seed", 1), "--train.seed was 0, is 1"),
        (("--data.shuffle", "false"), "--data.shuffle was true, is false"),
        (("--data.max_length", 180), "the training data is another: --data.max_length was none, is 180"),
        (("--parallel.precision", "bf16"), "--parallel.precision was fp32, is bf16"),
        (("--model.dtype", "bf16"), "frozen weights were kept in fp32, are in bf16 (--model.dtype, or"),
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


def test_what_could_not_be_removed_goes_at_the_next_start(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is written, and then the disk is full: no later one comes to remove those before it."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    command = flags(model_dir, alpaca_file, out, "--checkpoint.keep", 1)
    with monkeypatch.context() as patch:
        patch.setattr("fsdp_train.checkpoint.remove", full)
        with pytest.raises(SystemExit):
            main(command)
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step_00000010", "step_00000012"]
    shutil.rmtree(out / "adapter")  # for which there was room here
    main(command)
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step_00000012"]


def test_an_older_checkpoint_whose_state_is_damaged_stops_nobody(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.copytree(out / "checkpoints" / "step_00000010", out / "checkpoints" / "step_00000005")
    (out / "checkpoints" / "step_00000005" / "state.json").write_text("{")
    main(flags(model_dir, alpaca_file, out))
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step_00000010", "step_00000012"]


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


# --- another batch, another precision -----------------------------------------------------------


def seen_samples(patch: pytest.MonkeyPatch, seen: list[list[int]]) -> None:
    """Note which samples each batch of training asks for (evaluation asks in order)."""
    made = Dataset.batch

    def batch(self: Dataset, indices: Any, device: Any) -> Any:
        seen.append(list(indices))
        return made(self, indices, device)

    patch.setattr(Dataset, "batch", batch)


@pytest.mark.parametrize(("before", "after", "left"), [(2, 5, 2), (5, 2, 5), (2, 10, 1)], ids=["larger", "smaller", "the rest"])
def test_another_batch_goes_on_with_the_samples_that_are_left(
    before: int, after: int, left: int, model_dir: Path, alpaca_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Killed in the middle of an epoch of 20 samples: 10 are consumed, and the rate is at its half."""
    out, seen = tmp_path / "out", list[list[int]]()
    done = 10 // before

    def command(batch: int, *more: object) -> list[str]:
        given = flags(model_dir, alpaca_file, out, *more)
        place = given.index("--train.max_steps")
        given[place : place + 2] = ["--train.epochs", "1"]
        return [*given, "--train.batch_size", str(batch), "--checkpoint.every", str(done)]

    with pytest.MonkeyPatch.context() as patch:
        seen_samples(patch, seen)
        patch.setattr(Checkpoints, "save", saving_and_dying)
        with pytest.raises(Interrupted):
            main(command(before))
    consumed = seen[:done]
    seen.clear()
    with pytest.raises(SystemExit):
        main(command(after))
    assert f"batch was {before}, is {after}" in capsys.readouterr().err
    seen_samples(monkeypatch, seen)
    main(command(after, "--checkpoint.accept_changes", "batch"))
    said = capsys.readouterr().out
    assert f"{done} steps done, 10 of 20 samples of epoch 1 consumed, {left} steps left" in said
    assert len(seen) == left
    assert sorted(i for batch in (*consumed, *seen) for i in batch) == list(range(20))
    found = rows(out)
    assert [row["step"] for row in found] == list(range(1, done + left + 1))
    expected = OptimConfig().lr * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert found[done]["lr"] == pytest.approx(expected)


def test_a_batch_that_does_not_fit_what_is_consumed_is_refused(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 10 of batches of 4 is the end of the second epoch of 20; step 5 of epochs of 19 is not one."""
    out = tmp_path / "out"
    main(flags(model_dir, alpaca_file, out, "--data.eval_fraction", 0.05, "--train.max_steps", 3, "--checkpoint.every", 3))
    shutil.rmtree(out / "adapter")
    capsys.readouterr()
    changed = ("--data.eval_fraction", 0.05, "--checkpoint.accept_changes", "batch", "--train.batch_size", 8)
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, out, *changed))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "12 samples of epoch 1 are consumed, which is no whole number of batches of 8" in message
    assert "--train.batch_size 1, 2, 3, 4, 6, 12 fits" in message


def test_another_precision_can_be_taken_on(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The frozen weights are then kept in another dtype, too: that is the same change, not another base."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    main(flags(model_dir, alpaca_file, out, "--parallel.precision", "bf16", "--checkpoint.accept_changes", "precision"))
    said = capsys.readouterr().out
    assert "accepted: --parallel.precision was fp32, is bf16" in said
    assert "10 steps done" in said


def test_another_base_is_refused_by_name(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(finished, out)
    shutil.copytree(model_dir, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        main(flags(other, alpaca_file, out, "--checkpoint.accept_changes", "data,optim,order,batch,precision"))
    assert f"the frozen weights are others (--model.path was {model_dir}, is {other})" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_is_refused_by_name(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says how many steps were done, but not of what size."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    path = out / "checkpoints" / "step_00000010" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in state.items() if key != "format"}))
    with pytest.raises(SystemExit):
        main(flags(model_dir, alpaca_file, out))
    assert "was written by another version of this program (format 1; this one reads 2)" in capsys.readouterr().err
