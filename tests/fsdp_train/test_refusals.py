"""Wrong input, from the command line: one readable line, exit code 2, and nothing is written."""

from __future__ import annotations

import gc
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llama
from fsdp_train.main import main
from peft_impl import LoraConfig, add_adapter, save_adapter
from tests.fsdp_train.conftest import CONTEXT, VOCAB
from tests.launch import torchrun

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PAIRS = '{"prompt": "a", "completion": "b"}\n' * 4


@dataclass
class Place:
    """A directory of one test with what it may damage: copies of a model, an adapter, a checkpoint, and files."""

    tmp: Path
    model_dir: Path
    adapter_dir: Path

    def file(self, text: str | bytes, name: str = "data.jsonl") -> Path:
        (self.tmp / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.tmp / name

    def model(self, without: str = "", **settings: Any) -> Path:
        """A copy of the model without one file, or with other settings in config.json."""
        return _changed(shutil.copytree(self.model_dir, self.tmp / "model"), without, CONFIG, settings)

    def adapter(self, without: str = "", **settings: Any) -> Path:
        return _changed(shutil.copytree(self.adapter_dir, self.tmp / "adapter"), without, ADAPTER_CONFIG, settings)

    def checkpoint(self, state: dict[str, Any]) -> Path:
        (self.tmp / "step_00000005").mkdir()
        (self.tmp / "step_00000005" / "state.json").write_text(json.dumps(state))
        return self.tmp / "step_00000005"

    def output(self, name: str) -> Path:
        """An output directory that holds a directory of this name."""
        (self.tmp / "out" / name).mkdir(parents=True)
        return self.tmp / "out"


def _changed(path: Path, without: str, config: str, settings: dict[str, Any]) -> Path:
    if without:
        (path / without).unlink()
    if settings:
        (path / config).write_text(json.dumps({**json.loads((path / config).read_text()), **settings}))
    return path


def cut(directory: Path, name: str, size: int) -> Path:
    """The same directory with one file cut to `size` bytes."""
    (directory / name).write_bytes((directory / name).read_bytes()[:size])
    return directory


def tensors(directory: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The same directory with other tensors in one of its files."""
    found = {key: tensor.clone() for key, tensor in load_file(directory / name).items()}
    change(found)
    save_file(found, directory / name)
    return directory


def cut_tensors(directory: Path, name: str) -> Path:
    """The same directory with a safetensors file whose header is whole and promises more than there is."""
    length = struct.unpack("<Q", (directory / name).read_bytes()[:8])[0]
    return cut(directory, name, 8 + length + 100)


NORM, Q_A = "model.norm.weight", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LONG_PROMPTS = "".join(json.dumps({"prompt": "x" * 600, "completion": "y"}) + "\n" for _ in range(3))
MASKED = '{"input_ids": [5, 6], "labels": [-100, -100]}\n' * 3
NAN = float("nan")

# --- one flag that names something wrong: flag -> what is wrong -> (what it names, a part of the message) -----------------

STATE = {  # of a checkpoint that nothing is wrong with
    **{"format": 2, "step": 5, "epoch": 0, "samples": 20, "samples_per_epoch": 40, "best": None},
    **{"files": {}, "loss_scale": [1, 0], "identity": {}, "settings": {}, "command": "", "ranking": []},
}

PATHS: dict[str, dict[str, tuple[Callable[[Place], object], str]]] = {
    "model.path": {
        "nothing": (lambda p: p.tmp / "nothing", "nothing is not a directory; expected a Hugging Face or Meta model directory"),
        "a file": (lambda p: p.file("x"), "data.jsonl is not a directory; expected a Hugging Face or Meta model directory"),
        "no model": (
            lambda p: p.adapter(ADAPTER_CONFIG),
            "has neither config.json (Hugging Face) nor params.json (Meta); found",
        ),
        "no weights": (lambda p: p.model(WEIGHTS), "has a config.json but no weights; expected model.safetensors"),
        "no bytes": (lambda p: cut(p.model(), WEIGHTS, 0), "model.safetensors is damaged or not a safetensors file"),
        "a cut header": (lambda p: cut(p.model(), WEIGHTS, 100), "model.safetensors is damaged or not a safetensors file"),
        "cut tensors": (lambda p: cut_tensors(p.model(), WEIGHTS), "model.safetensors is damaged or not a safetensors file"),
        "no tensors": (
            lambda p: tensors(p.model(), WEIGHTS, dict.clear),
            "embed_tokens.weight is missing; found no tensors",
        ),
        "a tensor less": (
            lambda p: tensors(p.model(), WEIGHTS, lambda t: t.pop(NORM)),
            "1 tensors are missing: model.norm.weight",
        ),
        "a tensor more": (
            lambda p: tensors(p.model(), WEIGHTS, lambda t: t.update({"model.nrom.weight": torch.ones(1)})),
            "1 tensors do not belong to this model: model.nrom.weight - did you mean 'model.norm.weight'?",
        ),
        "a wrong shape": (
            lambda p: tensors(p.model(), WEIGHTS, lambda t: t.update({NORM: torch.ones(63)})),
            "model.norm.weight has shape (63,); the configuration says (64,)",
        ),
        "cut settings": (lambda p: cut(p.model(), CONFIG, 30), "config.json:"),
        "too many layers": (lambda p: p.model(num_hidden_layers=4), "the weights have 3 layers; the configuration says 4"),
        "too few layers": (lambda p: p.model(num_hidden_layers=2), "the weights have 3 layers; the configuration says 2"),
        "other heads": (lambda p: p.model(num_key_value_heads=4), "has shape (32, 64); the configuration says (64, 64)"),
        "other width": (lambda p: p.model(intermediate_size=128), "has shape (172, 64); the configuration says (128, 64)"),
        "other vocabulary": (lambda p: p.model(vocab_size=400), "has shape (300, 64); the configuration says (400, 64)"),
        "another architecture": (lambda p: p.model(model_type="mistral"), "model_type = 'mistral' is not supported; expected"),
        "scaled positions": (
            lambda p: p.model(rope_scaling={"rope_type": "linear"}),
            "rope scaling of type 'linear' is not sup",
        ),
        "not a number": (lambda p: p.model(rms_norm_eps=NAN), "rms_norm_eps is nan; expected a positive finite number"),
        "another's tokenizer": (
            lambda p: tensors(
                p.model(vocab_size=VOCAB - 1),
                WEIGHTS,
                lambda t: t.update({name: t[name][1:].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}),
            ),
            "300 pieces, the model only 299: they do not belong tog",
        ),
        "no tokenizer": (
            lambda p: p.model("tokenizer.model"),
            "(format alpaca), and the model directory has no tokenizer.model",
        ),
        "a cut tokenizer": (lambda p: cut(p.model(), "tokenizer.model", 99), "tokenizer.model is not a sentencepiece model"),
    },
    "model.tokenizer": {
        "nothing": (lambda p: p.tmp, "tokenizer.model does not exist; expected a sentencepiece tokenizer.model"),
        "something else": (lambda p: p.file("x"), "data.jsonl is not a sentencepiece model"),
    },
    "data.path": {
        "nothing": (lambda p: p.tmp / "nothing.json", "nothing.json does not exist"),
        "a directory": (lambda p: p.tmp, "cannot be read: Is a directory"),
        "empty": (lambda p: p.file(""), "data.jsonl is empty"),
        "an empty list": (lambda p: p.file("[]"), "data.jsonl holds an empty list"),
        "a malformed line": (lambda p: p.file(PAIRS + '{"prompt": "a",'), "data.jsonl:5:16: not JSON: Expecting property name"),
        "a malformed list": (lambda p: p.file('[{"prompt"\n "a"}]'), "data.jsonl:2:2: not JSON: Expecting ':' delimiter"),
        "not UTF-8": (lambda p: p.file(b"caf\xe9"), "data.jsonl is not UTF-8: byte 3"),
        "unknown keys": (lambda p: p.file('{"prmopt": "a", "completion": "b"}'), "did you mean 'prompt'?"),
        "a key less": (
            lambda p: p.file(PAIRS + '{"prompt": "a", "competion": "b"}'),
            "data.jsonl:5: no 'completion' (format completion); found prompt, competion - did you mean 'competion'?",
        ),
        "no text": (lambda p: p.file('{"prompt": 1, "completion": "b"}'), "data.jsonl:1: 'prompt' is a number; expected text"),
        "half a character": (lambda p: p.file(r'{"text": "\ud800"}'), r"'text' holds half a character (\ud800)"),
        "no tokens": (lambda p: p.file('{"input_ids": null}'), "data.jsonl:1: 'input_ids' is not a list of whole numbers"),
        "token 300 of 300": (
            lambda p: p.file('{"input_ids": [1, 300]}'),
            "token id 300 is outside the model's vocabulary 0..299",
        ),
        "all masked": (lambda p: p.file(MASKED), "none of its 3 samples has anything to learn; every label is masked"),
        "long prompts": (lambda p: p.file(LONG_PROMPTS), f"3 were cut at {CONTEXT} tokens, before their response began"),
    },
    "data.eval_path": {
        "nothing": (lambda p: p.tmp / "nothing.json", "nothing.json does not exist"),
        "all masked": (lambda p: p.file(MASKED), "none of its 3 samples has anything to learn"),
    },
    "train.output_dir": {
        "a file": (lambda p: p.file("x"), "data.jsonl is not a directory"),
        "below a file": (lambda p: p.file("x") / "a" / "b", "data.jsonl is not a directory"),
        "a long name": (lambda p: p.tmp / ("n" * 300), "nnn cannot be written: File name too long"),
        "a finished adapter": (lambda p: p.output("adapter"), "out holds a finished run"),
        "another method's result": (lambda p: p.output("model"), "holds the result of another method"),
        "something in the way": (lambda p: p.output("metrics.jsonl"), "out cannot be written: Is a directory"),
    },
    "finetune.from_adapter": {
        "nothing": (
            lambda p: p.tmp / "nothing",
            "nothing is not a directory; expected a PEFT adapter with adapter_config.json",
        ),
        "no weights": (lambda p: p.adapter(ADAPTER_WEIGHTS), "has neither adapter_model.safetensors nor adapter_model.bin"),
        "no settings": (lambda p: p.adapter(ADAPTER_CONFIG), "adapter_config.json does not exist"),
        "cut weights": (lambda p: cut(p.adapter(), ADAPTER_WEIGHTS, 300), "adapter_model.safetensors is damaged or not a"),
        "another rank": (lambda p: p.adapter(r=4), "has shape (2, 64); this model needs (4, 64)"),
        "another method": (lambda p: p.adapter(peft_type="LOHA"), "adapter_config.json: peft_type is 'LOHA'; expected ADA"),
        "a tensor less": (
            lambda p: tensors(p.adapter(), ADAPTER_WEIGHTS, lambda t: t.pop(Q_A)),
            f"1 of 12 tensors are missing: {Q_A}",
        ),
        "NaN": (
            lambda p: tensors(p.adapter(), ADAPTER_WEIGHTS, lambda t: t[Q_A].fill_(NAN)),
            "q_proj.lora_A.weight holds NaN or infinity",
        ),
    },
    "checkpoint.resume": {
        "nothing": (lambda p: p.tmp / "step_00000005", "not a checkpoint (no state.json); expected auto, none or"),
        "something else": (lambda p: p.adapter(), "adapter: not a checkpoint (no state.json)"),
        "no state": (lambda p: p.checkpoint({}), "state.json is not the state of a checkpoint"),
        "another run": (
            lambda p: p.checkpoint({**STATE, "identity": {"optim.lr": "1"}}),
            "belongs to another run: ",
        ),
        "half a state": (
            lambda p: p.checkpoint({key: value for key, value in STATE.items() if key != "samples"}),
            "state.json is not the state of a checkpoint",
        ),
    },
    "config": {
        "nothing": (lambda p: p.tmp / "nothing.toml", "nothing.toml: cannot be read"),
        "not TOML": (lambda p: p.file("[optim]\nlr 3", "a.toml"), "a.toml: not TOML: Expected '=' after a key"),
        "an unknown key": (
            lambda p: p.file("[optim]\nrl = 3", "a.toml"),
            "unknown setting optim.rl - did you mean 'optim.lr'?",
        ),
        "a wrong value": (lambda p: p.file("[train]\nseed = 'x'", "a.toml"), "train.seed = 'x': expected a whole number"),
    },
}

# --- flags and their values ---------------------------------------------------------------------------------------------

FLAGS: list[tuple[list[str], str]] = [
    (["--train.max_stpes=5"], "unknown argument '--train.max_stpes=5' - did you mean '--train.max_steps'?"),
    (["alpaca.json"], "unknown argument 'alpaca.json'"),
    (["--finetune.method=loar"], "--finetune.method loar: expected lora or llama_adapter or prefix or full or partial or"),
    (["--checkpoint.resume=atuo"], "--checkpoint.resume atuo: not a checkpoint (no state.json); expected auto, none or"),
    (["--data.format=completion"], "alpaca.json[0]: no 'prompt' (format completion); found instruction, output"),
    (["--data.max_length=20"], "20 were cut at 20 tokens, before their response began"),
    ([f"--data.max_length={CONTEXT + 1}"], f"--data.max_length {CONTEXT + 1} is beyond the model's context of {CONTEXT}"),
    (["--data.eval_fraction=0.99"], "--data.eval_fraction 0.99 of 20 samples leaves none to train on"),
    (["--finetune.lora.r=0"], "--finetune.lora: LoRA rank r = 0; expected a positive integer"),
    (["--finetune.lora.lora_dropout=1"], "--finetune.lora: lora_dropout = 1.0; expected a probability in [0, 1)"),
    (["--finetune.lora.target_modules=q_proj,v_porj"], "'v_porj' matches no module - did you mean 'v_proj'?"),
    (["--finetune.lora.target_modules=(q|v"], "target_modules '(q|v' is not a regular expression"),
    (["--finetune.lora.target_modules=.*_prj"], "'.*_prj', read as a regular expression, matches no module path such as"),
    (["--finetune.lora.target_modules=none"], "target_modules is empty; nothing would be adapted"),
    (["--finetune.lora.layers_to_transform=0,3"], "no targeted module in layer 3; layers are 0..2"),
    (["--finetune.lora.modules_to_save=lm_heads"], "'lm_heads' matches no module - did you mean 'lm_head'?"),
    # Impossible together.
    (["--train.epochs=2"], "--train.max_steps and --train.epochs are given both; choose one"),
    (["--model.preset=demo"], "--model.path and --model.preset are given both; choose one"),
    (["--data.eval_fraction=0.1", "--data.eval_path=x"], "--data.eval_fraction and --data.eval_path are given both"),
    (["--finetune.from_adapter=x", "--finetune.method=full"], "from_adapter goes with --finetune.method lora or llama_adapter"),
    (["--train.eval_every=5"], "--train.eval_every needs held-out data: --data.eval_path or --data.eval_fraction"),
    (
        ["--finetune.method=full", "--finetune.lora.r=4"],
        "--finetune.lora.r 4 has no effect: --finetune.method is full, which does not use it",
    ),
    (["--finetune.method=llama_adapter"], "adapter_layers = 30; the model has 3 layers"),
    (["--finetune.method=prefix", "--finetune.prefix.init_std=0"], "--finetune.prefix: init_std = 0.0; expected a positive"),
    (["--train.exact_match=5"], "--train.exact_match needs held-out data: --data.eval_path or --data.eval_fraction"),
    (["--model.path=", "--model.preset=demo"], "which only --finetune.method full can train"),
    (["--model.path=", "--model.preset=dmo", "--finetune.method=full"], "--model.preset dmo: expected"),
    (["--model.path="], "no model: give --model.path DIR"),
    (["--data.path="], "no data: give --data.path FILE"),
    *(
        ([f"--{name}={value}"], f"--{name} {value}: expected")
        for name, values in {
            "optim.lr": "0.0 -1.0 nan inf fast", "optim.weight_decay": "-0.1", "optim.grad_clip": "-1.0",
            "optim.warmup_steps": "-1 0.5", "optim.schedule": "cosin", "train.max_steps": "0 -1 1e3",
            "train.batch_size": "0 1.5", "train.grad_accum": "0", "train.seed": "-1", "train.eval_every": "-1",
            "train.samples": "-1", "train.sample_tokens": "0", "train.exact_match": "-1", "data.max_length": "0 1",
            "data.shuffle": "yes", "data.eval_fraction": "1.0 -0.1 nan",
            "checkpoint.every": "-1", "checkpoint.keep": "0", "log.every": "0",
            "parallel.timeout": "0 99999999999999999", "parallel.precision": "fp64", "model.dtype": "fp8",
        }.items()
        for value in values.split()
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def adapter_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 2 on the model."""
    model = llama.load(model_dir)
    add_adapter(model, LoraConfig(r=2))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.fill_(0.01)
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, path)
    return path


@pytest.fixture
def place(tmp_path: Path, model_dir: Path, adapter_dir: Path) -> Place:
    return Place(tmp_path, model_dir, adapter_dir)


def everything_in(path: Path) -> dict[str, bytes | None]:
    """All files and directories below, with the files' contents."""
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def refused(place: Place, alpaca_file: Path, flags: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run one step with these flags, later ones winning; it must refuse in the way of all refusals. Returns the message."""
    before = everything_in(place.tmp)
    common = [f"--model.path={place.model_dir}", f"--data.path={alpaca_file}", f"--train.output_dir={place.tmp / 'out'}"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--train.max_steps=1", "--train.samples=0", *map(str, flags)])
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert everything_in(place.tmp) == before
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "step 1/" not in said.out
    return said.err.removeprefix("error: ").rstrip("\n")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """The program collects garbage at its end; what these tests have imported needs no second look each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not under torchrun, whatever runs these tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("flag", "wrong"), [(flag, wrong) for flag, cases in PATHS.items() for wrong in cases])
def test_what_a_flag_names_is_wrong(
    flag: str, wrong: str, place: Place, alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = PATHS[flag][wrong]
    assert message in refused(place, alpaca_file, [f"--{flag}={make(place)}"], capsys)


@pytest.mark.parametrize(("flags", "message"), FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_a_flag_is_wrong(
    flags: list[str], message: str, place: Place, alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(place, alpaca_file, flags, capsys)


def test_texts_cannot_be_compared_without_a_tokenizer(
    place: Place, alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = place.file('{"input_ids": [1, 5]}\n' * 4)
    flags = [f"--model.path={place.model('tokenizer.model')}", f"--data.path={tokens}", "--data.eval_fraction=0.5"]
    message = refused(place, alpaca_file, [*flags, "--train.exact_match=2"], capsys)
    assert message == "--train.exact_match compares texts; give --model.tokenizer"


def test_one_sample_cannot_be_split(place: Place, alpaca_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--data.path={place.file(json.dumps({'text': 'one text'}))}", "--data.eval_fraction=0.1"]
    assert "--data.eval_fraction 0.1 of 1 samples leaves none to train on" in refused(place, alpaca_file, flags, capsys)


def test_nothing_is_wrong_with_what_the_cases_change(
    place: Place, alpaca_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same flags without a change train, with the adapter too: each case above is refused for its own reason."""
    flags = [f"--model.path={place.model()}", f"--data.path={alpaca_file}", f"--train.output_dir={place.tmp / 'out'}"]
    main([*flags, "--train.max_steps=1", "--train.samples=0", f"--finetune.from_adapter={place.adapter()}"])
    assert (place.tmp / "out" / "adapter" / ADAPTER_WEIGHTS).exists()
    assert capsys.readouterr().err == ""


def test_an_output_that_may_not_be_written(
    place: Place, alpaca_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of the system, before anything is read; root may do everything, so the answer is made up."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"{place.tmp} cannot be written" in refused(place, alpaca_file, [], capsys)


def test_an_output_that_the_system_refuses(
    place: Place, alpaca_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although access looked fine: a full disk, a file system that is read-only."""

    def mkdir(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert "out cannot be written: No space left on device" in refused(place, alpaca_file, [], capsys)


def test_one_model_for_several_processes(
    place: Place, alpaca_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the processes look for each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(place, alpaca_file, ["--parallel.strategy=none"], capsys)
    assert "--parallel.strategy none with 2 processes would train 2 models apart" in message


def test_other_ranks_are_silent(
    place: Place, alpaca_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        main(["--train.max_stpes", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""


def test_two_processes_stop_together_with_one_message(place: Place) -> None:
    """Through torchrun: the line is there, once; the exit code says so; nothing is left behind."""
    data = place.file(PAIRS + '{"prompt": "a", "completion"')
    flags = ("--model.path", place.model_dir, "--data.path", data, "--train.output_dir", place.tmp / "out")
    done = torchrun(2, *flags, "--train.max_steps", 1, check=False)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {data}:5:29: not JSON: Expecting ':' delimiter"
    ]
    assert "Traceback (most recent call last)" not in done.stderr.split("error: ")[0]
    assert not (place.tmp / "out").exists()
