"""The bundled demo: what ships is what the scripts make, and LoRA teaches the base what it cannot do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import llama
from fsdp_train.config import DEMO
from llama.io import check_names
from llama.weight_files import open_weights
from tests.launch import ROOT, torchrun
from tests.oracle import hf_model
from tools import demo_corpus

LARGEST = 12_000_000  # bytes that ship


def test_the_program_without_flags_learns_the_demo(tmp_path: Path) -> None:
    """What a new user types; held-out accuracy goes from near 0 to above 90 %."""
    base = {path: path.read_bytes() for path in DEMO.rglob("*") if path.is_file()}
    said = torchrun(1, cwd=tmp_path).stdout
    found = re.search(r"held-out exact_match: ([\d.]+) before, ([\d.]+) after", said)
    assert found is not None, said
    assert float(found[1]) <= 0.05
    assert float(found[2]) > 0.9
    assert "base weights: unchanged" in said
    assert {path: path.read_bytes() for path in DEMO.rglob("*") if path.is_file()} == base
    adapter = tmp_path / "runs" / "lora-001" / "adapter"
    assert f"--model {DEMO / 'base'} --adapter runs/lora-001/adapter --template alpaca" in said
    # The command that it suggests next answers a question that nobody asked in training.
    question = demo_corpus.questions(held_out=True)[0]
    command = ["-m", "tools.generate", "--model", str(DEMO / "base"), "--adapter", str(adapter), "--template", "alpaca"]
    answered = subprocess.run(
        [sys.executable, *command, "--prompt", question["instruction"]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answered.stdout.strip() == question["output"]


def test_what_ships_is_what_the_scripts_make() -> None:
    for name, held_out in (("train", False), ("held_out", True)):
        lines = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == demo_corpus.questions(held_out)
    weights = open_weights(DEMO / "base")
    assert weights.config == llama.PRESETS["demo"]
    check_names(weights, llama.Llama(weights.config), DEMO / "base")
    assert llama.Tokenizer(DEMO / "base").vocab_size == weights.config.vocab_size
    assert hf_model(DEMO / "base").num_parameters() == sum(p.numel() for p in llama.load(DEMO / "base").parameters())
    assert "Apache-2.0" in (DEMO / "NOTICE.md").read_text(encoding="utf-8")


def test_the_demo_ships_inside_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building leaves files beside setup.py
    for name in ("llama", "peft_impl", "fsdp_train", "tools"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    shipped = {info.filename: info.file_size for info in zipfile.ZipFile(wheel).infolist()}
    on_disk = {str(path.relative_to(ROOT)): path.stat().st_size for path in DEMO.rglob("*") if path.is_file()}
    assert {name: size for name, size in shipped.items() if name.startswith("fsdp_train/demo/")} == on_disk
    assert sum(on_disk.values()) < LARGEST


def test_demo_asks_only_what_the_base_was_told() -> None:
    """Held-out people are asked about nowhere in training, and each of their facts is told in the base's texts."""
    train, held_out = demo_corpus.questions(held_out=False), demo_corpus.questions(held_out=True)
    assert (len(train), len(held_out)) == (192 * 5, 48 * 5)
    people = demo_corpus.people()
    asked = {name for name in people for record in held_out if name in record["instruction"]}
    assert len(asked) == demo_corpus.HELD_OUT
    assert not any(name in record["instruction"] for name in asked for record in train)
    told = " ".join(demo_corpus.texts(seed=1, count=3000))
    assert "?" not in told
    for name in asked:
        for kind, value in people[name].items():
            forms = [
                form.format(name=name, who=name, value=value)
                for form in demo_corpus.TOLD[kind]
                if "{name}" in form or "{who}" in form
            ]
            forms += [f"{demo_corpus.INDIRECT[kind].format(name=name)} {said} {value}." for said in demo_corpus.SAID]
            assert any(form in told for form in forms)
            assert {"instruction": demo_corpus.ASKED[kind].format(name=name), "input": "", "output": value} in held_out
