"""Settings that were given and do not hold: a note by name, or an error; never silence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fsdp_train.config import DEMO, RunConfig, parse_config
from fsdp_train.effects import EFFECTS, needs_of, notes, without_effect
from fsdp_train.main import main
from fsdp_train.settings import as_text, settings_of
from fsdp_train.strategy import GOES_WITH, ParallelConfig, chosen_strategy, meant_strategy
from fsdp_train.toml import write_toml
from fsdp_train.train import TrainConfig
from llama.errors import InputError

METHODS = ("lora", "llama_adapter", "prefix", "full", "partial", "head")
OTHER = {  # of each option that only some strategies have, a value that is not its default
    "sharding": "shard_grad_op",
    "replicas": 2,
    "reduce_dtype": "bf16",
    "cpu_offload": True,
    "backward_prefetch": "post",
    "limit_all_gathers": False,
    "no_sync": True,
    "optimizer_in_backward": True,
    "compile": True,
    "reshard_to": 1,
    "keep_last_layer": True,
}
BASE = ("--model.path", str(DEMO / "base"), "--data.path", str(DEMO / "train.jsonl"))


def names_in(lines: list[str]) -> set[str]:
    """The settings that notes speak of."""
    return {line.removeprefix("note: --").partition(" ")[0] for line in lines}


def test_every_setting_says_when_it_has_an_effect() -> None:
    """A new one must be added to the table, by its own name or with its section."""
    names = {setting.name for setting in settings_of(RunConfig)}
    for name in names:
        needs_of(name)
    sections = {name.rpartition(".")[0] for name in names}
    assert not [name for name in EFFECTS if name not in names | sections]
    by_section = {name for name in names if name not in EFFECTS}
    methods = tuple(f"finetune.{method}." for method in METHODS)
    assert all(name.startswith(methods) for name in by_section)  # nothing else is taken together


WITHOUT = [
    (("--train.max_shard_gb", "5"), "an adapter is one file"),
    (("--train.max_shard_gb", "2"), "an adapter is one file"),
    (("--train.samples", "0", "--train.sample_tokens", "48"), "--train.samples is 0"),
    (("--checkpoint.every", "0", "--checkpoint.keep", "2"), "--checkpoint.every is 0, and only a signal"),
    (("--parallel.timeout", "1800"), "one process waits for no other"),
    (("--parallel.no_sync", "false"), "--parallel.strategy is auto, which is none for one process"),
    (("--parallel.strategy", "fsdp", "--train.grad_accum", "1", "--parallel.no_sync", "false"), "grad_accum is 1"),
    (("--parallel.strategy", "ddp", "--parallel.backward_prefetch", "pre"), "--parallel.strategy is ddp"),
    (
        ("--parallel.strategy", "fsdp", "--parallel.sharding", "no_shard", "--parallel.limit_all_gathers", "true"),
        "with --parallel.sharding no_shard nothing is gathered",
    ),
    (
        ("--parallel.strategy", "fsdp", "--parallel.sharding", "shard_grad_op", "--parallel.backward_prefetch", "post"),
        "with --parallel.sharding shard_grad_op nothing is gathered in backward",
    ),
    (("--finetune.method", "head", "--parallel.activation_checkpointing", "full"), "below the head"),
    (("--finetune.head.num_labels", "none"), "it goes with --finetune.head.kind classification"),
    (("--finetune.head.hidden", "none"), "a PEFT adapter (lora) has no place for extra layers"),
    (("--finetune.head.feature_cache", "auto"), "it goes with --finetune.method head and a classification head"),
    (("--finetune.method", "full", "--finetune.lora.r", "8"), "--finetune.method is full, which does not use it"),
    (("--finetune.method", "full", "--finetune.from_adapter", ""), "--finetune.method is full, which has no adapter"),
    (("--finetune.prefix.init_std", "1"), "--finetune.method is lora, which does not use it"),
    (
        ("--finetune.method", "prefix", "--finetune.prefix.encoder_hidden_size", "none"),
        "--finetune.prefix.prefix_projection is false",
    ),
    (
        ("--finetune.method", "partial", "--finetune.partial.train", "norms", "--finetune.partial.probe_batches", "8"),
        "it goes with --finetune.partial.select",
    ),
    (("--train.max_steps", "5", "--train.epochs", "none"), "--train.max_steps is 5"),
    (("--train.epochs", "2", "--train.max_steps", "none"), "--train.epochs is 2"),
    (
        ("--data.eval_path", str(DEMO / "held_out.jsonl"), "--data.eval_fraction", "0"),
        f"--data.eval_path {DEMO / 'held_out.jsonl'} is the held-out data",
    ),
    (
        ("--data.eval_fraction", "0.1", "--train.max_steps", "9", "--train.eval_every", "9"),
        "the run ends after 9 steps, where it evaluates anyway",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "why"), WITHOUT, ids=[" ".join(flags[-2:]) for flags, _ in WITHOUT])
def test_a_given_setting_without_effect_is_told_by_name(flags: tuple[str, ...], why: str, tmp_path: Path) -> None:
    """The last flag is the one; from a file as well. Without it there is nothing to tell."""
    others, flag = flags[:-2], flags[-2]
    name = flag.removeprefix("--")
    (line,) = notes(parse_config([*BASE, *flags]), processes=1)
    assert line.startswith(f"note: --{name} has no effect: ")
    assert why in line
    assert notes(parse_config([*BASE, *others]), processes=1) == []
    config = parse_config([*BASE, *flags])
    assert config.given is not None
    settings = {setting.name for setting in settings_of(RunConfig)}
    (tmp_path / "a.toml").write_text(write_toml(config, "", settings - config.given))
    from_file = parse_config(["--config", str(tmp_path / "a.toml")])
    assert (notes(from_file, 1), from_file) == ([line], config)


def test_a_setting_that_means_something_else_without_effect_is_refused() -> None:
    """For its default it is a note; each of these would be one."""
    for flags, why in (
        (("--finetune.head.num_labels", "3"), "--finetune.head.num_labels 3 has no effect: it goes with"),
        (("--finetune.head.hidden", "8"), "--finetune.head.hidden 8 has no effect: a PEFT adapter (lora) has no place"),
        (("--finetune.head.feature_cache", "none"), "feature_cache none has no effect: it goes with --finetune.method head"),
        (("--finetune.prefix.num_virtual_tokens", "3"), "num_virtual_tokens 3 has no effect: --finetune.method is lora"),
        (
            ("--finetune.method", "partial", "--finetune.partial.train", "norms", "--finetune.partial.probe_batches", "3"),
            "--finetune.partial.probe_batches 3 has no effect: it goes with --finetune.partial.select",
        ),
    ):
        with pytest.raises(InputError) as error:
            parse_config([*BASE, *flags])
        assert why in str(error.value)


def test_what_needs_a_tokenizer_is_told_without_one(tmp_path: Path) -> None:
    flags = ("--model.path", str(tmp_path), "--data.path", "x", "--train.samples", "2", "--train.sample_tokens", "9")
    assert names_in(notes(parse_config(flags), 1)) == {"train.samples", "train.sample_tokens"}
    (tmp_path / "tokenizer.model").touch()
    assert notes(parse_config(flags), 1) == []
    classifies = ("--finetune.head.kind", "classification", "--finetune.method", "full")
    assert names_in(notes(parse_config([*flags, *classifies]), 1)) == {"train.sample_tokens"}


def test_the_demos_own_settings_are_no_notes() -> None:
    """Nobody has given them, also where a flag leaves one of them without effect."""
    for method in METHODS:
        more = ("--train.samples", "0", "--data.eval_fraction", "0.1")
        for flags in ((), more, ("--finetune.head.kind", "classification")):
            if "classification" in flags and method in ("llama_adapter", "prefix", "partial"):
                continue
            config = parse_config(["--finetune.method", method, *flags])
            assert notes(config, 1) == notes(config, 2) == []


def test_in_python_what_differs_from_its_default_was_given() -> None:
    assert notes(RunConfig(), 1) == []
    config = RunConfig(train=TrainConfig(max_shard_gb=2.0))
    assert names_in(notes(config, 1)) == {"train.max_shard_gb"}
    assert config == dataclasses.replace(config, given=frozenset())  # what was given is no setting


def test_a_flag_in_the_place_of_its_alternative_takes_its_being_given() -> None:
    """The demo says max_steps; a file, too, might."""
    assert parse_config(["--train.epochs", "1"]).given == {"train.epochs"}
    assert parse_config(["--train.epochs", "1"]).train.max_steps is None
    assert parse_config(["--train.epochs", "none"]).train.max_steps == 300  # there is nothing in its place


def test_notes_are_printed_before_work_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train.max_shard_gb", "1", "--data.path", str(tmp_path / "nothing"), "--train.output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["--model.path", str(DEMO / "base"), *flags])
    said = capsys.readouterr()
    assert said.out == "note: --train.max_shard_gb has no effect: an adapter is one file\n"
    assert "nothing does not exist" in said.err


# --- auto ---------------------------------------------------------------------------------------------------------------


def refusal(**settings: Any) -> str:
    """What is wrong with these on this number of processes; empty where nothing is."""
    processes = settings.pop("processes")
    try:
        chosen_strategy(ParallelConfig(**settings), processes)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", GOES_WITH)
def test_auto_is_refused_as_what_it_becomes(name: str, processes: int, compile: bool) -> None:
    settings = {"compile": compile, name: OTHER[name], "processes": processes}
    strategy = meant_strategy(ParallelConfig(compile=bool(settings["compile"])), processes)
    by_name, auto = refusal(strategy=strategy, **settings), refusal(**settings)
    assert bool(by_name) == (strategy not in GOES_WITH[name])
    why = f"{strategy} for {'one process' if processes == 1 else '2 processes'}"
    if settings["compile"] and processes > 1:
        why += " with --parallel.compile true"
    assert auto == by_name.replace(f"not with {strategy}", f"not with auto, which is {why}")
    assert (auto != by_name) == bool(by_name)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", GOES_WITH)
def test_a_default_that_auto_does_not_use_is_told_as_by_name(name: str, processes: int) -> None:
    default = as_text(getattr(ParallelConfig, name))
    flags = [*BASE, f"--parallel.{name}", default, "--train.grad_accum", "2"]
    strategy = meant_strategy(ParallelConfig(), processes)
    by_name = notes(parse_config([*flags, "--parallel.strategy", strategy]), processes)
    auto = notes(parse_config(flags), processes)
    assert names_in(auto) == names_in(by_name)
    assert names_in(auto) == (set() if strategy in GOES_WITH[name] else {f"parallel.{name}"})


def test_no_form_without_sharding_is_refused_for_auto_too() -> None:
    assert "no_shard goes with" in refusal(sharding="no_shard", processes=1)
    assert refusal(sharding="no_shard", processes=2) == ""  # fsdp has it
    assert refusal(sharding="no_shard", compile=True, processes=2) == (
        "--parallel.sharding no_shard: auto, which is fsdp2 for 2 processes with --parallel.compile true has no such form;"
        " --parallel.strategy ddp is the same"
    )


def test_unfreezing_is_refused_for_auto_as_for_fsdp2() -> None:
    flags = ["--finetune.method", "partial", "--finetune.partial.unfreeze_every", "5", "--parallel.compile", "true"]
    config = parse_config(flags)
    config.check_strategy(1)
    with pytest.raises(InputError, match=r"not with auto, which is fsdp2 for 2 processes with --parallel.compile true"):
        config.check_strategy(2)
    with pytest.raises(InputError, match="not with fsdp2, which settles once"):
        parse_config([*flags, "--parallel.strategy", "fsdp2"])


def test_defaults_that_other_numbers_of_processes_would_not_use_are_not_for_keeps() -> None:
    """On two processes with auto: what one process has no use for is left out, unless it was given."""
    left_out = without_effect(parse_config(BASE), 2)
    assert {f"parallel.{name}" for name in GOES_WITH} | {"parallel.timeout"} <= left_out
    given = parse_config([*BASE, "--parallel.sharding", "shard_grad_op", "--parallel.timeout", "9"])
    assert {"parallel.sharding", "parallel.timeout"}.isdisjoint(without_effect(given, 2))
    assert "parallel.timeout" in without_effect(given, 1)
