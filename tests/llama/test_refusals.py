"""Bad model directories: each ends in one InputError that names the file, the key and the reason."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama
from llama import InputError, Tokenizer
from llama.files import check_free
from llama.weight_files import load_pickled
from tests.llama.common import tiny
from tests.llama.meta_files import write_meta

Damage = Callable[[Path], Any]
Q0, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound directory per layout; each test damages a copy."""
    root = tmp_path_factory.mktemp("good")
    model = tiny("gqa")
    llama.save(model, root / "single")
    llama.save(model, root / "shards", max_shard_bytes=400_000)
    (root / "bin").mkdir()
    shutil.copy(root / "single" / "config.json", root / "bin")
    torch.save(model.state_dict(), root / "bin" / "pytorch_model.bin")
    write_meta(root / "meta", "gqa")
    write_meta(root / "meta2", "gqa", shards=2)
    for name in ("single", "shards", "bin", "meta", "meta2"):
        llama.load(root / name)
    return root


def config(**changes: Any) -> Damage:
    """Change config.json; a change to ... deletes the key."""

    def apply(path: Path) -> None:
        found = {**json.loads((path / "config.json").read_text()), **changes}
        (path / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return apply


def text(file: str, content: str | bytes) -> Damage:
    return lambda path: (path / file).write_bytes(content.encode() if isinstance(content, str) else content)


def cut_off(file: str, keep: float) -> Damage:
    return lambda path: (path / file).write_bytes((path / file).read_bytes()[: int(keep * (path / file).stat().st_size)])


def remove(file: str) -> Damage:
    return lambda path: (path / file).unlink()


def tensors(change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> Damage:
    """Change the dictionary of tensors in a weight file."""

    def apply(path: Path) -> None:
        if file.endswith(".safetensors"):
            found = load_file(path / file)
            change(found)
            save_file(found, path / file)
        else:
            found = torch.load(path / file, weights_only=True)
            change(found)
            torch.save(found, path / file)

    return apply


def index(**changes: Any) -> Damage:
    """Change the index's weight_map."""

    def apply(path: Path) -> None:
        file = path / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], **changes}}))

    return apply


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **parameters}


SHARD = "model-00001-of-00002.safetensors"
META, META1 = "consolidated.00.pth", "consolidated.01.pth"

TABLE: list[tuple[str, str, Damage, str]] = [
    # what is wrong, which directory, how, the message (file, key and reason)
    ("no directory", "single", shutil.rmtree, "{path} is not a directory; expected a Hugging Face or Meta model directory"),
    ("a file", "single", lambda path: (shutil.rmtree(path), path.write_text("x")), "{path} is not a directory"),
    ("empty", "single", lambda path: (shutil.rmtree(path), path.mkdir()), "neither config.json (Hugging Face) nor params.json"),
    ("no config", "single", remove("config.json"), "nor params.json (Meta); found model.safetensors"),
    (
        "no weights",
        "single",
        remove("model.safetensors"),
        "{path} has a config.json but no weights; expected model.safetensors",
    ),
    # safetensors
    ("truncated", "single", cut_off("model.safetensors", 0.5), "{path}/model.safetensors is damaged or not a safetensors file"),
    ("truncated header", "single", cut_off("model.safetensors", 0.001), "{path}/model.safetensors is damaged"),
    ("empty weights", "single", text("model.safetensors", ""), "{path}/model.safetensors is damaged"),
    ("garbage", "single", text("model.safetensors", b"\x07" * 5000), "{path}/model.safetensors is damaged"),
    ("a web page", "single", text("model.safetensors", "<html>404</html>" * 99), "{path}/model.safetensors is damaged"),
    ("truncated shard", "shards", cut_off(SHARD, 0.9), "{path}/" + SHARD + " is damaged or not a safetensors file"),
    # tensors
    ("missing tensor", "single", tensors(lambda t: t.pop(Q0)), "{path}: 1 tensors are missing: " + Q0),
    (
        "no embedding",
        "single",
        tensors(lambda t: t.pop(EMBEDDING)),
        "{path}: " + EMBEDDING + " is missing; found lm_head.weight",
    ),
    ("no tensors", "single", tensors(dict.clear), "{path}: " + EMBEDDING + " is missing; found no tensors"),
    ("missing head", "single", tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight (tie_word_embeddings is false)"),
    (
        "unknown tensor",
        "single",
        tensors(lambda t: t.update({"x.y": torch.ones(1)})),
        "1 tensors do not belong to this model: x.y",
    ),
    (
        *("misspelt tensor", "single", tensors(lambda t: t.update({"model.norms.weight": t[NORM].clone()}))),
        "model.norms.weight - did you mean 'model.norm.weight'?",
    ),
    ("a bias", "single", tensors(lambda t: t.update({Q0[:-6] + "bias": torch.ones(64)})), "do not belong to this model: "),
    (
        *("wrong shape", "single", tensors(lambda t: t.update({Q0: t[Q0][:32].clone()}))),
        "{path}: " + Q0 + " has shape (32, 64); the configuration says (64, 64)",
    ),
    (
        *("transposed", "single", tensors(lambda t: t.update({Q0: t[Q0].flatten().clone()}))),
        Q0 + " has shape (4096,); the configuration says (64, 64)",
    ),
    ("int8", "single", tensors(lambda t: t.update({Q0: t[Q0].char()})), Q0 + " holds torch.int8; quantised weights"),
    # config.json
    ("not JSON", "single", text("config.json", '{"model_type": '), "{path}/config.json:1:16: not JSON"),
    (
        "a number too long",
        "single",
        text("config.json", '{"vocab_size": ' + "1" * 5000 + "}"),
        "{path}/config.json cannot be read",
    ),
    ("nested too deeply", "single", text("config.json", "[" * 100_000), "{path}/config.json cannot be read: maximum recursion"),
    (
        *("a key twice", "single", text("config.json", '{"a": {"vocab_size": 1, "vocab_size": 2}}')),
        "{path}/config.json cannot be read: the key 'vocab_size' appears twice in one object",
    ),
    ("no eps", "single", config(rms_norm_eps=...), "{path}/config.json: no rms_norm_eps; expected a number (1e-5 in Llama 2)"),
    ("empty config", "single", text("config.json", ""), "{path}/config.json:1:1: not JSON"),
    ("a list", "single", text("config.json", "[1]"), "{path}/config.json holds a list; expected a JSON object"),
    ("not UTF-8", "single", text("config.json", b"\xff\xfe"), "{path}/config.json cannot be read"),
    ("a directory", "single", lambda p: (remove("config.json")(p), (p / "config.json").mkdir()), "config.json cannot be read"),
    ("no model_type", "single", config(model_type=...), "{path}/config.json: no model_type"),
    (
        "mistral",
        "single",
        config(model_type="mistral"),
        "config.json: model_type = 'mistral' is not supported; expected 'llama'",
    ),
    ("NaN eps", "single", config(rms_norm_eps=float("nan")), "config.json: rms_norm_eps is nan; expected a positive finite"),
    ("infinite theta", "single", config(rope_theta=float("inf"), rope_parameters=...), "config.json: rope_theta is inf"),
    ("infinite theta in object", "single", config(rope_parameters=rope(rope_theta=float("inf"))), "rope_theta is inf"),
    ("theta is text", "single", config(rope_parameters=rope(rope_theta="1e4")), "rope_theta is '1e4'; expected a positive"),
    ("zero layers", "single", config(num_hidden_layers=0), "num_hidden_layers is 0; expected a positive integer"),
    ("fewer layers", "single", config(num_hidden_layers=2), "{path}: the weights have 3 layers; the configuration says 2"),
    ("more layers", "single", config(num_hidden_layers=10**9), "have 3 layers; the configuration says 1000000000"),
    (
        *("a huge width", "single", config(hidden_size=10**12, head_dim=...)),
        "model.embed_tokens.weight has shape (97, 64); the configuration says (97, 1000000000000)",
    ),
    ("a huge feed-forward", "single", config(intermediate_size=10**30), "gate_proj.weight has shape (172, 64); the config"),
    ("a huge vocabulary", "single", config(vocab_size=10**30), "embed_tokens.weight has shape (97, 64); the configuration"),
    ("a huge theta", "single", config(rope_theta=10**400, rope_parameters=...), "expected a positive finite number"),
    (
        "vocabulary",
        "single",
        config(vocab_size=98),
        "model.embed_tokens.weight has shape (97, 64); the configuration says (98, 64)",
    ),
    ("text for a number", "single", config(hidden_size="64"), "hidden_size is '64'; expected a positive integer"),
    ("H % G", "single", config(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    (
        "C % H",
        "single",
        config(num_attention_heads=6, head_dim=...),
        "hidden_size 64 is not a multiple of num_attention_heads 6",
    ),
    ("odd D", "single", config(num_attention_heads=64, head_dim=...), "= 1 is odd; rotary positions need pairs"),
    (
        "head_dim",
        "single",
        config(head_dim=32),
        "head_dim = 32 is not supported; expected hidden_size / num_attention_heads = 16",
    ),
    ("tie is text", "single", config(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; expected true or false"),
    ("eos is text", "single", config(eos_token_id=[2, "</s>"]), "eos_token_id = [2, '</s>']; expected a token id"),
    *[
        (f"rope {kind} ({key}, {name})", "single", config(**{key: {name: kind, "factor": 2.0}}), f"scaling of type {kind!r}")
        for kind in ("linear", "dynamic", "yarn", "longrope", "llama3")
        for key, name in (("rope_scaling", "type"), ("rope_scaling", "rope_type"), ("rope_parameters", "rope_type"))
    ],
    ("rope is text", "single", config(rope_scaling="linear"), "rope parameters are 'linear'; expected an object"),
    ("partial rotary", "single", config(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
    (
        "partial rotary in object",
        "single",
        config(rope_parameters=rope(partial_rotary_factor=0.5)),
        "partial_rotary_factor = 0.5",
    ),
    ("attention bias", "single", config(attention_bias=True), "attention_bias = True is not supported; expected False"),
    ("MLP bias", "single", config(mlp_bias=True), "mlp_bias = True is not supported; expected False"),
    ("gelu", "single", config(hidden_act="gelu"), "hidden_act = 'gelu' is not supported; expected 'silu'"),
    ("dropout", "single", config(attention_dropout=0.1), "attention_dropout = 0.1 is not supported; expected 0"),
    (
        "quantised",
        "single",
        config(quantization_config={"quant_method": "gptq"}),
        "quantization_config = {{'quant_method': 'gptq'}}",
    ),
    ("unknown dtype", "single", config(dtype="int4"), "dtype = 'int4' is unknown; expected one of float32, bfloat16"),
    ("unknown torch_dtype", "single", config(dtype=..., torch_dtype="float8"), "dtype = 'float8' is unknown"),
    # index
    ("absent shard", "shards", remove(SHARD), "model.safetensors.index.json names " + SHARD + ", which does not exist"),
    (
        "outside",
        "shards",
        index(x="../model.safetensors"),
        "index.json: x is mapped to '../model.safetensors'; expected a file name",
    ),
    (
        "absolute",
        "shards",
        index(x="/etc/passwd"),
        "index.json: x is mapped to '/etc/passwd'; expected a file name in the same",
    ),
    ("parent", "shards", index(x=".."), "index.json: x is mapped to '..'; expected a file name in the same directory"),
    ("a number", "shards", index(x=1), "index.json: x is mapped to 1; expected a file name"),
    ("absent tensor", "shards", index(x=SHARD), "index.json promises x in " + SHARD + ", which does not hold it"),
    ("no weight_map", "shards", text("model.safetensors.index.json", "{}"), "index.json: no weight_map; expected an object"),
    ("index not JSON", "shards", text("model.safetensors.index.json", "{"), "model.safetensors.index.json:1:2: not JSON"),
    # .bin
    (
        "truncated bin",
        "bin",
        cut_off("pytorch_model.bin", 0.5),
        "{path}/pytorch_model.bin is damaged or holds more than tensors",
    ),
    ("empty bin", "bin", text("pytorch_model.bin", ""), "{path}/pytorch_model.bin is damaged"),
    ("garbage bin", "bin", text("pytorch_model.bin", "garbage"), "{path}/pytorch_model.bin is damaged"),
    (
        "nested",
        "bin",
        lambda p: torch.save({"model": {"a": 1}}, p / "pytorch_model.bin"),
        "other than a flat dictionary of tensors",
    ),
    (
        "a tensor",
        "bin",
        lambda p: torch.save(torch.ones(1), p / "pytorch_model.bin"),
        "other than a flat dictionary of tensors",
    ),
    ("numbered", "bin", lambda p: torch.save({1: torch.ones(1)}, p / "pytorch_model.bin"), "other than a flat dictionary"),
    # Meta
    ("no consolidated", "meta", remove(META), "{path} has a params.json but no consolidated.*.pth"),
    ("no shard 00", "meta2", remove(META), "shards are consolidated.01.pth; expected consolidated.00.pth and onwards"),
    ("no shard 01", "meta2", remove(META1), "feed_forward.w1.weight has 96 rows"),
    ("no params", "meta", remove("params.json"), "nor params.json (Meta); found consolidated.00.pth"),
    ("params not JSON", "meta", text("params.json", "dim: 64"), "{path}/params.json:1:1: not JSON"),
    (
        "scaled rope",
        "meta",
        text("params.json", "{}"),
        "{path}/params.json: missing dim, n_layers, n_heads, norm_eps, multiple_of",
    ),
    ("truncated shard 01", "meta2", cut_off(META1, 0.7), "{path}/consolidated.01.pth is damaged"),
    (
        *("missing in shard 01", "meta2", tensors(lambda t: t.pop("norm.weight"), META1)),
        "consolidated.01.pth and consolidated.00.pth hold different tensors: these shards do not belong together",
    ),
    (
        *("shape in shard 01", "meta2", tensors(lambda t: t.update({"norm.weight": torch.ones(32)}), META1)),
        "consolidated.01.pth: norm.weight has shape (32,), but (64,) in consolidated.00.pth",
    ),
    (
        *("width in shard 01", "meta2", tensors(lambda t: t.update({"output.weight": torch.ones(48, 32)}), META1)),
        "consolidated.01.pth: output.weight has shape (48, 32), but (48, 64) in consolidated.00.pth",
    ),
    ("no embedding", "meta", tensors(lambda t: t.pop("tok_embeddings.weight"), META), META + ": missing tok_embeddings.weight"),
    ("no head", "meta", tensors(lambda t: t.pop("output.weight"), META), "1 tensors are missing: lm_head.weight"),
    (
        "unknown in meta",
        "meta",
        tensors(lambda t: t.update({"x": torch.ones(1)}), META),
        META + ": 1 tensors are not a Llama's",
    ),
    (
        *("HF's names", "meta", tensors(lambda t: t.update({NORM: t.pop("norm.weight")}), META)),
        META + ": 1 tensors are not a Llama's by Meta's names: model.norm.weight",
    ),
]


@pytest.mark.parametrize(("layout", "damage", "message"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_a_bad_directory_is_refused(layout: str, damage: Damage, message: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(good / layout, path)
    damage(path)
    with pytest.raises(InputError) as error:
        llama.load(path)
    assert message.format(path=path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user may search, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@contextmanager
def permissions(path: Path, mode: int) -> Iterator[None]:
    """Within, `path` has `mode`, and not even root may ignore it."""
    path.chmod(mode)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(0o755)


@pytest.mark.parametrize(
    ("layout", "file", "opened"),
    [
        ("single", "", llama.load),
        ("single", "config.json", llama.load),
        ("single", "model.safetensors", llama.load),
        ("bin", "pytorch_model.bin", llama.load),
        ("meta", META, llama.load),
        ("single", "", Tokenizer),
        ("single", "tokenizer.model", Tokenizer),
        ("single", "", check_free),
    ],
)
def test_what_may_not_be_read_is_said_to_be_so(
    layout: str, file: str, opened: Callable[[Path], Any], good: Path, public: Path
) -> None:
    """A directory that may not be searched (or not listed), or a file that may not be opened."""
    shutil.copytree(good / layout, public / "model")
    (public / "model" / "tokenizer.model").touch()
    mode = 0 if file or opened is check_free else 0o644
    with permissions(public / "model" / file, mode), pytest.raises(InputError) as error:
        opened(public / "model")
    assert "cannot be read: " in str(error.value)
    assert "Permission denied" in str(error.value)
    assert str(public / "model" / file) in str(error.value)


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
@pytest.mark.parametrize(("layout", "file"), [("bin", "pytorch_model.bin"), ("meta", META)])
def test_code_in_a_pickle_is_refused_and_does_not_run(layout: str, file: str, zipped: bool, good: Path, tmp_path: Path) -> None:
    path, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(good / layout, path)
    torch.save({"x": Touch(trace)}, path / file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"{file} is damaged or holds more than tensors"):
        llama.load(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Touch(trace)))
    assert trace.exists()  # so it would have been seen


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_a_damaged_pickle_never_ends_in_another_exception(zipped: bool, tmp_path: Path) -> None:
    """Bytes changed, dropped and inserted anywhere: the file is refused, or holds a dictionary of tensors."""
    torch.save({"a": torch.ones(4, 4), "b": torch.zeros(3)}, tmp_path / "good", _use_new_zipfile_serialization=zipped)
    original, rng, messages = (tmp_path / "good").read_bytes(), random.Random(0), []
    for _ in range(300):
        data, at = bytearray(original), rng.randrange(len(original))
        data[at : at + rng.choice([1, 1, 5, len(data)])] = rng.randbytes(rng.choice([0, 1, 5]))
        (tmp_path / "bad").write_bytes(data)
        try:
            loaded = load_pickled(tmp_path / "bad")
        except InputError as error:
            messages.append(str(error))
        else:
            assert all(isinstance(tensor, Tensor) for tensor in loaded.values())
    assert len(messages) > 100
    assert [message for message in messages if not message.startswith(f"{tmp_path / 'bad'} ")] == []


TOKENIZERS: list[tuple[str, Damage, str]] = [
    ("nothing", lambda path: None, "{path}/tokenizer.model does not exist; expected a sentencepiece tokenizer.model"),
    ("tokenizer.json only", text("tokenizer.json", "{}"), "tokenizer.model; tokenizer.json alone is not enough"),
    ("garbage", text("tokenizer.model", "garbage"), "{path}/tokenizer.model is not a sentencepiece model"),
    ("empty", text("tokenizer.model", ""), "{path}/tokenizer.model is not a sentencepiece model"),
    ("a directory", lambda path: (path / "tokenizer.model").mkdir(), "{path}/tokenizer.model does not exist"),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in TOKENIZERS], ids=[row[0] for row in TOKENIZERS])
def test_a_bad_tokenizer_is_refused(damage: Damage, message: str, tmp_path: Path) -> None:
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        Tokenizer(tmp_path)
    assert message.format(path=tmp_path) in str(error.value)
