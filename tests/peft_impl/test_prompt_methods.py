"""Prefix-tuning and LLaMA-Adapter equal PEFT's: logits through files in both directions, gradients, positions, the cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import llama
from llama import InputError, Llama, LlamaConfig, generate
from peft_impl import (
    LlamaAdapterConfig,
    PrefixTuningConfig,
    add_adapter,
    count_parameters,
    load_adapter,
    read_adapter,
    save_adapter,
)
from peft_impl.adapters import AdapterLeaf
from tests.oracle import SHAPES, STORIES, float64_oracle, hf_model, largest, needs_data
from tests.peft_impl.common import IDS, assert_same, peft_keys, perturb, snapshot, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed"),
]

LOGITS = 1e-5  # fp32, logits up to 5 in size: keys are turned by -P where PEFT moves the tokens by P
FLOAT64 = 1e-12  # as in test_parity
FLOAT32_GRADIENT = 1e-5  # relative to the largest

METHODS: dict[str, tuple[Any, Any]] = {  # ours, and PEFT's
    "prefix": (
        PrefixTuningConfig(num_virtual_tokens=5),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    ),
    "projected": (
        PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24),
    ),
    "adapter": (
        LlamaAdapterConfig(adapter_len=4, adapter_layers=2),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
    ),
}
EVERY = [(shape, method) for shape in SHAPES for method in METHODS]


def ours(shape: str, method: str, dtype: torch.dtype = torch.float32) -> Llama:
    """A small model with the method, away from its start."""
    model = tiny(shape, dtype)
    add_adapter(model, METHODS[method][0])
    perturb(model)
    return model


def peft_of(base: Path, method: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """PEFT's own model of the same kind over HF's own model."""
    model = peft.get_peft_model(hf_model(base, dtype), copy.deepcopy(METHODS[method][1]))  # PEFT writes into it
    perturb(model)
    return model.eval()


@pytest.mark.parametrize(("shape", "method"), EVERY)
def test_what_peft_wrote_gives_pefts_logits(bases: dict[str, Path], tmp_path: Path, shape: str, method: str) -> None:
    theirs = peft_of(bases[shape], method)
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama.load(bases[shape])
    base = model(IDS)
    load_adapter(model, tmp_path / "adapter")
    assert largest(model(IDS), theirs(IDS).logits) <= LOGITS
    assert largest(model(IDS), base) > 0.05


@pytest.mark.parametrize(("shape", "method"), EVERY)
def test_peft_reads_what_we_wrote(bases: dict[str, Path], tmp_path: Path, shape: str, method: str) -> None:
    model = ours(shape, method)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hf_model(bases[shape]), tmp_path / "adapter").eval()
    assert largest(theirs(IDS).logits, model(IDS)) <= LOGITS
    # The same keys, shapes and settings as PEFT's own files.
    peft_of(bases[shape], method).save_pretrained(tmp_path / "theirs")
    written, wanted = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "theirs"))
    assert {key: t.shape for key, t in written.items()} == {key: t.shape for key, t in wanted.items()}
    settings, known = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("adapter", "theirs"))
    same = settings.keys() - {"base_model_name_or_path", "prefix_projection", "encoder_hidden_size"}
    assert {key: settings[key] for key in same} == {key: known[key] for key in same}


@needs_data
@pytest.mark.parametrize("method", METHODS)
def test_real_weights_in_both_directions(tmp_path: Path, method: str) -> None:
    theirs = peft_of(STORIES, method)
    theirs.save_pretrained(tmp_path / "theirs")
    model = llama.load(STORIES)
    load_adapter(model, tmp_path / "theirs")
    scale = theirs(IDS).logits.abs().max()
    assert largest(model(IDS), theirs(IDS).logits) <= LOGITS * scale
    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(hf_model(STORIES), tmp_path / "ours").eval()
    assert largest(again(IDS).logits, model(IDS)) <= LOGITS * scale


def losses(model: nn.Module, theirs: nn.Module) -> None:
    """Ours and PEFT's, backpropagated."""
    model(IDS, IDS).backward()
    logits = theirs(IDS).logits[:, :-1]
    F.cross_entropy(logits.reshape(-1, logits.shape[-1]), IDS[:, 1:].reshape(-1), reduction="sum").backward()


def copy_mlp(model: Llama, theirs: nn.Module) -> None:
    """PEFT's MLP into ours: its last layer cut by decoder layers."""
    encoder = theirs.prompt_encoder["default"]
    own = dict(model.named_parameters())
    last = encoder.transform[2]
    with torch.no_grad():
        own["model.encoders.default.embedding"].copy_(encoder.embedding.weight)
        own["model.encoders.default.weight"].copy_(encoder.transform[0].weight)
        own["model.encoders.default.bias"].copy_(encoder.transform[0].bias)
        for part in ("weight", "bias"):
            for i, piece in enumerate(getattr(last, part).chunk(model.config.num_hidden_layers)):
                own[f"model.layers.{i}.self_attn.prefixes.default.{part}"].copy_(piece)


def gradients(model: Llama, theirs: nn.Module, method: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Ours and PEFT's gradient of the same tensor, whole."""
    own = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if method == "adapter":
        wanted = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
        return {key: (p.grad, wanted[key]) for key, p in peft_keys(model).items()}
    layers = [f"model.layers.{i}.self_attn.prefixes.default" for i in range(model.config.num_hidden_layers)]
    encoder = theirs.prompt_encoder["default"]
    if method == "prefix":
        return {"prefix": (torch.cat([own[f"{n}.prefix"].flatten(1) for n in layers], 1), encoder.embedding.weight.grad)}
    return {
        "embedding": (own["model.encoders.default.embedding"], encoder.embedding.weight.grad),
        "weight": (own["model.encoders.default.weight"], encoder.transform[0].weight.grad),
        "bias": (own["model.encoders.default.bias"], encoder.transform[0].bias.grad),
        "last weight": (torch.cat([own[f"{n}.weight"] for n in layers]), encoder.transform[2].weight.grad),
        "last bias": (torch.cat([own[f"{n}.bias"] for n in layers]), encoder.transform[2].bias.grad),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "method"), EVERY)
def test_logits_and_gradients(
    bases: dict[str, Path], tmp_path: Path, shape: str, method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = peft_of(bases[shape], method, dtype).to(dtype)
    model = llama.load(bases[shape], dtype)
    if method == "projected":  # PEFT's file has no MLP
        add_adapter(model, METHODS[method][0])
        copy_mlp(model, theirs)
    else:
        theirs.save_pretrained(tmp_path / "adapter")
        load_adapter(model, tmp_path / "adapter", trainable=True)
    if dtype == torch.float64:
        with float64_oracle():
            assert largest(model(IDS), theirs(IDS).logits) <= FLOAT64
            losses(model, theirs)
    else:
        losses(model, theirs)
    bound = FLOAT64 if dtype == torch.float64 else FLOAT32_GRADIENT
    for name, (found, wanted) in gradients(model, theirs, method).items():
        assert wanted.abs().max() > 0, name
        assert largest(found, wanted) <= bound * max(1.0, wanted.abs().max().item()), name


@pytest.mark.parametrize("method", METHODS)
def test_bf16_base_has_fp32_masters_and_pefts_logits(bases: dict[str, Path], tmp_path: Path, method: str) -> None:
    """bf16 has 8 bits: the two agree within its rounding, which is how far either is from fp32."""
    theirs = peft_of(bases["gqa"], method)
    theirs.save_pretrained(tmp_path / "adapter")
    exact = theirs(IDS).logits
    low = peft.PeftModel.from_pretrained(hf_model(bases["gqa"], torch.bfloat16), tmp_path / "adapter").eval()(IDS).logits
    model = llama.load(bases["gqa"], torch.bfloat16)
    load_adapter(model, tmp_path / "adapter", trainable=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(IDS).dtype == torch.bfloat16
    assert largest(model(IDS), exact) <= 1.5 * largest(low, exact)


# --- where the tokens stand, and what sees what -------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "method"), [(s, m) for s, m in EVERY if m != "projected"])
def test_padding_left_or_right_changes_nothing(bases: dict[str, Path], tmp_path: Path, shape: str, method: str) -> None:
    """PEFT with the positions that `generate` gives it; ours pads on the right, where no token sees it."""
    theirs = peft_of(bases[shape], method)
    theirs.save_pretrained(tmp_path / "adapter")
    model = llama.load(bases[shape])
    load_adapter(model, tmp_path / "adapter")
    lengths = (9, 4)
    ids = [IDS[row, :length] for row, length in enumerate(lengths)]
    right = torch.stack([F.pad(row, (0, 9 - len(row)), value=3) for row in ids])
    left = torch.stack([F.pad(row, (9 - len(row), 0), value=3) for row in ids])
    mask = torch.stack([F.pad(torch.ones(n, dtype=torch.long), (9 - n, 0)) for n in lengths])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = theirs(input_ids=left, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(lengths):
        alone = model(ids[row][None])[0]
        assert largest(model(right)[row, :length], alone) <= LOGITS
        assert largest(padded[row, 9 - length :], alone) <= LOGITS


@pytest.mark.parametrize(("shape", "method"), EVERY)
def test_generation_with_cache_equals_without_and_pefts(
    bases: dict[str, Path], tmp_path: Path, shape: str, method: str
) -> None:
    model = ours(shape, method)
    prompts = [IDS[0, :7].tolist(), IDS[1, :3].tolist()]
    cached = generate(model, prompts, 12)
    assert cached == generate(model, prompts, 12, use_cache=False)
    assert cached == [generate(model, [prompt], 12)[0] for prompt in prompts]
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(hf_model(bases[shape]), tmp_path / "adapter").eval()
    left = torch.tensor([prompts[0], [3] * 4 + prompts[1]])
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
    new = theirs.generate(
        input_ids=left, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert cached == new[:, 7:].tolist()


def test_each_query_sees_the_whole_prefix_and_its_past() -> None:
    """Against a dense mask, the definition: the fused form is the same attention."""
    model = ours("gqa", "prefix")
    T = IDS.shape[1]
    dense = torch.ones(T, T, dtype=torch.bool).tril()
    assert largest(model(IDS), model(IDS, mask=dense)) <= LOGITS
    changed = IDS.clone()
    changed[:, 6] = 1
    assert torch.equal(model(changed)[:, :6], model(IDS)[:, :6])


class Kernels(TorchDispatchMode):
    """The attention kernels that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_attention_stays_on_the_fused_kernel(method: str) -> None:
    model = ours("gqa", method).train()
    with Kernels() as kernels:
        model(IDS, IDS).backward()
    assert all("flash_attention" in name for name in kernels.called), kernels.called
    backward = sum("backward" in name for name in kernels.called)
    assert len(kernels.called) - backward == len(model.model.layers) == 3
    assert backward == (1 if method == "adapter" else 3)  # before the second adapted layer nothing depends on a prompt


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_attention_stays_on_flash_on_a_gpu(method: str) -> None:
    model = tiny("gqa", torch.bfloat16)
    add_adapter(model, METHODS[method][0])
    perturb(model)
    expected = model(IDS).float()
    model.cuda()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):  # anything else is refused
        found = model(IDS.cuda())
        model(IDS.cuda(), IDS.cuda()).backward()
    assert largest(found.float().cpu(), expected) <= 0.1  # bf16, another kernel


# --- starts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["scalar", "head"])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_adapter_starts_as_the_base_and_its_gates_learn_first(shape: str, gate: str, activation: str) -> None:
    model = tiny(shape)
    base, before = model(IDS), snapshot(model)
    add_adapter(model, LlamaAdapterConfig(4, 2, gate, activation))  # type: ignore[arg-type]
    assert torch.equal(model(IDS), base)
    kept = snapshot(model)
    assert_same({name: kept[name] for name in before}, before)
    model(IDS, IDS).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert bool(parameter.grad.any()) == name.endswith("gate"), name


def test_a_prefix_near_zero_only_dilutes_attention() -> None:
    """The limit of init_std -> 0: P keys of logit 0 and value 0, so attention shrinks by sum / (P + sum), and nothing else."""
    model = tiny(dtype=torch.float64)
    attention = model.model.layers[0].self_attn
    q, k, v = (torch.randn(2, heads, 6, 16, dtype=torch.float64) for heads in (4, 2, 2))
    plain = attention.attend(q, k, v, None)
    add_adapter(model, PrefixTuningConfig(num_virtual_tokens=5, init_std=1e-9))
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    total = scores.exp().sum(-1, keepdim=True)
    assert largest(attention.attend(q, k, v, None), plain * total / (5 + total)) <= 1e-8


@needs_data
def test_a_small_prefix_starts_close_to_a_real_base() -> None:
    ids = torch.tensor([llama.Tokenizer(STORIES).encode("One day, Tim went to the park with his mom. He saw a dog.", bos=True)])
    divergence = {}
    for std in (1.0, 0.02):
        model = llama.load(STORIES)
        base = model(ids).log_softmax(-1)
        add_adapter(model, PrefixTuningConfig(init_std=std))
        divergence[std] = (base.exp() * (base - model(ids).log_softmax(-1))).sum(-1).mean().item()
    assert divergence[0.02] < 0.3
    assert divergence[1.0] > 10 * divergence[0.02]


@pytest.mark.parametrize("method", METHODS)
def test_starts_depend_on_the_seed_and_on_nothing_else(method: str) -> None:
    def start(seed: int, name: str = "default", dtype: torch.dtype = torch.float32) -> list[Tensor]:
        model = tiny(dtype=dtype)
        add_adapter(model, METHODS[method][0], name, seed)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    torch.manual_seed(1)
    first = start(3)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, start(3, "other", torch.bfloat16), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, start(4), strict=True))
    shapes = [p.shape for p in first]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i] if a.shape == b.shape and a.any()), shapes


# --- the MLP ------------------------------------------------------------------------------------------------------------


def test_the_mlp_is_folded_into_the_file(tmp_path: Path) -> None:
    model = ours("gqa", "projected")
    logits = model(IDS)
    save_adapter(model, tmp_path / "adapter")
    config, tensors = read_adapter(tmp_path / "adapter")
    assert list(tensors) == ["prompt_embeddings"]
    assert tensors["prompt_embeddings"].shape == (5, 2 * 3 * 2 * 16)
    assert not config.prefix_projection
    again = tiny()
    load_adapter(again, tmp_path / "adapter", trainable=True)
    assert largest(again(IDS), logits) <= LOGITS
    again(IDS, IDS).backward()  # and goes on learning, as a direct prefix


# --- counts (numerics of the literature) --------------------------------------------------------------------------------

SIZES: list[tuple[str, Any, int]] = [
    ("llama2-7b", PrefixTuningConfig(30), 7_864_320),
    ("llama2-13b", PrefixTuningConfig(30), 12_288_000),
    ("llama2-70b", PrefixTuningConfig(30), 4_915_200),
    ("llama2-7b", PrefixTuningConfig(30, True, 4096), 1_090_908_160),
    ("llama2-7b", PrefixTuningConfig(30, True), 1_090_908_160),
    ("llama2-7b", PrefixTuningConfig(30, True, 512), 136_700_416),
    ("llama2-7b", LlamaAdapterConfig(10, 30), 1_228_830),
    ("llama2-7b", LlamaAdapterConfig(10, 30, "head", "tanh"), 1_228_800 + 960),
]


@pytest.mark.parametrize(("preset", "config", "expected"), SIZES)
def test_parameter_counts_of_the_real_models(preset: str, config: Any, expected: int) -> None:
    model = on_meta(llama.PRESETS[preset])
    add_adapter(model, config)
    trainable, total = count_parameters(model)
    assert trainable == expected
    leaves = [m for m in model.modules() if isinstance(m, AdapterLeaf)]
    assert sum(p.numel() for leaf in leaves for p in leaf.parameters()) == expected
    assert total - trainable == sum(p.numel() for p in on_meta(llama.PRESETS[preset]).parameters())


def on_meta(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(config)


# --- files that are wrong -----------------------------------------------------------------------------------------------

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GATE = "base_model.model.model.layers.2.self_attn.adaption_gate"
PROMPT = "base_model.model.model.layers.1.self_attn.adaption_prompt"


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        held = load_file(path / FILE)
        change(held)
        save_file(held, path / FILE, metadata={"format": "pt"})

    return edit


def settings(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        (path / CONFIG).write_text(json.dumps({**json.loads((path / CONFIG).read_text()), **changes}))

    return edit


def cut(path: Path) -> None:
    (path / FILE).write_bytes((path / FILE).read_bytes()[:-8])


WRONG: list[tuple[str, Callable[[Path], None], str]] = [
    ("adapter", tensors(lambda t: t.pop(GATE)), f"1 of 4 tensors are missing: {GATE}"),
    ("adapter", tensors(lambda t: t.update({f"{GATE}s": t.pop(GATE)})), f"1 of 4 tensors are missing: {GATE}"),
    ("adapter", tensors(lambda t: t.update({GATE: torch.ones(4)})), rf"{GATE} has shape \(4,\); this model needs \(1,\)"),
    ("adapter", tensors(lambda t: t[PROMPT].view(-1).__setitem__(3, torch.nan)), f"{PROMPT} holds NaN or infinity"),
    ("adapter", settings(adapter_layers=1), f"2 tensors have no place in this model under {CONFIG}: .*layers.1"),
    ("adapter", settings(adapter_layers=9), "adapter_layers = 9; the model has 3 layers"),
    ("adapter", settings(adapter_len=None), "no adapter_len"),
    ("adapter", settings(target_modules="mlp"), "target_modules = 'mlp' is not supported; expected 'self_attn'"),
    ("adapter", settings(gate="head"), "gate = 'head' is not supported here"),
    ("adapter", cut, "is damaged or not a safetensors file"),
    ("prefix", tensors(lambda t: t.update({"prompt_embedding": t.pop("prompt_embeddings")})), "missing: prompt_embeddings"),
    ("prefix", tensors(lambda t: t.update(more=torch.ones(1))), "1 tensors have no place in this model .*: more"),
    ("prefix", tensors(lambda t: t.update(prompt_embeddings=torch.ones(5, 96))), r"\(5, 96\); this model needs \(5, 192\)"),
    ("prefix", tensors(lambda t: t["prompt_embeddings"].fill_(torch.inf)), "prompt_embeddings holds NaN or infinity"),
    ("prefix", settings(num_virtual_tokens=4), r"\(5, 192\); this model needs \(4, 192\)"),
    ("prefix", settings(num_layers=6), "num_layers = 6, but this base has 3: the prefix belongs to another one"),
    ("prefix", settings(num_attention_heads=4), "num_attention_heads = 4, but this base has 2"),
    ("prefix", settings(token_dim=64), "token_dim = 64, but this base has 32"),
    ("prefix", settings(num_transformer_submodules=2), "num_transformer_submodules = 2; expected 1"),
    ("prefix", settings(prompt_tuning_init="TEXT"), "prompt_tuning_init = 'TEXT' is not supported here"),
    ("prefix", cut, "is damaged or not a safetensors file"),
]


@pytest.mark.parametrize(("method", "edit", "message"), WRONG)
def test_a_wrong_adapter_is_refused_and_leaves_no_trace(
    method: str, edit: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save_adapter(ours("gqa", method), tmp_path / "adapter")
    load_adapter(tiny(), tmp_path / "adapter")
    edit(tmp_path / "adapter")
    model = tiny()
    before, logits = snapshot(model), model(IDS)
    with pytest.raises(InputError, match=message):
        load_adapter(model, tmp_path / "adapter")
    assert_same(snapshot(model), before)
    assert not hasattr(model, "adapters")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(IDS), logits)


@pytest.mark.parametrize(("method", "message"), [("prefix", "num_attention_heads = 2, but this base has 4"), ("adapter", "")])
def test_an_adapter_of_another_base(method: str, message: str, tmp_path: Path) -> None:
    """A prompt in hidden space fits any base of its width and depth; there, only the width can tell."""
    save_adapter(ours("gqa", method), tmp_path / "adapter")
    if method == "prefix":
        with pytest.raises(InputError, match=message):
            load_adapter(tiny("mha"), tmp_path / "adapter")
    else:
        with pytest.raises(InputError, match=r"adaption_prompt has shape \(1, 4, 64\); this model needs \(1, 4, 32\)"):
            load_adapter(tiny("gqa", hidden_size=32), tmp_path / "adapter")


@pytest.mark.parametrize(("shape", "method"), EVERY)
def test_peft_reads_our_files_to_the_last_digit(bases: dict[str, Path], tmp_path: Path, shape: str, method: str) -> None:
    """In float64, on both sides; the parameters are rounded to float32 first, which is what PEFT loads them into."""
    model = ours(shape, method, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.float())
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / FILE
    save_file({key: tensor.float() for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    load_adapter(model, tmp_path / "adapter", "read")
    theirs = peft.PeftModel.from_pretrained(hf_model(bases[shape]), tmp_path / "adapter").double().eval()
    with float64_oracle():
        assert largest(theirs(IDS).logits, model(IDS)) <= FLOAT64
