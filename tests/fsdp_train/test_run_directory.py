"""One run to a directory: names, locks, restarts by the same command; nothing removed, litter apart."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fsdp_train import run_lock
from fsdp_train.checkpoint import Checkpoints
from fsdp_train.checkpoint_files import checkpoints
from fsdp_train.config import RunConfig
from fsdp_train.data import Dataset
from fsdp_train.main import main
from fsdp_train.run_directory import RunDirectory, remove_litter
from fsdp_train.run_lock import LOCK_FILE, RunLock
from llama.errors import InputError

ELSEWHERE = {"host": "node7", "boot": "another kernel", "process": 77, "since": "noon", "token": "x"}


def quiet(text: str) -> None:
    """Nobody reads it."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of patience instead of thirty, with signs of life as much more often."""
    monkeypatch.setattr(run_lock, "PATIENCE", 1.0)
    monkeypatch.setattr(run_lock, "BEAT", 0.1)
    monkeypatch.setattr(run_lock, "POLL", 0.05)
    monkeypatch.setattr(run_lock, "CONFIRMATION", 0.05)


@pytest.fixture(params=["flock", "signs of life"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, quick: None) -> str:
    """Both ways to lock: the second is what a file system without flock leaves."""
    if request.param != "flock":
        monkeypatch.setattr(run_lock, "_flock", lambda file: None)
    return str(request.param)


# --- names --------------------------------------------------------------------------------------


def test_runs_that_start_at_one_moment_get_a_name_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    together = threading.Barrier(8)
    found: list[RunDirectory] = []

    def start() -> None:
        together.wait()
        found.append(RunDirectory(RunConfig(), 0.0, quiet))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.path.name for one in found) == [f"lora-{n:03d}" for n in range(1, 9)]
    for one in found:
        (one.path / "metrics.jsonl").write_text("")
        one.close()
    assert len(list(Path("runs").iterdir())) == 8


def test_a_directory_that_nothing_came_of_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunDirectory(RunConfig(), 0.0, quiet).close()
    assert list(tmp_path.iterdir()) == []
    Path("runs").mkdir()
    RunDirectory(RunConfig(), 0.0, quiet).close()
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]  # it was there before


# --- locks --------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_and_free_after(way: str, tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 0.0, quiet)
    said: list[str] = []
    began = time.monotonic()
    with pytest.raises(InputError, match=f"process {os.getpid()} on .* is writing here"):
        RunLock(tmp_path, 1.2, said.append)
    assert time.monotonic() - began >= 1.2
    assert len(said) == 1
    assert "waiting for it" in said[0]
    lock.check()
    lock.release()
    assert not (tmp_path / LOCK_FILE).exists()
    RunLock(tmp_path, 0.0, quiet).release()


def test_a_newcomer_gets_the_lock_of_a_run_that_ends_meanwhile(way: str, tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 0.0, quiet)
    threading.Timer(0.4, lock.release).start()
    RunLock(tmp_path, 1.2, quiet).release()


def test_of_many_at_once_one_has_the_lock(way: str, tmp_path: Path) -> None:
    holders: list[int] = []
    most: list[int] = []

    def take(number: int) -> None:
        try:
            lock = RunLock(tmp_path, 0.2, quiet)
        except InputError:
            return
        holders.append(number)
        most.append(len(holders))
        time.sleep(0.05)
        holders.remove(number)
        lock.release()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


def test_a_killed_holder_of_this_host_is_not_waited_for(tmp_path: Path) -> None:
    """With the true patience: the kernel gives its lock back at once."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        RunLock(tmp_path, 0.0, quiet)
        os.write(writing, b"x")
        time.sleep(60)
        os._exit(0)
    assert os.read(reading, 1) == b"x"
    with pytest.raises(InputError, match=f"process {child} on"):
        RunLock(tmp_path, 0.0, quiet)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK_FILE).exists()
    RunLock(tmp_path, 0.0, quiet).release()


@pytest.mark.parametrize("granted", [True, False, None])
def test_a_silent_holder_elsewhere_is_waited_for_no_longer_than_patience(
    granted: bool | None, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever flock says of another host's lock: granted, refused (its server holds it), or nothing."""
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps(ELSEWHERE))
    real = run_lock._flock
    said: list[str] = []
    with path.open() as old:  # as long as it is open, no new file has its number

        def flock(file: int) -> bool | None:
            is_old = os.path.samestat(os.fstat(file), os.fstat(old.fileno()))
            return granted if is_old else real(file)

        monkeypatch.setattr(run_lock, "_flock", flock)
        began = time.monotonic()
        lock = RunLock(tmp_path, 1.0, said.append)
    assert time.monotonic() - began >= 1
    assert "process 77 on node7 (since noon) is writing here" in said[0]
    assert "no sign of life for 1 s; the lock is taken" in said[1]
    lock.check()
    lock.release()


@pytest.mark.parametrize("granted", [True, False, None])
def test_a_living_holder_elsewhere_keeps_its_lock(
    granted: bool | None, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps(ELSEWHERE))
    monkeypatch.setattr(run_lock, "_flock", lambda file: granted)
    ended = threading.Event()

    def live() -> None:
        beats = 0
        while not ended.wait(0.2):
            beats += 1
            (tmp_path / "next").write_text(json.dumps({**ELSEWHERE, "beats": beats}))
            (tmp_path / "next").replace(path)

    other = threading.Thread(target=live, daemon=True)
    other.start()
    with pytest.raises(InputError, match="process 77 on node7"):
        RunLock(tmp_path, 1.0, quiet)
    ended.set()
    other.join()


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "removed"])
def test_a_holder_sees_that_its_lock_is_lost(taken: bool, way: str, tmp_path: Path) -> None:
    lock = RunLock(tmp_path, 0.0, quiet)
    if taken:
        (tmp_path / LOCK_FILE).write_text(json.dumps(ELSEWHERE))
    else:
        (tmp_path / LOCK_FILE).unlink()
    with pytest.raises(InputError, match="process 77 on node7" if taken else "is gone"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK_FILE).exists() == taken  # it is the other's


# --- through the program ------------------------------------------------------------------------


def flags(model_dir: Path, data: Path, out: Path, *more: object) -> list[str]:
    chosen = [
        *("--model.path", model_dir, "--data.path", data, "--train.output_dir", out),
        *("--train.max_steps", 8, "--train.batch_size", 4, "--parallel.precision", "fp32"),
        *("--checkpoint.every", 2, "--checkpoint.keep", 9, "--log.every", 1, "--train.samples", 0),
        *more,
    ]
    return list(map(str, chosen))


def rows(out: Path) -> list[tuple[float, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def everything(out: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def at_batch(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Let the n-th batch that is asked for do something first."""
    made = Dataset.batch
    calls: list[int] = []

    def batch(self: Dataset, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            act()
        return made(self, *args)

    patch.setattr(Dataset, "batch", batch)


class Killed(BaseException):
    """Stands for a process that is killed: no handler of ours answers it."""


def kill(arguments: list[str], at: int) -> None:
    """A start that dies in its `at`-th step, without a word."""

    def die() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, at, die)
        with pytest.raises(Killed):
            main(arguments)


@pytest.fixture(scope="module")
def whole(model_dir: Path, alpaca_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    main(flags(model_dir, alpaca_file, out))
    return out


@pytest.fixture
def other_run(whole: Path, tmp_path: Path) -> Path:
    """A directory with checkpoints of another command, whose run never came to its end."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "adapter")
    return out


def same(out: Path, whole: Path) -> None:
    assert rows(out) == rows(whole)
    wanted, found = weights(whole), weights(out)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_checkpoint_elsewhere_is_only_where_a_run_begins(
    whole: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, elsewhere = tmp_path / "out", whole / "checkpoints" / "step_00000002"
    command = flags(model_dir, alpaca_file, out, "--checkpoint.resume", elsewhere)
    kill(command, 4)  # steps 3, 4, 5, and dead in 6
    assert f"resumed from {elsewhere}: 2 steps done" in capsys.readouterr().out
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step_00000004"]
    main(command)
    said = capsys.readouterr().out
    assert f"resumed from {out / 'checkpoints' / 'step_00000004'}: 4 steps done" in said
    assert f"--checkpoint.resume {elsewhere}: not used" in said
    assert rows(out) == rows(whole)[2:]
    assert all(torch.equal(weights(out)[key], tensor) for key, tensor in weights(whole).items())


def test_none_uses_no_checkpoint_of_another_command_and_goes_on_with_its_own(
    whole: Path, other_run: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = everything(other_run)
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, other_run, "--checkpoint.resume", "none"))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"--checkpoint.resume none: {other_run} holds checkpoints" in message
    assert "--checkpoint.overwrite true" in message
    assert message.count("\n") == 1
    assert everything(other_run) == before
    command = flags(model_dir, alpaca_file, tmp_path / "new", "--checkpoint.resume", "none")
    kill(command, 4)
    main(command)
    assert "--checkpoint.resume none: not used" in capsys.readouterr().out
    same(tmp_path / "new", whole)


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_overwriting_moves_what_is_there_and_its_restarts_go_on(
    resume: str, whole: Path, other_run: Path, model_dir: Path, alpaca_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = {p.relative_to(other_run): data for p, data in everything(other_run).items()}
    command = flags(model_dir, alpaca_file, other_run, "--checkpoint.overwrite", "true", "--checkpoint.resume", resume)
    kill(command, 4)
    (aside,) = other_run.glob("replaced-*")
    assert f"moved to {aside}: checkpoints, config.toml, metrics.jsonl" in capsys.readouterr().out
    assert {p.relative_to(aside): data for p, data in everything(aside).items()} == before
    main(command)
    assert "2 steps done" in capsys.readouterr().out
    same(other_run, whole)
    assert list(other_run.glob("replaced-*")) == [aside]
    # Once it is finished, the same command means to start over.
    main(command)
    assert len(list(other_run.glob("replaced-*"))) == 2
    same(other_run, whole)


def test_a_finished_run_is_never_replaced_unasked(
    whole: Path, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = everything(out)
    for more in ((), ("--checkpoint.resume", "none"), ("--checkpoint.resume", whole / "checkpoints" / "step_00000002")):
        with pytest.raises(SystemExit):
            main(flags(model_dir, alpaca_file, out, *more))
        assert f"{out} holds a finished run ({out / 'adapter'})" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(flags(model_dir, alpaca_file, out, "--finetune.method", "full"))
    assert "holds the result of another method" in capsys.readouterr().err
    assert everything(out) == before


def test_metrics_of_another_run_that_came_to_no_checkpoint_are_kept(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = flags(model_dir, alpaca_file, out, "--checkpoint.every", 0)
    kill(command, 4)
    before = (out / "metrics.jsonl").read_bytes()
    assert before
    main([*command, "--optim.lr", "1e-3"])
    (aside,) = out.glob("replaced-*")
    assert f"moved to {aside}: config.toml, metrics.jsonl" in capsys.readouterr().out
    assert (aside / "metrics.jsonl").read_bytes() == before
    assert [step for step, _ in rows(out)] == list(range(1, 9))


def test_metrics_of_the_same_run_come_again(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = flags(model_dir, alpaca_file, out, "--checkpoint.every", 0)
    kill(command, 4)
    before = rows(out)
    main(command)
    assert rows(out)[: len(before)] == before
    assert not list(out.glob("replaced-*"))


def test_two_runs_do_not_write_into_one_directory(
    other_run: Path, model_dir: Path, alpaca_file: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = RunLock(other_run, 0.0, quiet)
    before = everything(other_run).keys()
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, other_run, "--parallel.timeout", 2))
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert f"{other_run}: process {os.getpid()} on " in said.err
    assert "waiting for it" in said.out
    assert everything(other_run).keys() == before
    lock.check()
    lock.release()


def test_a_run_that_has_lost_its_lock_writes_no_more(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"

    def lose() -> None:
        (out / LOCK_FILE).write_text(json.dumps(ELSEWHERE))
        time.sleep(0.5)

    at_batch(monkeypatch, 4, lose)
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, out))
    assert stopped.value.code == 2
    assert "now held by process 77 on node7 (since noon); it stops here" in capsys.readouterr().err
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step_00000002"]
    assert not (out / "adapter").exists()
    assert json.loads((out / LOCK_FILE).read_text()) == ELSEWHERE


# --- litter -------------------------------------------------------------------------------------


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    litter = [
        *("..rehearsal.abc.tmp/part", ".rehearsal/part", ".adapter.x1.tmp/adapter_model.safetensors", ".model.y.tmp/big"),
        *("checkpoints/.step_00000004.tmp/shard", "checkpoints/.step_00000002.old.tmp/state.json"),
        *(".config.toml.tmp", ".layer_ranking.csv.tmp"),
    ]
    kept = ["checkpoints/step_00000002/state.json", ".theirs.tmp", "model.tmp", ".hidden", "notes.txt"]
    for name in (*litter, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 5000)
    said = remove_litter(tmp_path)
    assert "(0.04 MB)" in said  # eight files of 5,000 bytes
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(kept)
    assert remove_litter(tmp_path) == ""


def test_a_result_that_was_being_replaced_gets_its_name_back(tmp_path: Path) -> None:
    """Killed between the two renames, its only copy has a temporary name."""
    (tmp_path / ".adapter.abc.old").mkdir()
    (tmp_path / ".adapter.abc.old" / "weights").write_text("precious")
    assert "gave" in remove_litter(tmp_path)
    assert (tmp_path / "adapter" / "weights").read_text() == "precious"
    (tmp_path / ".adapter.def.old").mkdir()  # its successor has the name: it was being removed
    remove_litter(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


# --- what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", [("--optim.lr", 1e300), ("--optim.weight_decay", 1e40, "--optim.lr", 1e3)], ids=["rate", "decay"]
)
@pytest.mark.parametrize("every", [1, 3])
def test_what_is_not_finite_never_becomes_a_checkpoint(
    every: int, setting: tuple[object, ...], model_dir: Path, alpaca_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    main(flags(model_dir, alpaca_file, out, "--train.max_steps", 2))
    shutil.rmtree(out / "adapter")
    capsys.readouterr()
    changed = ("--checkpoint.every", every, "--checkpoint.accept_changes", "optim", *setting)
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, out, *changed))
    assert stopped.value.code == 3
    said = capsys.readouterr().err
    if every == 1:
        assert "error: step 3: its update left values that are not finite in model.layers.0" in said
    else:
        assert "No longer finite, by an update that was too large: model.layers.0" in said
    assert f"The last good checkpoint is {out / 'checkpoints' / 'step_00000002'}" in said
    assert "--optim.lr" in said
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step_00000002"]
    main(flags(model_dir, alpaca_file, out))  # from there it goes on as if nothing had been
    assert [step for step, _ in rows(out)] == list(range(1, 9))


def test_a_weight_that_no_sample_reads_is_seen_too(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would show in no loss."""
    saved = Checkpoints.save

    def spoil(self: Checkpoints, *args: Any) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        state = self.optimizer.state[trained[-1]]
        state["exp_avg_sq"].view(-1)[-1] = float("inf")
        saved(self, *args)

    monkeypatch.setattr(Checkpoints, "save", spoil)
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, tmp_path / "out"))
    assert stopped.value.code == 3
    assert checkpoints(tmp_path / "out" / "checkpoints") == []
