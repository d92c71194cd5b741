"""Settings: one declaration becomes flag, TOML key, default and help; both ways give the same values, all else is refused."""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from fsdp_train.build import FinetuneConfig
from fsdp_train.config import DEMO, RunConfig, parse_config
from fsdp_train.main import main
from fsdp_train.settings import build, option, parse_flags, settings_of, values_of
from fsdp_train.toml import read_toml, write_toml
from llama.errors import InputError
from peft_impl import LoraConfig


@dataclass(frozen=True)
class Inner:
    """A section inside a section, with the kinds that LoraConfig has."""

    colour: Literal["red", "green"] = option("red", "of the thing")
    targets: tuple[str, ...] | str = option(("q", "v"), "names or an expression")
    layers: tuple[int, ...] | None = option(None, "which")
    ranks: dict[str, int] = field(default_factory=dict, metadata={"help": "whole numbers by name"})
    scales: dict[str, float] = field(default_factory=dict, metadata={"help": "numbers by name"})


@dataclass(frozen=True)
class Outer:
    """A section with the simple kinds."""

    flag: bool = option(True, "on or off")
    count: int = option(3, "whole")
    rate: float = option(0.5, "any number")
    name: str = option("", "any text")
    limit: int | None = option(None, "whole or none")
    names: tuple[str, ...] = option((), "several")
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Everything:
    """One section of every kind of setting."""

    outer: Outer = field(default_factory=Outer)


def by_flags(*arguments: str) -> dict[str, Any]:
    return parse_flags(Everything, arguments, "")[0]


def by_toml(directory: Path, text: str) -> dict[str, Any]:
    (directory / "file.toml").write_text(text, encoding="utf-8")
    return read_toml(Everything, directory / "file.toml")


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal, of the same types: 1 is not 1.0, and not True."""
    return found == expected and [type(v) for v in found.values()] == [type(expected[name]) for name in found]


# name, as a flag's text, in TOML, the value of both
VALUES: list[tuple[str, str, str, Any]] = [
    ("flag", "true", "true", True),
    ("flag", "false", "false", False),
    ("count", "12", "12", 12),
    ("count", "-3", "-3", -3),
    ("rate", "2e-4", "2e-4", 0.0002),
    ("rate", "1", "1", 1.0),
    ("name", "a b=c", '"a b=c"', "a b=c"),
    ("name", "", '""', ""),
    ("name", "none", '"none"', "none"),
    ("name", "12", '"12"', "12"),
    ("limit", "7", "7", 7),
    ("limit", "none", '"none"', None),
    ("names", "a,b", '["a", "b"]', ("a", "b")),
    ("names", "a, b,", '["a", "b"]', ("a", "b")),
    ("names", "none", "[]", ()),
    ("inner.colour", "green", '"green"', "green"),
    ("inner.layers", "0,2", "[0, 2]", (0, 2)),
    ("inner.layers", "none", '"none"', None),
    ("inner.ranks", "q=1,layers.0.*=2", '{q = 1, "layers.0.*" = 2}', {"q": 1, "layers.0.*": 2}),
    ("inner.ranks", "none", "{}", {}),
    ("inner.scales", "q=1", "{q = 1}", {"q": 1.0}),
    # A list of names, or a string that is one expression:
    ("inner.targets", "q_proj", '["q_proj"]', ("q_proj",)),
    ("inner.targets", "q_proj,v_proj", '["q_proj", "v_proj"]', ("q_proj", "v_proj")),
    ("inner.targets", "layers.0.q_proj", '["layers.0.q_proj"]', ("layers.0.q_proj",)),
    ("inner.targets", "all-linear", '"all-linear"', "all-linear"),
    ("inner.targets", r".*\.[qv]_proj", r"'.*\.[qv]_proj'", r".*\.[qv]_proj"),
    ("inner.targets", "(a|b){1,2}", '"(a|b){1,2}"', "(a|b){1,2}"),
]


@pytest.mark.parametrize(("name", "text", "toml", "value"), VALUES)
def test_flags_and_toml_give_the_same_value(name: str, text: str, toml: str, value: Any, tmp_path: Path) -> None:
    assert same(by_flags(f"--outer.{name}", text), {f"outer.{name}": value})
    assert same(by_flags(f"--outer.{name}={text}"), {f"outer.{name}": value})
    assert same(by_toml(tmp_path, f"outer.{name} = {toml}"), {f"outer.{name}": value})
    section, _, key = f"outer.{name}".rpartition(".")
    assert same(by_toml(tmp_path, f"[{section}]\n{key} = {toml}"), {f"outer.{name}": value})
    built = build(Everything, {f"outer.{name}": value})
    assert values_of(built) == {**values_of(Everything()), f"outer.{name}": value}


WRONG_FLAGS: list[tuple[list[str], str]] = [
    (["--outer.flag", "yes"], "--outer.flag yes: expected true or false"),
    (["--outer.flag", "True"], "--outer.flag True: expected true or false"),
    (["--outer.count", "3.5"], "--outer.count 3.5: expected a whole number"),
    (["--outer.limit", "many"], "--outer.limit many: expected a whole number"),
    (["--outer.rate", "fast"], "--outer.rate fast: expected a number"),
    (["--outer.inner.colour", "gren"], "--outer.inner.colour gren: expected red or green - did you mean 'green'?"),
    (["--outer.inner.layers", "0,x"], "--outer.inner.layers 0,x: expected a whole number"),
    (["--outer.inner.ranks", "q"], "--outer.inner.ranks q: expected name=value pairs, separated by commas"),
    (["--outer.inner.ranks", "q=x"], "--outer.inner.ranks q=x: expected a whole number"),
    (["--outer.coutn", "3"], "unknown argument '--outer.coutn' - did you mean '--outer.count'?"),
    (["--outer.coutn=3"], "unknown argument '--outer.coutn=3' - did you mean '--outer.count'?"),
    (["--cofig", "x"], "unknown argument '--cofig' - did you mean '--config'?"),
    (["--outer.cou", "3"], "unknown argument '--outer.cou'"),  # no abbreviations
    (["--conf", "x"], "unknown argument '--conf'"),
    (["--outer.inner", "x"], "unknown argument '--outer.inner'"),
    (["3"], "unknown argument '3'"),
    (["--outer.count", "3", "4"], "unknown argument '4'"),
    (["--outer.count"], "--outer.count: expected one argument"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_FLAGS)
def test_a_wrong_flag_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        by_flags(*arguments)
    assert message in str(error.value)


WRONG_TOML: list[tuple[str, str]] = [
    ("[outer]\nflag = 1", "outer.flag = 1: expected true or false"),
    ("[outer]\ncount = true", "outer.count = True: expected a whole number"),
    ("[outer]\ncount = 3.0", "outer.count = 3.0: expected a whole number"),
    ("[outer]\ncount = '3'", "outer.count = '3': expected a whole number"),
    ("[outer]\nrate = false", "outer.rate = False: expected a number"),
    ("[outer]\nname = 3", "outer.name = 3: expected text"),
    ("[outer]\nnames = 'a'", "outer.names = 'a': expected "),
    ("[outer]\nnames = ['a', 1]", "outer.names = ['a', 1]: expected text"),
    ("[outer]\nlimit = 'many'", "outer.limit = 'many': expected a whole number"),
    ("[outer.inner]\ncolour = 'gren'", "outer.inner.colour = 'gren': expected red or green - did you mean 'green'?"),
    ("[outer.inner]\ncolour = 3", "outer.inner.colour = 3: expected red|green"),
    ("[outer.inner]\ntargets = [1]", "outer.inner.targets = [1]: expected text"),
    ("[outer.inner]\nranks = {q = 'x'}", "outer.inner.ranks = {'q': 'x'}: expected a whole number"),
    ("[outer.inner]\nranks = 3", "outer.inner.ranks = 3: expected "),
    ("[outer]\ncoutn = 3", "unknown setting outer.coutn - did you mean 'outer.count'?"),
    ("[uoter]\ncount = 3", "unknown setting uoter - did you mean 'outer'?"),
    ("[outer.iner]\ncolour = 'red'", "unknown setting outer.iner - did you mean 'outer.inner'?"),
    ("count = 3", "unknown setting count"),
    ("outer = 3", "outer = 3: expected a section [outer]"),
    ("[outer.name]\nx = 3", "outer.name = {'x': 3}: expected text"),
    ("[outer]\ncount = 3\ncount 4", "not TOML: Expected '=' after a key in a key/value pair (at line 3, column 7)"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_TOML)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        by_toml(tmp_path, text)
    assert message in str(error.value)
    assert str(tmp_path / "file.toml") in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes("name = 'ü'".encode("latin-1"))
    for name in ("missing.toml", "latin.toml", "."):
        with pytest.raises(InputError, match=r"--config .*: cannot be read"):
            read_toml(Everything, tmp_path / name)


# --- there and back -----------------------------------------------------------------------------------------------------

STRINGS = [
    *("", "plain", "none", "true", "3", "two words", "a,b=c", "# no comment", "[section]", "key = 1", "'single'", "''' three"),
    *('say "hi"', '"""', "C:\\new\\table", "ends with \\", '\\"', "\\u0041", "line\nbreak", "\r\n\t", " spaces around "),
    *("\x00\x1b\x7f", "ünïcödé", "漢字", "🦙", "e\u0301", "\u2028\u00ad\ufeff\u200b", "\U000e0001", "\U0010ffff🦙\U000e0001 1"),
]
FLOATS = [0.0, -0.0, 1.0, 0.1, 2e-4, 1e-5, 1e16, 1e22, 5e-324, 1.7976931348623157e308, float("inf"), float("-inf"), 1 / 3]
INTS = [0, 1, -1, 10**6, 2**63 - 1, -(2**63)]


def drawn(section: type, rng: random.Random) -> Any:
    """A dataclass with a value from the lists above for each setting, told apart by the default and the name."""

    def some(pool: list[Any]) -> list[Any]:
        return rng.sample(pool, rng.randint(0, 3))

    draw = {
        "flag": lambda: rng.random() < 0.5,
        "count": lambda: rng.choice(INTS),
        "rate": lambda: rng.choice(FLOATS),
        "name": lambda: rng.choice(STRINGS),
        "limit": lambda: rng.choice([None, *INTS]),
        "names": lambda: tuple(some(STRINGS)),
        "colour": lambda: rng.choice(["red", "green"]),
        "targets": lambda: rng.choice([tuple(some(STRINGS)), rng.choice(STRINGS)]),
        "layers": lambda: rng.choice([None, tuple(some(INTS))]),
        "ranks": lambda: {key: rng.choice(INTS) for key in some(STRINGS)},
        "scales": lambda: {key: rng.choice(FLOATS) for key in some(STRINGS)},
        "inner": lambda: drawn(Inner, rng),
        "outer": lambda: drawn(Outer, rng),
    }
    return section(**{f.name: draw[f.name]() for f in fields(section)})


@pytest.mark.parametrize("seed", range(40))
def test_what_is_written_reads_back_the_same(seed: int, tmp_path: Path) -> None:
    config = drawn(Everything, random.Random(seed))
    text = write_toml(config, "a comment\nof two lines")
    assert same(by_toml(tmp_path, text), values_of(config))
    assert build(Everything, by_toml(tmp_path, text)) == config


@pytest.mark.parametrize("string", STRINGS)
def test_strings_are_toml(string: str) -> None:
    """As the standard library's parser sees them, also as a key."""
    config = Everything(Outer(name=string, inner=Inner(ranks={string: 1})))
    found = tomllib.loads(write_toml(config, ""))["outer"]
    assert found["name"] == string
    assert found["inner"]["ranks"] == {string: 1}


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        parse_config([]),
        parse_config(["--finetune.lora.target_modules", r".*\.q_proj", "--finetune.lora.rank_pattern", "q_proj=2"]),
        RunConfig(finetune=FinetuneConfig(lora=LoraConfig(target_modules="all-linear", lora_alpha=0.5))),
    ],
    ids=["defaults", "demo", "patterns", "all-linear"],
)
def test_a_run_config_reads_back_the_same(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(write_toml(config, ""), encoding="utf-8")
    assert build(RunConfig, read_toml(RunConfig, tmp_path / "config.toml")) == config


# --- the program's own settings -----------------------------------------------------------------------------------------

CONTRACT: dict[str, Any] = {
    "model.path": "dir", "model.preset": "demo", "model.dtype": "bf16",
    "data.path": "file", "data.format": "alpaca", "data.eval_path": "file", "data.eval_fraction": 0.05, "data.max_length": 8,
    "data.shuffle": False,
    "finetune.method": "full", "finetune.from_adapter": "dir", "finetune.lora.r": 8,
    "finetune.lora.target_modules": ("q_proj", "v_proj"),
    "optim.lr": 1e-4, "optim.weight_decay": 0.1, "optim.warmup_steps": 3, "optim.schedule": "linear", "optim.grad_clip": 0.5,
    "train.max_steps": 5, "train.epochs": 2, "train.batch_size": 3, "train.grad_accum": 2, "train.seed": 1,
    "train.output_dir": "dir",
    "parallel.strategy": "fsdp", "parallel.precision": "fp32", "parallel.activation_checkpointing": "full",
    "checkpoint.every": 7, "checkpoint.keep": 1, "checkpoint.resume": "none",
    "log.every": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contracts_flags_exist(name: str) -> None:
    value = CONTRACT[name]
    text = ",".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    assert same(parse_flags(RunConfig, [f"--{name}", text], "")[0], {name: value})


BESIDE = ("given", "settled")  # what is known about settings, and is none


def leaves(section: Any, prefix: str = "") -> dict[str, Any]:
    """Defaults by dotted name, found without the code under test."""
    found = {}
    for f in fields(section):
        if f.name in BESIDE:
            continue
        value = getattr(section, f.name)
        found |= leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return found


def typed(value: Any) -> str:
    """As people type it."""
    if value in (None, (), {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def test_help_lists_every_setting_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    squeezed = "".join(captured.out.split())  # the help is wrapped anywhere
    settings = {setting.name: setting for setting in settings_of(RunConfig)}
    assert settings.keys() == leaves(RunConfig()).keys()
    for name, default in leaves(RunConfig()).items():
        words = settings[name].help
        assert len(words) > 5, name
        if "(default:" not in words and default != "":
            words += f" (default: {typed(default)})"
        assert f"--{name}{settings[name].metavar}{''.join(words.split())}" in squeezed, name
    for section in ("model", "data", "finetune", "finetune.lora", "optim", "parallel", "train", "checkpoint", "log"):
        assert f"[{section}]:" in captured.out


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\npath = 'm'\n[data]\npath = 'd'\neval_path = 'e'\n[optim]\nlr = 1.0\n[train]\nepochs = 3\n")
    config = parse_config(["--config", str(file), "--optim.lr", "2"])
    assert (config.model.path, config.data.path, config.optim.lr, config.train.epochs) == ("m", "d", 2.0, 3)
    # A flag replaces its alternative in the file too; both as flags contradict each other.
    config = parse_config(["--config", str(file), "--train.max_steps", "5", "--data.eval_fraction", "0.1"])
    assert (config.train.max_steps, config.train.epochs) == (5, None)
    assert (config.data.eval_fraction, config.data.eval_path) == (0.1, "")
    with pytest.raises(InputError, match="given both"):
        parse_config(["--config", str(file), "--train.max_steps", "5", "--train.epochs", "1"])


def test_without_model_and_data_it_is_the_demo() -> None:
    config = parse_config(["--train.max_steps", "3"])
    assert Path(config.model.path) == DEMO / "base"
    assert Path(config.data.path).parent == DEMO
    assert config.train.max_steps == 3
    for method in ("lora", "llama_adapter", "prefix", "full"):
        assert parse_config(["--finetune.method", method]).finetune.method == method
    with pytest.raises(InputError, match=r"no data: give --data\.path"):
        parse_config(["--model.path", "m"])
    with pytest.raises(InputError, match=r"no model: give --model\.path"):
        parse_config(["--data.path", "d"])


def test_a_sections_own_refusal_names_the_section() -> None:
    with pytest.raises(InputError, match=r"^--finetune\.lora: LoRA rank r = 0; expected"):
        parse_config(["--finetune.lora.r", "0"])
