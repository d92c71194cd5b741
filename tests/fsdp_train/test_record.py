"""`config.toml` in the output: what was in force, read back without an error or a note to the same run."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
import torch

import llama
from fsdp_train.config import RunConfig, parse_config
from fsdp_train.effects import notes
from fsdp_train.inputs import read_inputs
from fsdp_train.partial import RankedLayer
from fsdp_train.record import Facts, config_toml
from fsdp_train.settings import values_of
from fsdp_train.world import World
from peft_impl import LlamaAdapterConfig, LoraConfig, PrefixTuningConfig, add_adapter, save_adapter
from tests.fsdp_train.common import toml_line
from tests.fsdp_train.conftest import CONTEXT

CLASSIFIES = ("--finetune.head.kind", "classification")
METHODS: dict[str, tuple[str, ...]] = {
    "lora": ("--finetune.lora.rank_pattern", "q_proj=2", "--finetune.lora.target_modules", "all-linear"),
    "llama_adapter": ("--finetune.method", "llama_adapter", "--finetune.llama_adapter.adapter_layers", "2"),
    "prefix": ("--finetune.method", "prefix", "--finetune.prefix.init_std", "0.02"),
    "projected": ("--finetune.method", "prefix", "--finetune.prefix.prefix_projection", "true"),
    "full": ("--finetune.method", "full"),
    "partial": ("--finetune.method", "partial", "--finetune.partial.train", "last:2,-norms"),
    "ranked": ("--finetune.method", "partial", "--finetune.partial.select", "gradient_norm:1"),
    "head": ("--finetune.method", "head", "--finetune.head.hidden", "8,4"),
    "classifier": ("--finetune.method", "head", *CLASSIFIES),
    "classifier with lora": CLASSIFIES,
}
PARALLEL: dict[str, tuple[str, ...]] = {
    "auto": (),
    "ddp": ("--parallel.strategy", "ddp", "--parallel.precision", "bf16"),
    "fsdp": ("--parallel.strategy", "fsdp", "--parallel.sharding", "shard_grad_op", "--checkpoint.every", "0"),
    "fsdp2": ("--parallel.strategy", "fsdp2", "--parallel.compile", "true", "--train.grad_accum", "2"),
    "no_sync": ("--parallel.strategy", "ddp", "--train.grad_accum", "2", "--parallel.no_sync", "true"),
}


def world(processes: int) -> World:
    return World(0, processes, 0, processes, torch.device("cpu"))


def written(config: RunConfig, processes: int, first_step: int = 0, output: str = "runs/lora-007") -> str:
    """What a run with these settings would write."""
    inputs = read_inputs(config, world(processes), lambda line: None)
    ranking = [RankedLayer(i, 1.0, 1.0, i == 1) for i in range(3)]
    facts = Facts(inputs, world(processes), torch.float32, Path(output), first_step, ranking)
    return config_toml(config, facts)


@pytest.fixture
def labels_file(tmp_path: Path) -> Path:
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(f'{{"text": "one {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(6)))
    return path


@pytest.fixture
def files(model_dir: Path, alpaca_file: Path, labels_file: Path) -> dict[bool, list[str]]:
    """Model and data, by whether there is a classifier."""
    return {
        classifies: ["--model.path", str(model_dir), "--data.path", str(labels_file if classifies else alpaca_file)]
        for classifies in (False, True)
    }


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("method", METHODS)
def test_it_reads_back_to_the_same_settings_without_a_note(
    method: str, parallel: str, processes: int, files: dict[bool, list[str]], tmp_path: Path
) -> None:
    flags = [*files["classification" in METHODS[method]], *METHODS[method], *PARALLEL[parallel], "--train.output_dir", "out"]
    config = parse_config([*flags, "--train.seed", "3"])
    assert notes(config, processes) == []
    text = written(config, processes)
    file = tmp_path / "config.toml"
    file.write_text(text)
    again = parse_config(["--config", str(file)])
    assert again == config
    for other in (1, 2) if parallel == "auto" else (processes,):
        again.check_strategy(other)
        assert notes(again, other) == []
    assert written(again, processes).replace("lora_alpha = 16.0", "lora_alpha = 16") == text
    assert f"[finetune.{config.finetune.method}]" in text or config.finetune.method == "full"
    others = {"lora", "llama_adapter", "prefix", "partial"} - {config.finetune.method}
    assert not [other for other in others if f"[finetune.{other}]" in text]


def test_it_says_what_was_chosen(files: dict[bool, list[str]], model_dir: Path, tmp_path: Path) -> None:
    flags = [*files[False], "--train.epochs", "2", "--train.max_shard_gb", "2"]
    lines = written(parse_config(flags), 1).splitlines()
    for line in (
        'strategy = "auto"  # none for one process', 'precision = "auto"  # fp32', 'dtype = "auto"  # fp32',
        'format = "auto"  # alpaca', f'max_length = "none"  # {CONTEXT}, the model\'s context', "epochs = 2  # 2: 10 steps",
        f'tokenizer = ""  # {model_dir / "tokenizer.model"}', '# output_dir = ""  # runs/lora-007 was chosen',
        'resume = "auto"  # from the start',
    ):  # fmt: skip
        assert line in lines, line
    assert not [line for line in lines if "max_shard_gb" in line]
    lines = written(parse_config([*files[False], *METHODS["ranked"], "--parallel.compile", "true"]), 2, 5).splitlines()
    for line in (
        'strategy = "auto"  # fsdp2 for 2 processes with --parallel.compile true', 'resume = "auto"  # from step 5',
        'select = "gradient_norm:1"  # decoder layers 1', 'epochs = "none"  # 1: 3 steps',
    ):  # fmt: skip
        assert line in lines, line
    classifier = written(parse_config([*files[True], *METHODS["classifier"]]), 1).splitlines()
    assert 'num_labels = "none"  # 2' in classifier
    assert 'encoder_hidden_size = "none"  # 32' in written(parse_config([*files[False], *METHODS["projected"]]), 1)
    assert '# output_dir = ""  # a\\U0000000ab was chosen\n' in written(parse_config(files[False]), 1, output="a\nb")
    strange = parse_config([*files[False], "--train.output_dir", "a\nb = 3  # c\\"])
    assert tomllib.loads(written(strange, 1))["train"]["output_dir"] == "a\nb = 3  # c\\"


def test_what_was_given_stays_as_it_was_given(files: dict[bool, list[str]], tmp_path: Path) -> None:
    """A default that was given is written on any number of processes, and a path is not made absolute."""
    flags = [*files[False], "--parallel.reduce_dtype", "fp32", "--checkpoint.resume", "some/step_00000005"]
    text = written(parse_config([*flags, "--train.output_dir", "./out/"]), 2)
    assert 'reduce_dtype = "fp32"' in text
    assert 'resume = "some/step_00000005"\n' in text
    assert 'output_dir = "./out/"\n' in text
    assert "reduce_dtype" not in written(parse_config(files[False]), 2)


CONTINUED = {
    "lora": LoraConfig(r=16, lora_alpha=64, target_modules=("q_proj", "k_proj"), lora_dropout=0.25),
    "llama_adapter": LlamaAdapterConfig(3, 2, "head", "tanh"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4),
}


@pytest.mark.parametrize("method", CONTINUED)
def test_an_adapters_own_settings_are_comments(
    method: str, files: dict[bool, list[str]], model_dir: Path, tmp_path: Path
) -> None:
    model = llama.load(model_dir)
    add_adapter(model, CONTINUED[method])
    with pytest.warns(UserWarning, match="never trained"):
        save_adapter(model, tmp_path / "adapter")
    flags = [*files[False], "--finetune.from_adapter", str(tmp_path / "adapter"), "--train.output_dir", "out"]
    config = parse_config(flags)
    text = written(config, 1)
    file = tmp_path / "config.toml"
    file.write_text(text)
    found = tomllib.loads(text)["finetune"]
    assert (found["method"], found[method]) == (method, {})
    for name, value in values_of(CONTINUED[method], f"finetune.{method}.").items():
        if name not in ("finetune.prefix.init_std", "finetune.prefix.encoder_hidden_size"):
            (line,) = (line for line in text.splitlines() if line.startswith(f"# {name.rpartition('.')[2]} = "))
            assert line.endswith("  # the adapter's")
            assert tomllib.loads(line[2:]) == tomllib.loads(toml_line(name.rpartition(".")[2], value))
    again = parse_config(["--config", str(file)])
    assert (again, notes(again, 1)) == (config, [])
    # What was given, and is the adapter's, stays a setting; so does a dropout of this training.
    if method == "lora":
        config = parse_config([*flags, "--finetune.lora.r", "16", "--finetune.lora.lora_dropout", "0"])
        file.write_text(written(config, 1))
        assert tomllib.loads(file.read_text())["finetune"]["lora"] == {"r": 16, "lora_dropout": 0.0}
        assert parse_config(["--config", str(file)]) == config
    # In Python nobody says what was given: what differs from its default is written.
    unknown = dataclasses.replace(config, given=None)
    file.write_text(written(unknown, 1))
    assert parse_config(["--config", str(file)]) == config
