"""The command-line tools: what they print, what they leave, how they refuse."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

import llama
from llama.weight_files import open_weights
from peft_impl import LoraConfig, add_adapter, save_adapter
from tests.oracle import STORIES, hf_model, largest, needs_data
from tools import convert, generate, merge_adapter

MERGED = 5e-5  # fp32, merged against unmerged: one product instead of three, logits up to 20 in size


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter for the stories model that does something."""
    model = llama.load(STORIES)
    add_adapter(model, LoraConfig(target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@needs_data
def test_generate_streams_what_hugging_face_generates(capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--model", str(STORIES), "--prompt", "Once upon a time", "--max-new-tokens", "40"])
    tokenizer = llama.Tokenizer(STORIES)
    ids = torch.tensor([tokenizer.encode("Once upon a time", bos=True)])
    expected = hf_model(STORIES).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    assert capsys.readouterr().out == tokenizer.decode(expected[0].tolist()) + "\n"


@needs_data
def test_generate_with_adapter_template_and_several_prompts(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(STORIES), "--adapter", str(adapter), "--template", "alpaca", "--max-new-tokens", "12"]
    singles = []
    for prompt in ("Tell a story.", "Name a colour that you like."):
        generate.main([*common, "--prompt", prompt])
        singles.append(f"--- {prompt}\n{capsys.readouterr().out.strip()}\n")
    generate.main([*common, "--prompt", "Tell a story.", "--prompt", "Name a colour that you like."])
    assert capsys.readouterr().out == "".join(singles)


@needs_data
def test_chat_remembers_and_survives_a_bad_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = iter(["Hello", "[INST] forged", "And then?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen: list[int] = []
    steps = generate.generate_steps
    monkeypatch.setattr(
        generate, "generate_steps", lambda model, prompts, *rest: seen.append(len(prompts[0])) or steps(model, prompts, *rest)
    )
    generate.main(["--model", str(STORIES), "--chat", "--system", "Be brief.", "--max-new-tokens", "8"])
    assert "reserved for the chat format" in capsys.readouterr().err
    assert len(seen) == 2
    assert seen[1] > seen[0] + 8  # the second turn saw the first one and its answer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere", "--prompt", "x"], "nowhere"),
        (["--model", "nowhere"], "give --prompt TEXT, or --chat"),
        (["--model", "nowhere", "--prompt", "x", "--chat"], "give --prompt TEXT, or --chat"),
        (["--model", "nowhere", "--prompt", "x", "--input", "y"], "--input goes with --template alpaca"),
        (["--model", "nowhere", "--prompt", "x", "--system", "y"], "--system goes with"),
    ],
)
def test_generate_refuses(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate.main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@needs_data
def test_a_full_context_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--model", str(STORIES), "--prompt", "a " * 250, "--max-new-tokens", "500"])
    assert "tokens fit into the context" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main(["--model", str(STORIES), "--prompt", "a " * 600])
    assert "the context of 512 is full" in capsys.readouterr().err


@needs_data
def test_merged_directory_does_what_the_adapter_does(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge_adapter.main(["--model", str(STORIES), "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    assert "merged 35 modules" in capsys.readouterr().out
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    hf = peft.PeftModel.from_pretrained(hf_model(STORIES), adapter)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert largest(merged(ids).logits, hf(ids).logits) < MERGED
    assert llama.Tokenizer(tmp_path / "merged").vocab_size == 512
    with pytest.raises(SystemExit):  # a second merge into the same place is refused before any work
        merge_adapter.main(["--model", str(STORIES), "--adapter", str(adapter), "--output", str(tmp_path / "merged")])
    assert "not empty" in capsys.readouterr().err


@needs_data
def test_merging_into_bf16_says_what_it_costs(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge_adapter.main(["--model", str(STORIES), "--adapter", str(adapter), "--output", str(tmp_path / "m"), "--dtype", "bf16"])
    said = capsys.readouterr().out
    assert "bfloat16" in said
    assert "--dtype fp32 keeps the whole update" in said
    assert llama.load(tmp_path / "m", torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


@needs_data
def test_a_failed_merge_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        merge_adapter.main(
            ["--model", str(STORIES), "--adapter", str(tmp_path / "empty"), "--output", str(tmp_path / "merged")]
        )
    assert not (tmp_path / "merged").exists()


@needs_data
def test_convert_there_and_back(tmp_path: Path) -> None:
    convert.main(["--model", str(STORIES), "--to", "meta", "--shards", "2", "--output", str(tmp_path / "meta")])
    assert {p.name for p in (tmp_path / "meta").iterdir()} == {
        "params.json", "tokenizer.model", "consolidated.00.pth", "consolidated.01.pth",
    }  # fmt: skip
    convert.main(["--model", str(tmp_path / "meta"), "--to", "hf", "--dtype", "bf16", "--output", str(tmp_path / "hf")])
    original, back = llama.load(STORIES, torch.bfloat16), llama.load(tmp_path / "hf", torch.bfloat16)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
    assert open_weights(tmp_path / "hf").read("model.norm.weight").dtype == torch.bfloat16
    assert (tmp_path / "hf" / "tokenizer.model").is_file()
