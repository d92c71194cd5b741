"""The command-line tools: what they print, what they leave, how they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import llama
from fsdp_train.config import DEMO
from llama.weight_files import open_weights
from peft_impl import LlamaAdapterConfig, LoraConfig, PrefixTuningConfig, add_adapter, load_adapter, save_adapter
from tests.llama.common import differing, full_disk, tiny
from tests.oracle import STORIES, hf_model, largest, needs_data
from tools import convert, convert_adapter, generate, merge_adapter

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


class Chat:
    """A conversation with the stories model: lines to be typed (or an exception to be raised there) and answers to be given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lines: list[Any], replies: list[list[Any]]) -> None:
        self.lines, self.replies, self.prompts = iter(lines), iter(replies), []
        monkeypatch.setattr("builtins.input", self.input)
        monkeypatch.setattr(generate, "generate_steps", self.generate_steps)

    def input(self, prompt: str) -> str:
        line = next(self.lines)
        if isinstance(line, BaseException):
            raise line
        return line

    def generate_steps(self, model: llama.Llama, prompts: list[list[int]], new: int, *rest: Any) -> Iterator[list[int]]:
        self.prompts.append(prompts[0])
        for token in next(self.replies):
            if isinstance(token, BaseException):
                raise token
            yield [token]


@needs_data
def test_a_chat_forgets_its_oldest_turns_when_the_context_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system message and as many of the newest turns as leave room for an answer; a message too long alone is refused."""
    tokenizer = llama.Tokenizer(STORIES)
    long, answer = "Tell a story. " * 6, tokenizer.encode("Yes, I will. " * 6)
    lines = [f"{i} {long}" for i in range(8)]
    chat = Chat(monkeypatch, [*lines[:7], "too long " * 200, lines[7], ""], [answer] * 8)
    generate.main(["--model", str(STORIES), "--chat", "--system", "Be brief.", "--max-new-tokens", "100"])
    said = capsys.readouterr().err
    assert "note: the context is full; the oldest" in said
    assert said.count("error: ") == said.count("the context of 512 is full") == 1
    assert len(chat.prompts) == 8
    system, reply = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": tokenizer.decode(answer)}
    for i, prompt in enumerate(chat.prompts):
        turns = [message for line in lines[:i] for message in ({"role": "user", "content": line}, reply)]
        turns.append({"role": "user", "content": lines[i]})
        fitting = (llama.chat_prompt(tokenizer, [system, *turns[start:]]) for start in range(0, len(turns), 2))
        assert prompt == next(ids for ids in fitting if len(ids) + 100 <= 512)


@needs_data
def test_a_tag_in_an_answer_is_not_remembered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = llama.Tokenizer(STORIES)
    reply = tokenizer.encode("Well[/IN[/INST]ST] <<SYS>>done")
    chat = Chat(monkeypatch, ["Hello", "Again", ""], [reply, []])
    generate.main(["--model", str(STORIES), "--chat"])
    said = capsys.readouterr()
    assert "Well[/IN[/INST]ST] <<SYS>>done" in said.out
    assert "note: the answer contains [/INST]; it is remembered without" in said.err
    wanted = [("user", "Hello"), ("assistant", "Well[/IN ST]  done"), ("user", "Again")]
    assert chat.prompts[1] == llama.chat_prompt(tokenizer, [{"role": role, "content": text} for role, text in wanted])


@needs_data
def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = llama.Tokenizer(STORIES)
    cut = tokenizer.encode("Once upon")
    chat = Chat(monkeypatch, ["Hello", "Again", KeyboardInterrupt()], [[*cut, KeyboardInterrupt()], []])
    generate.main(["--model", str(STORIES), "--chat"])
    wanted = [("user", "Hello"), ("assistant", "Once upon"), ("user", "Again")]
    assert chat.prompts[1] == llama.chat_prompt(tokenizer, [{"role": role, "content": text} for role, text in wanted])


@needs_data
def test_a_line_that_is_not_utf_8_is_refused_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python raises for such a line, or hands over half a surrogate pair, depending on the locale."""
    chat = Chat(monkeypatch, [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "a\udcff", "Hello", ""], [[]])
    generate.main(["--model", str(STORIES), "--chat"])
    said = capsys.readouterr().err
    assert "error: 'utf-8' codec can't decode byte 0xff" in said
    assert "error: the text is not valid Unicode" in said
    assert len(chat.prompts) == 1


@needs_data
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "Once", "--seed", str(10**23), "--temperature", "1"], "seed 100000000000000000000000; expected"),
        (["--prompt", "Once", "--temperature", "-1"], "temperature -1.0"),
        (["--prompt", "a\udcff"], "the text is not valid Unicode: '\\udcff' at character 1"),
        (["--prompt", "a " * 600], "the context of 512 is full"),
        (["--chat", "--system", "<<SYS>>"], "the system message contains <<SYS>>"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_printed(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("builtins.input")
    with pytest.raises(SystemExit):
        generate.main(["--model", str(STORIES), *flags])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err


@needs_data
@pytest.mark.parametrize("prompts", [["Once"], ["Once", "One day"]])
def test_ids_that_the_tokenizer_lacks_are_shown(prompts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model whose vocabulary was enlarged, as for a multiple of 64, can choose them."""
    state = {name: tensor.clone() for name, tensor in llama.load(STORIES).state_dict().items()}
    state["model.embed_tokens.weight"] = torch.cat((state["model.embed_tokens.weight"], torch.zeros(64, 64)))
    model = llama.Llama(dataclasses.replace(llama.load(STORIES).config, vocab_size=576, tie_word_embeddings=False))
    state["lm_head.weight"] = torch.zeros(576, 64)
    state["lm_head.weight"][575] = 1.0
    model.load_state_dict(state)
    llama.save(model, tmp_path / "model", tokenizer_from=STORIES)
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    generate.main(["--model", str(tmp_path / "model"), "--max-new-tokens", "3", *flags])
    assert "Once<" in (shown := capsys.readouterr().out)
    assert "<575>" in shown


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


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A directory of several dtypes, as a run leaves it of a bf16 base: what trained is in fp32."""
    model = tiny("gqa").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "layers.1." in name or "norm" in name:
            parameter.data = parameter.data.float() + 1e-4
    llama.save(model, tmp_path / "mixed")
    return tmp_path / "mixed"


def stored(path: Path) -> dict[str, torch.Tensor]:
    weights = open_weights(path)
    return {name: weights.read(name) for name in weights.shapes}


def test_converting_keeps_the_dtype_of_each_tensor(mixed: Path, tmp_path: Path) -> None:
    convert.main(["--model", str(mixed), "--to", "meta", "--output", str(tmp_path / "meta")])
    convert.main(["--model", str(tmp_path / "meta"), "--to", "hf", "--output", str(tmp_path / "hf")])
    before = stored(mixed)
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16, torch.float32}
    for path in (tmp_path / "meta", tmp_path / "hf"):
        assert differing(stored(path), before) == []


def test_merging_keeps_the_dtype_of_each_tensor(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama.load(mixed)
    add_adapter(model, LoraConfig(r=2, target_modules=("down_proj",)))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.05
    save_adapter(model, tmp_path / "adapter")
    merge_adapter.main(["--model", str(mixed), "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")])
    assert f"modules into {tmp_path / 'merged'}, bfloat16 and float32: largest" in capsys.readouterr().out
    before, after = stored(mixed), stored(tmp_path / "merged")
    changed = sorted(differing(after, before))
    assert changed == sorted(name for name in before if "down_proj" in name)
    assert all(after[name].dtype == before[name].dtype for name in changed)


@pytest.mark.parametrize("shards", ["1", "4"])
def test_shards_of_a_hugging_face_directory_are_refused(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert.main(["--model", "nowhere", "--to", "hf", "--shards", shards, "--output", "new"])
    assert "--shards goes with --to meta" in capsys.readouterr().err


@needs_data
@pytest.mark.parametrize("shards", ["0", "-1"])
def test_impossible_shards_are_refused(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert.main(["--model", str(STORIES), "--to", "meta", "--shards", shards, "--output", str(tmp_path / "meta")])
    assert capsys.readouterr().err == f"error: shards is {shards}; expected a positive integer\n"


@needs_data
@pytest.mark.parametrize("to", ["hf", "meta"])
def test_convert_takes_a_tokenizer_from_elsewhere_or_says_that_there_is_none(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in Meta's downloads, where the models share the one beside their directories."""
    llama.save_meta(llama.load(STORIES), tmp_path / "meta")
    common = ["--model", str(tmp_path / "meta"), "--to", to, "--output"]
    convert.main([*common, str(tmp_path / "without")])
    assert f"note: there is no tokenizer.model in {tmp_path / 'meta'}; --tokenizer PATH" in capsys.readouterr().err
    assert not (tmp_path / "without" / "tokenizer.model").exists()
    for path in (STORIES, STORIES / "tokenizer.model"):
        convert.main([*common, str(tmp_path / path.name), "--tokenizer", str(path)])
        assert capsys.readouterr().err == ""
        copied = (tmp_path / path.name / "tokenizer.model").read_bytes()
        assert copied == (STORIES / "tokenizer.model").read_bytes()
    (tmp_path / "other.model").write_bytes(copied)
    for path, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "other.model", "expected a file called tokenizer.model"),
    ):
        with pytest.raises(SystemExit):
            convert.main([*common, str(tmp_path / "refused"), "--tokenizer", str(path)])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


@needs_data
def test_a_full_disk_is_one_line(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new"
    common = ["--model", str(STORIES), "--output", str(output)]
    for main, flags in (
        (convert.main, ["--to", "hf"]),
        (convert.main, ["--to", "meta"]),
        (merge_adapter.main, ["--adapter", str(adapter)]),
    ):
        with full_disk(), pytest.raises(SystemExit):
            main([*common, *flags])
        said = capsys.readouterr().err
        assert said.startswith(f"error: {output} cannot be written: ")
        assert "File too large" in said
        assert said.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_generate_through_several_adapters_in_one_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each prompt is answered as with its adapter alone; a prompt without a name goes to the base."""
    kinds = {
        "low": LoraConfig(target_modules="all-linear"),
        "prompts": LlamaAdapterConfig(4, 3),
        "prefix": PrefixTuningConfig(5),
    }
    common = ["--model", str(DEMO / "base"), "--max-new-tokens", "8"]
    adapters, prompts, alone = [], [], []
    for name, config in kinds.items():
        model = llama.load(DEMO / "base")
        add_adapter(model, config)
        generator = torch.Generator().manual_seed(1)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        save_adapter(model, tmp_path / name)
        adapters += ["--adapter", f"{name}={tmp_path / name}"]
        prompts += ["--prompt", f"{name}:Where Barel lives"]
        generate.main([*common, "--adapter", str(tmp_path / name), "--prompt", "Where Barel lives"])
        alone.append(f"--- {name}: {capsys.readouterr().out}")
    generate.main([*common, "--prompt", "Note: Barel"])
    alone.append(f"--- {capsys.readouterr().out}")
    generate.main([*common, *adapters, *prompts, "--prompt", "Note: Barel"])
    assert capsys.readouterr().out == "".join(alone)
    assert len(set(alone)) == 4
    for wrong, message in (
        ([*adapters, "--prompt", "prefx:Barel"], "no adapter 'prefx' - did you mean 'prefix'?"),
        ([*adapters, "--adapter", str(tmp_path / "low"), "--prompt", "x"], "several adapters need names, NAME=DIR"),
        ([*adapters, "--chat"], "a conversation with one adapter, not with low, prompts, prefix"),
    ):
        with pytest.raises(SystemExit):
            generate.main([*common, *wrong])
        assert message in capsys.readouterr().err


def test_convert_adapter_reads_the_official_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = llama.PRESETS["demo"]
    gate = torch.tensor([0.3, 0.3, 0.3, 0.3]).view(1, 4, 1, 1)
    tensors = {f"layers.{i}.attention.gate": gate.clone() for i in range(config.num_hidden_layers)}
    torch.save({"model": {"adapter_query.weight": torch.randn(20, config.hidden_size), **tensors}}, tmp_path / "adapter.pth")
    flags = ["--model", str(DEMO / "base"), "--official", str(tmp_path / "adapter.pth"), "--gate-activation", "tanh"]
    convert_adapter.main([*flags, "--output", str(tmp_path / "ours")])
    convert_adapter.main([*flags, "--output", str(tmp_path / "peft"), "--peft"])
    assert "wrote" in capsys.readouterr().out
    ids = torch.arange(1, 9)[None]
    logits = []
    for name in ("ours", "peft"):
        model = llama.load(DEMO / "base")
        load_adapter(model, tmp_path / name)
        logits.append(model(ids))
    theirs = peft.PeftModel.from_pretrained(hf_model(DEMO / "base"), tmp_path / "peft").eval()
    assert largest(logits[0], logits[1]) <= 1e-5 * logits[0].abs().max()
    assert largest(theirs(ids).logits, logits[1]) <= 1e-5 * logits[0].abs().max()
    tensors["layers.3.attention.gate"] = gate * torch.arange(4).view(1, 4, 1, 1)
    torch.save({"adapter_query.weight": torch.randn(20, config.hidden_size), **tensors}, tmp_path / "adapter.pth")
    with pytest.raises(SystemExit):
        convert_adapter.main([*flags, "--output", str(tmp_path / "no"), "--peft"])
    assert "layer 3: gates of its heads run from 0 to 0.7163" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
