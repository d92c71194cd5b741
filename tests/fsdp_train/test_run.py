"""The program end to end: what it leaves behind, what it says, and how it stops."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import llama
from fsdp_train import data
from fsdp_train.data import load_dataset
from fsdp_train.main import main
from fsdp_train.run import Run
from fsdp_train.step import NonFiniteError
from fsdp_train.strategy import ParallelConfig
from fsdp_train.train import evaluate
from fsdp_train.world import process_group
from peft_impl import load_adapter, read_adapter
from tests.fsdp_train.curves import run_on
from tests.launch import torchrun
from tests.oracle import DATA, STORIES, hf_model, largest, needs_data

LOGITS = 1e-4  # fp32, logits up to 20 in size, eager against SDPA
REQUIRED = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes"}


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_lora_leaves_a_peft_adapter(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    base = {name: tensor.clone() for name, tensor in load_file(model_dir / "model.safetensors").items()}
    main(
        [
            *("--model.path", str(model_dir), "--data.path", str(alpaca_file), "--train.output_dir", str(out)),
            *("--data.eval_fraction", "0.2", "--train.epochs", "2", "--optim.lr", "1e-2"),
            *("--log.every", "2", "--train.eval_every", "3"),
            *("--finetune.lora.target_modules", "all-linear", "--finetune.lora.r", "4", "--train.exact_match", "2"),
        ]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"adapter", "checkpoints", "config.toml", "metrics.jsonl"}
    assert {p.name for p in (out / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    trained = [row for row in rows(out) if "loss" in row]
    evaluated = [row for row in rows(out) if "eval_loss" in row]
    assert all(row.keys() >= REQUIRED for row in trained)
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert [row["step"] for row in evaluated] == [0, 3, 6, 8]
    # People see what happened: the data, the seam, what trains, before, after, and what to type next.
    for expected in (
        r"format alpaca, \d+ samples", r"first sample, given: .*### Response:'", r"lora: [\d,]+ of [\d,]+ parameters train",
        r"before training, .*\n  answer: ", r"after training, .*\n  answer: ", r"base weights: unchanged",
        r"next:\n  python -m tools.generate --model \S+ --adapter \S+ --template alpaca",
    ):  # fmt: skip
        assert re.search(expected, said), expected
    # peft reads it, and means the same.
    hf = peft.PeftModel.from_pretrained(hf_model(model_dir), out / "adapter")
    ours = llama.load(model_dir)
    load_adapter(ours, out / "adapter")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert largest(ours(ids), hf(ids).logits) < LOGITS
        assert largest(ours(ids), llama.load(model_dir)(ids)) > 100 * LOGITS  # it does something
    assert all(torch.equal(base[name], tensor) for name, tensor in load_file(model_dir / "model.safetensors").items())


def test_config_toml_runs_again_to_the_same_bits(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model.path", str(model_dir), "--data.path", str(alpaca_file), "--train.max_steps", "4", "--optim.lr", "3e-3"]
    main(
        [
            *common,
            "--train.output_dir",
            str(tmp_path / "first"),
            "--finetune.lora.rank_pattern",
            "q_proj=2",
            "--train.samples",
            "0",
            "--log.every",
            "1",
        ]
    )
    capsys.readouterr()
    main(["--config", str(tmp_path / "first" / "config.toml"), "--train.output_dir", str(tmp_path / "second")])
    assert "note:" not in capsys.readouterr().out
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("first", "second")]
    assert losses[0] == losses[1]
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_continue_from_an_adapter(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    """from_adapter takes the adapter's own settings; the first loss is where the first run ended."""
    common = ["--model.path", str(model_dir), "--data.path", str(alpaca_file), "--train.samples", "0", "--log.every", "1"]
    common += [
        "--data.shuffle",
        "false",
        "--train.batch_size",
        "64",
        "--parallel.precision",
        "fp32",
        "--optim.schedule",
        "constant",
    ]
    main([*common, "--train.max_steps", "3", "--finetune.lora.r", "2", "--train.output_dir", str(tmp_path / "a")])
    more = ["--finetune.from_adapter", str(tmp_path / "a" / "adapter"), "--train.output_dir", str(tmp_path / "b")]
    main([*common, "--train.max_steps", "1", *more])
    main([*common, "--train.max_steps", "4", "--finetune.lora.r", "2", "--train.output_dir", str(tmp_path / "c")])
    assert read_adapter(tmp_path / "b" / "adapter")[0].r == 2
    assert rows(tmp_path / "b")[0]["loss"] == pytest.approx(rows(tmp_path / "c")[3]["loss"], abs=1e-6)


def test_full_fine_tuning_with_two_processes(model_dir: Path, alpaca_file: Path, tmp_path: Path) -> None:
    """The artefact opens in transformers with nothing missing, and equals one process's."""
    for processes in (1, 2):
        flags = [
            *("--model.path", model_dir, "--data.path", alpaca_file, "--train.output_dir", tmp_path / str(processes)),
            *("--finetune.method", "full", "--train.max_steps", 5, "--train.batch_size", 4 // processes, "--log.every", 1),
            *("--parallel.precision", "fp32", "--parallel.activation_checkpointing", "full", "--train.samples", 0),
        ]
        run_on(processes, [list(map(str, flags))], tmp_path)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "2" / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert largest(model(ids).logits, llama.load(tmp_path / "2" / "model")(ids)) < LOGITS
    assert (tmp_path / "2" / "model" / "tokenizer.model").exists()
    one, two = ([row["loss"] for row in rows(tmp_path / name)] for name in ("1", "2"))
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5


@needs_data
def test_a_real_model_learns_real_instructions(tmp_path: Path) -> None:
    """Two processes, FSDP on the CPU, a real pre-trained Llama and real instructions."""
    done = torchrun(
        2,
        *("--model.path", STORIES, "--data.path", DATA / "gsm8k_alpaca.json", "--train.max_steps", 30),
        *("--train.output_dir", tmp_path / "out", "--data.eval_fraction", 0.01),
    )
    assert "strategy fsdp" in done.stdout
    before, after = (row["eval_loss"] for row in rows(tmp_path / "out") if "eval_loss" in row)
    assert after < before
    hf = peft.PeftModel.from_pretrained(hf_model(STORIES), tmp_path / "out" / "adapter")
    ours = llama.load(STORIES)
    load_adapter(ours, tmp_path / "out" / "adapter")
    ids = torch.randint(3, 512, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert largest(ours(ids), hf(ids).logits) < LOGITS


def test_non_finite_loss_stops_with_step_and_samples(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of the step before are not touched, and no artefact appears."""
    collate, seen = data.collate, []

    def poisoned(samples: list, device: torch.device) -> data.Batch:
        batch = collate(samples, device)
        seen.append([s.where for s in samples])
        return batch

    forward = llama.Llama.forward

    def explode(self: llama.Llama, *args: object, **kwargs: object) -> torch.Tensor:
        loss = forward(self, *args, **kwargs)
        return loss * float("nan") if len(seen) == 6 else loss  # the last micro-batch of step 3

    monkeypatch.setattr(data, "collate", poisoned)
    monkeypatch.setattr(llama.Llama, "forward", explode)
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                *("--model.path", str(model_dir), "--data.path", str(alpaca_file), "--train.output_dir", str(tmp_path / "out")),
                *("--train.batch_size", "2", "--train.grad_accum", "2", "--train.samples", "0"),
            ]
        )
    assert stopped.value.code == 3
    error = capsys.readouterr().err
    assert "step 3: the loss is nan, from the samples of rank 0" in error
    assert all(where in error for where in seen[5])  # a step later it is seen: what came between was left out
    assert not (tmp_path / "out" / "adapter").exists()


def test_runs_are_numbered_without_an_output_directory(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        main(
            ["--model.path", str(model_dir), "--data.path", str(alpaca_file), "--train.max_steps", "1", "--train.samples", "0"]
        )
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["lora-001", "lora-002"]


def test_tokens_need_no_tokenizer(tmp_path: Path, model_dir: Path) -> None:
    bare = tmp_path / "bare"
    llama.save(llama.load(model_dir), bare)
    (tmp_path / "data.jsonl").write_text('{"input_ids": [1, 5, 6, 7]}\n')
    flags = ["--data.path", str(tmp_path / "data.jsonl"), "--train.output_dir", str(tmp_path / "out"), "--train.max_steps", "2"]
    main(["--model.path", str(bare), *flags])
    assert (tmp_path / "out" / "adapter").exists()


def test_ids_that_the_tokenizer_lacks_are_shown(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preset has more rows than the tokenizer pieces, and random weights choose any of them."""
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a tokenizer. " * 30)
    main(
        [
            *("--model.preset", "demo", "--model.tokenizer", str(tokenizer_dir), "--finetune.method", "full"),
            *("--data.path", str(text), "--data.max_length", "32", "--train.max_steps", "1", "--optim.warmup_steps", "1"),
            *("--train.output_dir", str(tmp_path / "out")),
        ]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert re.search(r"before training.*\n  answer: .*<\d+>", said)
    assert "story.txt[token 0]" in said
    assert "--optim.warmup_steps 1: the run ends after 1 steps, still warming up" in said


def test_what_was_trained_is_kept_whatever_comes_after(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = Run.measure

    def interrupted(self: Run, moment: str) -> Any:
        if moment == "after":
            raise KeyboardInterrupt
        return measure(self, moment)

    monkeypatch.setattr(Run, "measure", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                *("--model.path", str(model_dir), "--data.path", str(alpaca_file), "--train.max_steps", "2"),
                *("--train.output_dir", str(tmp_path / "out"), "--train.samples", "0"),
            ]
        )
    assert stopped.value.code == 130
    assert "interrupted; the same command" in capsys.readouterr().err
    read_adapter(tmp_path / "out" / "adapter")


def test_an_evaluation_that_is_not_finite_is_no_result(alpaca_file: Path, tokenizer_dir: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
            return torch.tensor(float("nan"))

    dataset = load_dataset(str(alpaca_file), "auto", llama.Tokenizer(tokenizer_dir), 300, 512)
    with process_group(ParallelConfig()) as world, pytest.raises(NonFiniteError, match=r"the evaluation loss on \S+ is nan"):
        evaluate(Broken(), dataset, 4, world)
