"""Continuing from an adapter: its own settings hold, and a given one that says something else is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llama
from fsdp_train.build import FinetuneConfig, ModelConfig, build_model
from fsdp_train.config import RunConfig, parse_config
from fsdp_train.from_adapter import continued, training_notes
from fsdp_train.main import main
from fsdp_train.settings import parse_flags
from llama.errors import InputError
from llama.weight_files import open_weights
from peft_impl import LlamaAdapterConfig, LoraConfig, PrefixTuningConfig, add_adapter, read_adapter, save_adapter
from peft_impl.dropout import Dropout
from tests.fsdp_train.common import toml_line

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(
        r=16, lora_alpha=64, lora_dropout=0.25, target_modules=ALL, layers_to_transform=(2, 1), use_rslora=True
    ),
    "plain": LoraConfig(),
    "head": LoraConfig(modules_to_save=("lm_head",)),
    "patterns": LoraConfig(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 4.0}, use_dora=True),
    "llama_adapter": LlamaAdapterConfig(3, 2, "head", "tanh"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of each of these adapters."""
    root = tmp_path_factory.mktemp("adapters")

    def path(name: str) -> Path:
        if not (root / name).exists():
            model = llama.load(model_dir)
            add_adapter(model, CONFIGS[name])
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    parameter += 0.01
            save_adapter(model, root / name)
        return root / name

    return path


def config_of(path: Path, *flags: str) -> FinetuneConfig:
    return parse_config(["--finetune.from_adapter", str(path), *flags]).finetune


@pytest.mark.parametrize("name", CONFIGS)
def test_method_and_settings_are_the_adapters(name: str, saved: Callable[[str], Path]) -> None:
    """On the demo, too, whose own settings nobody has given."""
    found = config_of(saved(name))
    method = {"head": "lora", "plain": "lora", "patterns": "lora"}.get(name, name)
    assert found.method == method
    assert getattr(found, method) == read_adapter(saved(name))[0]


AGREEING: list[tuple[str, list[str]]] = [
    ("lora", ["--finetune.method", "lora", "--finetune.lora.r", "16", "--finetune.lora.lora_alpha", "64"]),
    ("lora", ["--finetune.lora.target_modules", ",".join(reversed(ALL)), "--finetune.lora.use_rslora", "true"]),
    ("lora", ["--finetune.lora.target_modules", "all-linear", "--finetune.lora.layers_to_transform", "1,2"]),
    ("lora", ["--finetune.lora.modules_to_save", "none", "--finetune.lora.use_dora", "false"]),
    ("plain", ["--finetune.lora.r", "8", "--finetune.lora.layers_to_transform", "none"]),
    ("head", ["--finetune.lora.modules_to_save", "lm_head"]),
    ("patterns", ["--finetune.lora.rank_pattern", "q_proj=2", "--finetune.lora.alpha_pattern", "v_proj=4"]),
    ("llama_adapter", ["--finetune.method", "llama_adapter", "--finetune.llama_adapter.gate", "head"]),
    ("prefix", ["--finetune.prefix.num_virtual_tokens", "4", "--finetune.prefix.init_std", "1"]),
]

CONTRADICTING: list[tuple[str, list[str], str]] = [
    # As the default, or as nothing that was ever said:
    ("lora", ["--finetune.lora.r", "8"], "--finetune.lora.r 8, but the adapter {path} has r 16;"),
    (
        "lora",
        ["--finetune.lora.lora_alpha", "16"],
        "--finetune.lora.lora_alpha 16.0, but the adapter {path} has lora_alpha 64;",
    ),
    ("lora", ["--finetune.lora.use_rslora", "false"], "use_rslora false, but the adapter {path} has use_rslora true"),
    ("lora", ["--finetune.lora.target_modules", "q_proj,v_proj"], "target_modules q_proj,v_proj, but the adapter {path} has"),
    ("lora", ["--finetune.lora.layers_to_transform", "none"], "layers_to_transform none, but the adapter {path} has"),
    ("head", ["--finetune.lora.modules_to_save", "none"], "modules_to_save none, but the adapter {path} has"),
    ("patterns", ["--finetune.lora.rank_pattern", "none"], "rank_pattern none, but the adapter {path} has rank_pattern q_"),
    ("patterns", ["--finetune.lora.use_dora", "false"], "use_dora false, but the adapter {path} has use_dora true"),
    ("llama_adapter", ["--finetune.llama_adapter.gate", "scalar"], "gate scalar, but the adapter {path} has gate head"),
    ("llama_adapter", ["--finetune.llama_adapter.adapter_layers", "30"], "30, but the adapter {path} has adapter_layers 2"),
    ("prefix", ["--finetune.prefix.num_virtual_tokens", "30"], "30, but the adapter {path} has num_virtual_tokens 4"),
    ("prefix", ["--finetune.prefix.prefix_projection", "true"], "true, but the adapter {path} has prefix_projection false"),
    # As something else:
    ("plain", ["--finetune.lora.r", "4"], "--finetune.lora.r 4, but the adapter {path} has r 8"),
    ("plain", ["--finetune.lora.target_modules", "all-linear"], "all-linear, but the adapter {path} has target_modules"),
    ("plain", ["--finetune.method", "prefix"], "--finetune.method prefix, but the adapter {path} has method lora"),
    ("prefix", ["--finetune.method", "lora"], "--finetune.method lora, but the adapter {path} has method prefix"),
    ("prefix", ["--finetune.lora.r", "4"], "--finetune.lora.r 4 has no effect: --finetune.method is prefix"),
    ("prefix", ["--finetune.prefix.init_std", "0.1"], "init_std 0.1 has no effect: the prefix starts as that of"),
    ("plain", ["--finetune.method", "full"], "--finetune.from_adapter goes with --finetune.method lora or"),
]


@pytest.mark.parametrize(("name", "flags"), AGREEING, ids=[" ".join(flags) for _, flags in AGREEING])
def test_a_given_setting_that_is_the_adapters_passes(name: str, flags: list[str], saved: Callable[[str], Path]) -> None:
    assert config_of(saved(name), *flags) == config_of(saved(name))


@pytest.mark.parametrize(("name", "flags", "message"), CONTRADICTING, ids=[" ".join(f) for _, f, _ in CONTRADICTING])
def test_a_given_setting_that_contradicts_the_adapter_is_refused(
    name: str, flags: list[str], message: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """By flag or by file; before the model, which is not there, is looked for."""
    path = saved(name)
    with pytest.raises(InputError) as error:
        parse_config(["--model.path", "m", "--data.path", "d", "--finetune.from_adapter", str(path), *flags])
    assert message.format(path=path) in str(error.value)
    values = parse_flags(RunConfig, ["--finetune.from_adapter", str(path), *flags], "")[0]
    (tmp_path / "a.toml").write_text("\n".join(toml_line(*item) for item in values.items()))
    with pytest.raises(InputError) as error:
        parse_config(["--model.path", "m", "--data.path", "d", "--config", str(tmp_path / "a.toml")])
    assert message.format(path=path) in str(error.value)


@pytest.mark.parametrize(("given", "used"), [((), 0.25), (("0",), 0.0), (("0.5",), 0.5)])
def test_a_given_dropout_holds_in_training(
    given: tuple[str, ...], used: float, saved: Callable[[str], Path], model_dir: Path
) -> None:
    """It is no part of what the adapter computes. Where it is another one, that is told."""
    flags = ["--finetune.lora.lora_dropout", *given] if given else []
    finetune = config_of(saved("lora"), *flags)
    target = open_weights(model_dir).config
    model, _ = build_model(
        open_weights(model_dir), ModelConfig(str(model_dir)), finetune, target, (), seed=0, dtype=torch.float32
    )
    assert {m.p for m in model.modules() if isinstance(m, Dropout)} == {used}
    told = f"--finetune.lora.lora_dropout {used}: holds in this training; {saved('lora')} has 0.25"
    assert training_notes(finetune) == ([told] if given else [])


def test_a_classifiers_head_is_the_programs_own_affair(model_dir: Path, tmp_path: Path) -> None:
    """It is saved beside the adapter without being asked for, so nothing that was asked for contradicts it."""
    model = llama.load(model_dir)
    llama.replace_head(model, ("a", "b"), "single_label_classification")
    add_adapter(model, LoraConfig(modules_to_save=("score",)))
    with pytest.warns(UserWarning, match="never trained"):
        save_adapter(model, tmp_path / "adapter")
    classifies = ("--finetune.head.kind", "classification")
    finetune = config_of(tmp_path / "adapter", *classifies, "--finetune.lora.modules_to_save", "none")
    assert finetune.lora.modules_to_save == ("score",)
    with pytest.raises(InputError, match="modules_to_save lm_head, but the adapter"):
        config_of(tmp_path / "adapter", *classifies, "--finetune.lora.modules_to_save", "lm_head")


def test_in_python_what_differs_from_its_default_must_be_the_adapters(saved: Callable[[str], Path]) -> None:
    path = str(saved("lora"))
    assert continued(FinetuneConfig(from_adapter=path)).lora == read_adapter(path)[0]
    assert continued(FinetuneConfig(from_adapter=path, lora=LoraConfig(r=16))).lora.r == 16
    with pytest.raises(InputError, match="r 4, but the adapter"):
        continued(FinetuneConfig(from_adapter=path, lora=LoraConfig(r=4)))
    with pytest.raises(InputError, match="method prefix, but the adapter"):
        continued(FinetuneConfig("prefix", path))
    assert continued(FinetuneConfig()) == FinetuneConfig()


def test_a_run_keeps_the_dropout_that_it_trained_with(
    saved: Callable[[str], Path], model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model.path", model_dir, "--data.path", alpaca_file, "--train.output_dir", tmp_path / "out"]
    flags += ["--train.max_steps", 1, "--train.samples", 0, "--checkpoint.every", 0]
    flags += ["--finetune.from_adapter", saved("lora"), "--finetune.lora.lora_dropout", 0.5]
    main(list(map(str, flags)))
    assert "--finetune.lora.lora_dropout 0.5: holds in this training" in capsys.readouterr().out
    kept = read_adapter(tmp_path / "out" / "adapter")[0]
    assert (kept.lora_dropout, kept.r, kept.use_rslora) == (0.5, 16, True)
