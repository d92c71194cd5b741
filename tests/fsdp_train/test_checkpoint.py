"""Saving and resuming: bit-identical to a run that was never interrupted, refused when it would be another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fsdp_train import checkpoint, run
from fsdp_train.checkpoint import checkpoints, find_checkpoint
from fsdp_train.main import main
from llama.errors import InputError
from tests.launch import torchrun


class Interrupted(Exception):
    """Stands for a killed process."""


EXTRA: dict[str, tuple[object, ...]] = {
    "lora": ("--finetune.lora.lora_dropout", 0.1),
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


def rows(out: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock and on memory."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k in ("step", "loss", "lr", "grad_norm", "tokens")} for row in found]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies just after the checkpoint of step 5."""
    saved = checkpoint.save_checkpoint

    def save_and_die(*args: object) -> None:
        saved(*args)  # type: ignore[arg-type]
        raise Interrupted

    monkeypatch.setattr(run, "save_checkpoint", save_and_die)


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


def test_resume_with_two_processes(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    extra = ("--train.batch_size", 2, "--train.grad_accum", 2)
    torchrun(2, *flags(model_dir, alpaca_file, tmp_path / "whole", *extra))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("adapter", "step_00000010"))
    torchrun(2, *flags(model_dir, alpaca_file, tmp_path / "cut", *extra))
    whole, cut = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    # The same directory with another number of processes: refused, not guessed.
    shutil.rmtree(tmp_path / "cut" / "adapter")
    refused = torchrun(1, *flags(model_dir, alpaca_file, tmp_path / "cut", *extra), check=False)
    assert refused.returncode != 0
    assert "was written by 2 processes, this run has 1" in refused.stderr


@pytest.fixture(scope="module")
def finished(model_dir: Path, alpaca_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its checkpoints, without its artefact."""
    out = tmp_path_factory.mktemp("finished") / "out"
    main(flags(model_dir, alpaca_file, out))
    shutil.rmtree(out / "adapter")
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
        (("--train.max_steps", 10), "10 steps done, this run ends at 10"),
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


def test_a_longer_run_may_continue_and_none_starts_over(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    main(flags(model_dir, alpaca_file, out, "--train.max_steps", 14))
    assert "10 steps done" in capsys.readouterr().out
    assert [row["step"] for row in rows(out)] == list(range(1, 15))
    main(flags(model_dir, alpaca_file, out, "--checkpoint.resume", "none", "--train.max_steps", 3))
    assert [row["step"] for row in rows(out)] == [1, 2, 3]


def test_damaged_shard_is_refused(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shard = checkpoints(out / "checkpoints")[-1] / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(SystemExit):
        main(flags(model_dir, alpaca_file, out))
    assert "rank_00000.safetensors is missing or damaged" in capsys.readouterr().err


def test_incomplete_checkpoints_do_not_exist(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints", directory)
    assert [p.name for p in checkpoints(directory)] == ["step_00000005", "step_00000010"]
    (directory / ".step_00000015.tmp").mkdir()
    (directory / "step_00000020").mkdir()  # never finished: no state.json
    assert find_checkpoint("auto", directory) == directory / "step_00000010"
    assert find_checkpoint("none", directory) is None
    assert find_checkpoint(str(directory / "step_00000005"), tmp_path) == directory / "step_00000005"
    with pytest.raises(InputError, match="not a checkpoint"):
        find_checkpoint(str(directory / "step_00000020"), directory)


def test_only_what_trains_is_saved(finished: Path) -> None:
    """An adapter run's checkpoint holds three tensors of each trained one (and a step count), nothing of the base."""
    tensors = load_file(checkpoints(finished / "checkpoints")[-1] / "rank_00000.safetensors")
    assert all(".lora.default." in name for name in tensors)
    assert {name.partition("/")[0] for name in tensors} == {"parameter", "exp_avg", "exp_avg_sq", "step"}
    keep = [p.name for p in checkpoints(finished / "checkpoints")]
    assert keep == ["step_00000005", "step_00000010"]


def test_starting_over_leaves_no_checkpoint_of_the_old_run(
    finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Or the next `auto` would continue from it. The same when a run continues from an older one than the newest."""
    for flag, left in ((("none"), []), (str(tmp_path / "1" / "checkpoints" / "step_00000005"), ["step_00000005"])):
        out = tmp_path / str(len(left))
        shutil.copytree(finished, out)
        main(flags(model_dir, alpaca_file, out, "--checkpoint.resume", flag, "--checkpoint.every", 0))
        assert [p.name for p in checkpoints(out / "checkpoints")] == left
        assert "step_00000010: it is beyond step" in capsys.readouterr().out


@pytest.mark.parametrize("step", [5, 10])
def test_a_full_disk_ends_the_run_and_spares_what_is_there(
    step: int, model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    saved = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if f"step_{step:08d}" in str(path):
            path.write_bytes(b"half")
            raise SafetensorError("No space left on device (os error 28)")
        saved(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, tmp_path / "out"))
    assert stopped.value.code == 2
    message = f"step_{step:08d} could not be written: No space left on device"
    assert message in capsys.readouterr().err
    directory = tmp_path / "out" / "checkpoints"
    assert [p.name for p in directory.iterdir()] == ["step_00000005"] * (step == 10)


def test_a_row_that_was_half_written_is_dropped(finished: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    main(flags(model_dir, alpaca_file, out, "--train.max_steps", 14))
    assert [row["step"] for row in rows(out)] == list(range(1, 15))
