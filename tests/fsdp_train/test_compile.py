"""Compiled layers are the layers: each is one graph, for every method, with recomputation, packing, and several processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llama
from fsdp_train.build import wrap_model
from fsdp_train.data import Dataset, collate
from fsdp_train.main import main
from fsdp_train.optim import OptimConfig
from fsdp_train.packing import packed
from fsdp_train.parallel import full_trainable_state
from fsdp_train.recompute import checkpoint_activations, compile_layers
from fsdp_train.step import train_step
from fsdp_train.strategy import ParallelConfig, chosen_strategy
from fsdp_train.world import World, process_group
from llama.errors import InputError
from peft_impl import LlamaAdapterConfig, LoraConfig, PrefixTuningConfig, add_adapter, set_adapter
from tests.fsdp_train.common import build, samples
from tests.launch import spawn
from tests.oracle import largest

SAME = 1e-6  # fp32: fused code rounds elsewhere
CPU = torch.device("cpu")
IDS = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiling without generating code, which takes most of its time: the graphs are the same. Returns their sizes."""
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: plain(self, backend=backend, **options))
    torch._dynamo.reset()
    return sizes


def gradients(method: str, kind: str, compiled: bool, packing: bool) -> dict[str, Tensor]:
    model = build(method)
    if kind != "none":
        checkpoint_activations(model, kind, compiled)
    if compiled:
        compile_layers(model)
    data = Dataset(Path("made"), "tokens", {}, samples(5))
    batch = packed(data, 64).batch([0, 1], CPU) if packing else collate(data.samples, CPU)
    loss = model(**batch.inputs, labels=batch.labels) / batch.targets
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("method", "kind"),
    [*((m, "none") for m in ("full", "lora", "dora", "prefix", "projected", "llama_adapter", "heads")), ("lora", "full"),
     ("prefix", "full"), ("lora", "selective"), ("full", "selective")],
)  # fmt: skip
def test_a_compiled_layer_is_one_graph_and_the_same(method: str, kind: str, packing: bool, traced: list[int]) -> None:
    found, expected = gradients(method, kind, True, packing), gradients(method, kind, False, packing)
    assert found.keys() == {name.replace("_checkpoint_wrapped_module.", "") for name in expected} or kind != "none"
    for (_, a), (_, b) in zip(sorted(found.items()), sorted(expected.items()), strict=True):
        assert largest(a, b) < SAME
    different = 2 if method == "llama_adapter" else 1  # layers: the lowest one has no prompt
    assert 1 <= len(traced) <= different + (method != "full")  # and its input needs no gradient


def test_generated_code_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own code, forward and backward, and generation that sees its cache in whole grains."""
    torch._dynamo.reset()
    found, expected = gradients("lora", "none", True, False), gradients("lora", "none", False, False)
    assert max(largest(found[name], expected[name]) for name in expected) < SAME
    plain, compiled = build("full").eval(), build("full").eval()
    compile_layers(compiled)
    prompts = [[3, 4, 5], [7, 8, 9, 10, 11]]
    monkeypatch.setattr(sys.modules["llama.generate"], "GRAIN", 8)
    assert llama.generate(compiled, prompts, 6) == llama.generate(plain, prompts, 6)


def test_a_layer_with_lora_stores_no_norms_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's input, queries, keys, values, what attention gives and adds, the two products of the feed-forward."""
    plain = nn.Module.compile
    partitioned = {"backend": "aot_eager_decomp_partition"}  # divides forward from backward as the default does
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: plain(self, **partitioned, **options))
    torch._dynamo.reset()
    model = build("lora").bfloat16()
    compile_layers(model)
    seen: dict[int, int] = {}  # elements by storage
    known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}

    def store(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known and tensor.dtype == torch.bfloat16:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 2
        return tensor

    config = model.config
    hidden = torch.randn(*IDS.shape, config.hidden_size).bfloat16().requires_grad_()
    tables = tuple(torch.randn(IDS.shape[1], config.head_dim // 2).bfloat16() for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        model.model.layers[1](hidden, tables, None, None)
    D, F, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    widths = [elements // IDS.numel() for elements in seen.values()]
    assert sorted(width for width in widths if width > 4) == sorted((D, D, kv, kv, D, D, F, F))  # r = 4


def test_a_cache_in_grains_is_the_cache() -> None:
    model = build("full").double().eval()
    prompt, rest = IDS[:, :5], IDS[:, 5:9]
    expected = model(IDS[:, :9])[:, 5:]
    for grain in (1, 4, 16):
        cache = llama.model.KVCache(3, 12, grain)
        model(prompt, cache=cache)
        found = [model(rest[:, i : i + 1], cache=cache) for i in range(4)]
        assert largest(torch.cat(found, 1), expected) < 1e-12
        assert cache.shown % grain == 0


@pytest.mark.parametrize("kind", ["none", "full", "selective"])
def test_adapters_chosen_per_row_are_compiled_and_checkpointed(kind: str, traced: list[int]) -> None:
    """Two of LoRA, one with a norm of its own, prompts and prefixes, in one batch; then other rows."""
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        model = build("lora")
        add_adapter(model, LoraConfig(r=4, modules_to_save=("input_layernorm",)), "normed")
        add_adapter(model, LlamaAdapterConfig(adapter_len=3, adapter_layers=2), "prompt")
        add_adapter(model, PrefixTuningConfig(num_virtual_tokens=3), "prefix")
        if compiled and kind != "none":
            checkpoint_activations(model, kind, True)
        if compiled:
            compile_layers(model)
        for rows in (["default", "normed", None, "prompt"], ["prefix", "normed", "prompt", None]):
            set_adapter(model, rows)
            ids = IDS.repeat(2, 1)
            loss = model(ids, labels=ids)
            loss.backward()
            slope = sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None)
            losses.setdefault(compiled, []).extend((loss.item(), slope))
    assert losses[True] == pytest.approx(losses[False], rel=SAME)
    assert traced


# --- several processes --------------------------------------------------------------------------------------------------


def after_steps(world: World, method: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    config = ParallelConfig(precision="fp32", **settings)
    model, _ = wrap_model(build(method), config, OptimConfig(), world)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for step in range(2):
        train_step(model, optimizer, [collate(samples(4)[world.rank :: world.size], world.device)], world, 0.0, step)
    return full_trainable_state(model, world)


def compiled_on_two(rank: int) -> dict[str, dict[str, Tensor]]:
    compile_ = nn.Module.compile
    nn.Module.compile = lambda self, **options: compile_(self, backend="aot_eager", **options)  # type: ignore[method-assign]
    with process_group(ParallelConfig(strategy="fsdp2")) as world:
        return {
            f"{method} {strategy}": after_steps(world, method, {"strategy": strategy, "compile": True})
            for method in ("lora", "projected", "full")
            for strategy in ("ddp", "fsdp2")
        }


def test_two_compiled_processes_are_one_plain_one(tmp_path: Path) -> None:
    found = spawn(2, compiled_on_two, tmp_path=tmp_path)[0]
    for name, tensors in found.items():
        expected = after_steps(World(0, 1, 0, 1, CPU), name.split()[0], {})
        assert max(largest(tensors[key], expected[key]) for key in expected) < SAME, name


def test_what_cannot_be_compiled_is_refused() -> None:
    for strategy in ("fsdp", "hsdp"):
        with pytest.raises(InputError, match=r"--parallel.compile true goes with .* fsdp2.*use_orig_params"):
            ParallelConfig(strategy=strategy, compile=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="leave out one of it and offload"):
        ParallelConfig(activation_checkpointing="offload", compile=True)
    assert chosen_strategy(ParallelConfig(compile=True), 2) == "fsdp2"


def test_offload_needs_a_gpu(model_dir: Path, alpaca_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(
                [
                    "--model.path",
                    str(model_dir),
                    "--data.path",
                    str(alpaca_file),
                    "--parallel.activation_checkpointing",
                    "offload",
                ]
            )
        assert "moves activations from a GPU to the host" in capsys.readouterr().err


def test_offloaded_inputs_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the way to the host and back is a copy: as many as layers, of their inputs' size."""
    moved: list[torch.Size] = []
    expected = gradients("full", "none", False, False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd.graph.save_on_cpu, "__init__", _recording(moved))
        found = gradients("full", "offload", False, False)
    assert max(largest(found[name], expected[plain]) for name, plain in _paired(found, expected)) < SAME
    width = build("full").config.hidden_size
    assert sum(shape[-1] == width for shape in moved) == 3


def _paired(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[tuple[str, str]]:
    return list(zip(sorted(found), sorted(expected), strict=True))


def _recording(moved: list[torch.Size]) -> Any:
    original = torch.autograd.graph.save_on_cpu.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        pack = self.pack_hook

        def note(tensor: Tensor) -> Any:
            moved.append(tensor.shape)
            return pack(tensor)

        self.pack_hook = note

    return init
