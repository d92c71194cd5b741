"""What the user keeps of whole models: files that transformers opens, the base's own bits where nothing trained, one tensor at
a time, and a rehearsal that ends a run before work is put into it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import llama
from fsdp_train import artefact
from fsdp_train.checkpoint import CheckpointConfig, room_for
from fsdp_train.checkpoint_files import checkpoints
from fsdp_train.config import parse_config
from fsdp_train.main import complete, main
from fsdp_train.run import Run
from fsdp_train.strategy import ParallelConfig
from fsdp_train.world import World, process_group
from llama.errors import InputError
from tests.fsdp_train.conftest import CONTEXT
from tests.launch import spawn
from tests.llama.common import files_below, full_disk
from tests.oracle import largest

LOGITS = 1e-4  # fp32, logits up to 20 in size, eager against SDPA
SMALL = 0.0001  # GB per file: several files for the tiny model
WEIGHTS = "model.safetensors"
IDS = torch.arange(3, 40)[None]


PARTIAL = ("partial", "--finetune.partial.train", "last:1,norm")


def flags(model: Path, data: Path, out: Path, *more: object, method: tuple[str, ...] = PARTIAL) -> list[str]:
    chosen = [
        *("--model.path", model, "--data.path", data, "--train.output_dir", out, "--train.max_steps", 2),
        *("--train.samples", 0, "--finetune.method", *method, *more),
    ]
    return list(map(str, chosen))


def trains(name: str) -> bool:
    return name.startswith(("model.layers.2.", "model.norm."))


@pytest.fixture(scope="module")
def mixed_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in bf16, its norms in fp32, as some are published."""
    path = tmp_path_factory.mktemp("mixed") / "model"
    shutil.copytree(model_dir, path)
    tensors = {n: t if "norm" in n else t.bfloat16() for n, t in load_file(model_dir / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path


def opened(path: Path) -> nn.Module:
    """By transformers, with nothing missing and nothing left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base", ["model_dir", "mixed_dir"])
def test_what_did_not_train_is_the_base_files_own(
    base: str, precision: str, alpaca_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Bits and dtypes, whatever the computation's dtype, and fp32 for what did; and transformers means the same by the files
    as we do."""
    source = request.getfixturevalue(base)
    main(flags(source, alpaca_file, tmp_path / "out", "--parallel.precision", precision, "--optim.lr", 1e-2))
    before, after = (load_file(path / WEIGHTS) for path in (source, tmp_path / "out" / "model"))
    assert all(t.dtype == (torch.float32 if trains(name) else before[name].dtype) for name, t in after.items())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(filter(trains, before))
    theirs = opened(tmp_path / "out" / "model")
    with torch.no_grad():
        assert largest(theirs(IDS).logits, llama.load(tmp_path / "out" / "model")(IDS)) < LOGITS
    assert not (tmp_path / "out" / ".rehearsal").exists()


@pytest.mark.parametrize(("asked", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_file_has_the_dtype_that_was_asked_for(
    asked: str, dtype: torch.dtype, mixed_dir: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    main(flags(mixed_dir, alpaca_file, tmp_path / "out", "--model.dtype", asked, "--parallel.precision", "fp32"))
    before, after = (load_file(path / WEIGHTS) for path in (mixed_dir, tmp_path / "out" / "model"))
    assert {t.dtype for t in after.values()} == {dtype}
    assert all(torch.equal(after[name], before[name].to(dtype)) for name in before if not trains(name))


def test_a_base_in_metas_format_becomes_the_same_files(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    llama.save_meta(llama.load(model_dir), tmp_path / "meta", shards=2)
    for name, source in (("hf", model_dir), ("meta", tmp_path / "meta")):
        more = ("--model.tokenizer", model_dir, "--parallel.precision", "fp32", "--data.max_length", CONTEXT)
        main(flags(source, alpaca_file, tmp_path / f"{name} run", *more))
    hf, meta = (load_file(tmp_path / f"{name} run" / "model" / WEIGHTS) for name in ("hf", "meta"))
    assert all(torch.equal(hf[name], meta[name]) for name in hf)
    opened(tmp_path / "meta run" / "model")


def test_a_limit_makes_several_files_with_an_index(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    for name, more in (("one", ()), ("several", ("--train.max_shard_gb", SMALL))):
        main(flags(model_dir, alpaca_file, tmp_path / name, *more))
    path = tmp_path / "several" / "model"
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    for file in files:
        sizes = [t.nbytes for t in load_file(file).values()]
        assert sum(sizes) <= SMALL * 1e9 or len(sizes) == 1
    one, several = opened(tmp_path / "one" / "model").state_dict(), opened(path).state_dict()
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_the_expected_size_is_that_of_the_weights(mixed_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    run = Run(parse_config(flags(mixed_dir, alpaca_file, tmp_path / "out")), World(0, 1, 0, 1, torch.device("cpu")))
    complete(run)
    tensors = load_file(tmp_path / "out" / "model" / WEIGHTS)
    assert run.artefact.expected_bytes == sum(t.nbytes for t in tensors.values())
    assert run.bytes == sum(p.stat().st_size for p in (tmp_path / "out" / "model").iterdir())


# --- before the first step ----------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_the_disk_must_have_room_for_the_result_and_the_checkpoints(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 bytes for each parameter, and 12 for each that trains in each checkpoint: those that are kept, and one more."""
    tensors = load_file(model_dir / WEIGHTS)
    result = sum(t.nbytes for t in tensors.values())
    trained = sum(t.numel() for name, t in tensors.items() if trains(name))
    out = tmp_path / "out"
    for every, together in ((0, 0), (1, 3), (3, 2), (9, 1)):  # of 6 steps; one at the end in any case
        more = ("--train.max_steps", 6, "--checkpoint.every", every, "--checkpoint.resume", "none")
        needed = result + 12 * trained * together
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=needed - 1: Usage(10**12, 0, free))
        with pytest.raises(SystemExit) as stopped:
            main(flags(model_dir, alpaca_file, out, *more))
        said = capsys.readouterr()
        assert stopped.value.code == 2
        assert said.err == (
            f"error: --train.output_dir {out}: the run needs {needed / 1e9:.2f} GB there (the result {result / 1e9:.2f},"
            f" checkpoints {12 * trained * together / 1e9:.2f}), {(needed - 1) / 1e9:.2f} GB are free"
            + " (--checkpoint.every 0 writes no checkpoints)" * (every > 0)
            + "\n"
        )
        assert "step 1/" not in said.out
        assert not {"model", "checkpoints", ".rehearsal"} & set(files_below(out))
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=needed: Usage(10**12, 0, free))
        main(flags(model_dir, alpaca_file, out, *more))  # the same command, with a byte more
        files = [path / "shard-00001-model-00001-of-00001.safetensors" for path in checkpoints(out / "checkpoints")]
        written = sum(t.nbytes for file in files for t in load_file(file).values())
        steps = 4 * sum(map(trains, tensors))  # AdamW's count of steps, per tensor
        kept = min(together, 2)
        assert written == kept * (12 * trained + steps)
        shutil.rmtree(out)


def test_a_resumed_run_needs_room_for_what_is_still_to_come() -> None:
    config = CheckpointConfig(every=10, keep=2)
    for present, needed in ((0, 3), (1, 2), (2, 1), (3, 0)):
        assert room_for(config, present, 1000, 100, 0) == 12_000 * needed
        assert room_for(config, present, 1000, 100, 5) == 12_000 * (needed + 1)  # and the best
    assert room_for(CheckpointConfig(every=0), 0, 1000, 100, 5) == 0
    assert room_for(CheckpointConfig(every=99, keep=9), 0, 1000, 100, 0) == 24_000  # on the way, and at the end


@pytest.mark.parametrize("method", ["partial", "lora"])
def test_a_disk_that_fills_up_ends_the_run_before_its_first_step(
    method: str, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by writing all of it, whatever the system says of the room; the same command then works on a larger disk."""
    out = tmp_path / "out"
    large = ("lora", "--finetune.lora.r", "64")
    command = flags(model_dir, alpaca_file, out, method=large if method == "lora" else PARTIAL)
    with full_disk(), pytest.raises(SystemExit) as stopped:
        main(command)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith(f"error: {out / '.rehearsal'} cannot be written: ")
    assert said.err.count("\n") == 1
    assert "step 1/" not in said.out
    assert not out.exists()
    main(command)
    assert {p.name for p in out.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "checkpoints",
        "adapter" if method == "lora" else "model",
    }


def test_a_directory_that_takes_no_other_ends_the_run_before_its_first_step(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may write anywhere, so the answer is made up."""

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(SystemExit) as stopped:
        main(flags(model_dir, alpaca_file, tmp_path / "out"))
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err == f"error: {tmp_path / 'out'} cannot be written: Permission denied\n"
    assert "step 1/" not in said.out
    assert not (tmp_path / "out").exists()


def test_a_rehearsal_that_was_killed_is_in_nobodys_way(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".rehearsal").mkdir(parents=True)
    (tmp_path / "out" / ".rehearsal" / WEIGHTS).write_bytes(b"half")
    main(flags(model_dir, alpaca_file, tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.toml", "metrics.jsonl", "checkpoints", "model"}


def test_a_run_that_is_refused_spares_the_one_before(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Starting over in its directory: nothing of it goes before it is known that the new result can be kept."""
    out = tmp_path / "out"
    command = flags(model_dir, alpaca_file, out, "--checkpoint.every", 1)
    main(command)
    before = {name: (out / name).read_bytes() for name in files_below(out) if (out / name).is_file()}
    assert any(name.startswith("checkpoints/") for name in before)
    with full_disk(), pytest.raises(SystemExit):
        main([*command, "--checkpoint.overwrite", "true", "--optim.lr", "1e-3"])
    assert {name: (out / name).read_bytes() for name in files_below(out) if (out / name).is_file()} == before


def test_a_resumed_run_does_not_rehearse_again(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main(flags(model_dir, alpaca_file, out, "--checkpoint.every", 1))
    shutil.rmtree(out / "model")
    monkeypatch.setattr(artefact.Artefact, "rehearse", lambda self, model: pytest.fail("rehearsed"))
    main(flags(model_dir, alpaca_file, out, "--checkpoint.every", 1))
    assert (out / "model" / WEIGHTS).exists()


# --- two processes ------------------------------------------------------------------------------------------------------


def watched(seen: list[StorageWeakRef], most: list[int]) -> Any:
    """`trained_tensors`, counting how many of the tensors that it has made are alive when it makes another."""
    original = artefact.trained_tensors

    def tensors(model: nn.Module, world: World) -> Iterator[tuple[str, Tensor]]:
        for item in original(model, world):
            seen.append(StorageWeakRef(item[1].untyped_storage()))
            most.append(sum(not ref.expired() for ref in seen))
            yield item
            del item

    return tensors


def saving(rank: int, model_dir: Path, data: Path, out: Path) -> dict[str, Any]:
    """A whole run, and one that cannot write its rehearsal on rank 0."""
    found: dict[str, Any] = {}
    with process_group(ParallelConfig()) as world:
        seen, most = [], []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(artefact, "trained_tensors", watched(seen, most))
            more = ("--parallel.precision", "fp32", "--train.max_shard_gb", SMALL)
            config = parse_config(flags(model_dir, data, out / "full", *more, method=("full",)))
            complete(Run(config, world))
        found["tensors"], found["most"] = len(seen), max(most, default=0)
        with closing(Run(parse_config(flags(model_dir, data, out / "partial")), world)) as run:
            run.prepare()
            try:
                if rank == 0:
                    with full_disk():
                        run.wrap()
                else:
                    run.wrap()
            except InputError as error:
                found["error"] = str(error)
    return found


def test_two_processes_hold_one_tensor_at_a_time_and_fail_together(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    first, second = spawn(2, saving, model_dir, alpaca_file, tmp_path, tmp_path=tmp_path)
    names = load_file(model_dir / WEIGHTS).keys()
    assert first["tensors"] == 2 * len(names)  # the rehearsal and the end
    assert (first["most"], second["most"]) == (1, 0)
    assert opened(tmp_path / "full" / "model").state_dict().keys() == names
    assert first["error"] == second["error"]
    assert first["error"].startswith(f"{tmp_path / 'partial' / '.rehearsal'} cannot be written: ")
    assert not (tmp_path / "partial").exists()
