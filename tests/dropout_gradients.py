"""Is the gradient the derivative of the loss, where dropout draws masks, layers are compiled and computed again?

    python -m tests.dropout_gradients            # all cases, a line for each; not zero if one fails

For a fixed seed the loss is a smooth function of what trains. Its central differences in float64, taken from the very
graph that trains, must be what the gradient says: along the gradient, and along random directions.

The cases are every pair of values in `FACTORS`; the suite takes the first of them (tests/fsdp_train/test_dropout.py).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import combinations, product
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

import llama
from fsdp_train.parallel import local_part, place_model, sum_over_model
from fsdp_train.strategy import ParallelConfig, Precision
from fsdp_train.world import World, process_group
from peft_impl import LoraConfig, add_adapter
from peft_impl.lora import DoraLowRank
from tests.launch import spawn
from tests.oracle import randomise

FACTORS: dict[str, tuple[Any, ...]] = {
    "target": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear"),
    "heads": ("mha", "gqa", "mqa"),
    "length": (32, 64, 100, 128, 256, 512),
    "checkpointing": ("none", "full", "selective"),
    "compiled": (False, True),
    "method": ("lora", "dora"),
    "strategy": ("none", "ddp", "fsdp", "fsdp2"),  # none: one process, the others: two
    "embedding": ("frozen", "trained"),  # a layer whose input needs no gradient is another graph
}
Compiler = Callable[[], AbstractContextManager[Any]]
Case = tuple[Any, ...]  # a value of each factor, in their order
KEY_HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
DROPOUT = 0.2
STEP = 3e-5  # the share of the third derivative is below 1e-8 of the gradient, that of rounding below 1e-9
AGREE = 1e-6  # of the gradient's norm
RANDOM_DIRECTIONS = 2
CASES_AT_ONCE = 3  # in one group of processes
SECONDS = 1200  # for such a group: each compiles its own code
DOUBLE = Precision(torch.float64, torch.float64, torch.float64)


# --- the cases ----------------------------------------------------------------------------------------------------------


def covering(factors: dict[str, tuple[Any, ...]], can_run: Callable[[dict[str, Any]], bool], seed: int = 0) -> list[Case]:
    """Cases that hold every pair of values of two factors that can be had together, by `can_run`.

    Greedy: of some random completions of a pair that is missing, the one with the most that are missing.
    """
    random, names = Random(seed), list(factors)
    possible = [case for case in product(*factors.values()) if can_run(dict(zip(names, case, strict=True)))]
    missing = dict.fromkeys(sorted({pair for case in possible for pair in pairs(case)}, key=str))
    chosen: list[Case] = []
    while missing:
        first = random.choice(list(missing))
        candidates = [case for case in random.sample(possible, len(possible) // 4) if first in pairs(case)]
        if not candidates:
            continue
        best = max(candidates, key=lambda case: sum(pair in missing for pair in pairs(case)))
        chosen.append(best)
        for pair in pairs(best):
            missing.pop(pair, None)
    return chosen


def pairs(case: Case) -> list[tuple[tuple[int, Any], ...]]:
    """Any two values of a case, with the places where they stand."""
    return list(combinations(enumerate(case), 2))


def can_run(setting: dict[str, Any]) -> bool:
    """`FullyShardedDataParallel` is not compiled."""
    return not (setting["compiled"] and setting["strategy"] == "fsdp")


# --- one case -----------------------------------------------------------------------------------------------------------


def build(setting: dict[str, Any]) -> llama.Llama:
    """A small model in float64 with an adapter, everything random."""
    embedding = ("embed_tokens",) if setting["embedding"] == "trained" else ()
    config = llama.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2 if embedding else 1,  # one compiled graph in either case
        num_attention_heads=4,
        num_key_value_heads=KEY_HEADS[setting["heads"]],
        max_position_embeddings=512,
    )
    model = llama.Llama(config).double()
    randomise(model)
    target = setting["target"]
    add_adapter(
        model,
        LoraConfig(
            r=4,
            lora_dropout=DROPOUT,
            use_dora=setting["method"] == "dora",
            target_modules=target if target == "all-linear" else (target,),
            modules_to_save=embedding,
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).double()
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def keep_norms(model: nn.Module) -> None:
    """DoRA's norms are constants to its gradient (eq. 5), so they are constants of the loss here."""
    for leaf in model.modules():
        if isinstance(leaf, DoraLowRank):
            leaf.norms = leaf._row_norms(leaf._linear[0].weight)  # type: ignore[assignment]


def errors(setting: dict[str, Any], world: World) -> list[float]:
    """How far the slopes of the loss are from what the gradient says, relative to its norm."""
    torch._dynamo.reset()
    model = build(setting)
    keep_norms(model)
    config = ParallelConfig(
        strategy=setting["strategy"], activation_checkpointing=setting["checkpointing"], compile=setting["compiled"]
    )
    # A double precision that the settings do not have.
    with (
        mock.patch("fsdp_train.parallel.precision_of", return_value=DOUBLE),
        mock.patch.object(DoraLowRank, "_row_norms", lambda leaf, weight: leaf.norms),
    ):
        placed = place_model(model, config, world).train()
        return slopes(placed, setting["length"], world)


def slopes(model: nn.Module, length: int, world: World) -> list[float]:
    generator = torch.Generator().manual_seed(2 + world.rank)
    ids = torch.randint(97, (2, length), generator=generator)

    def loss() -> Tensor:
        torch.manual_seed(3 + world.rank)
        return model(ids, labels=ids) / ids[:, 1:].numel()

    parameters = trained(model)
    loss().backward()
    gradient = [local_part(p.grad).clone() for p in parameters]  # type: ignore[arg-type]
    norm = whole(dot(gradient, gradient), model, world) ** 0.5
    assert norm > 1e-3  # else nothing is measured
    own = 0 if is_replicated(model) else world.rank
    generator = torch.Generator().manual_seed(5 + own)
    found = []
    for index in range(1 + RANDOM_DIRECTIONS):
        direction = gradient
        if index:
            direction = [torch.randn(part.shape, generator=generator).double() for part in gradient]
        size = whole(dot(direction, direction), model, world) ** 0.5
        values = []
        for step in (STEP, -2 * STEP, STEP):
            with torch.no_grad():
                for parameter, part in zip(parameters, direction, strict=True):
                    local_part(parameter).add_(part, alpha=step / size)
            values.append(loss().item())
        slope = world.sum(values[0] - values[1])[0] / world.size / (2 * STEP)
        expected = whole(dot(gradient, direction), model, world) / size
        found.append(abs(slope - expected) / norm)
    return found


def dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def whole(mine: Tensor, model: nn.Module, world: World) -> float:
    """Of the whole model, from this process's part."""
    return sum_over_model(mine, model, world)


def is_replicated(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)


# --- running them -------------------------------------------------------------------------------------------------------


def settings_of(case: Case) -> dict[str, Any]:
    return dict(zip(FACTORS, case, strict=True))


def without_code() -> Any:
    """In the compiler's place: its passes and its division into forward and backward, run without generating code, which
    takes most of its time."""
    plain = nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=lambda part, _, **options: make_boxed_func(part.forward))

    return mock.patch.object(nn.Module, "compile", lambda self, **options: plain(self, backend=backend, **options))


def run_here(rank: int, cases: Sequence[Case], strategy: str, compiler: Compiler) -> list[list[float]]:
    with compiler(), process_group(ParallelConfig(strategy=strategy)) as world:  # type: ignore[arg-type]
        return [errors(settings_of(case), world) for case in cases]


def run(cases: Sequence[Case], tmp_path: Path, compiler: Compiler = nullcontext) -> list[list[float]]:
    """The errors of cases that run on the same number of processes, in a group of processes of their own.

    Args:
        compiler: a context with another compiler than the one that users get.
    """
    strategies = [settings_of(case)["strategy"] for case in cases]
    processes = 1 if "none" in strategies else 2
    return spawn(processes, run_here, cases, strategies[0], compiler, tmp_path=tmp_path, seconds=SECONDS)[0]


def groups(cases: Sequence[Case], size: int) -> list[list[Case]]:
    """The cases by number of processes, `size` at most together."""
    alone = [case for case in cases if settings_of(case)["strategy"] == "none"]
    together = [case for case in cases if case not in alone]
    return [some[i : i + size] for some in (alone, together) for i in range(0, len(some), size)]


CASES = covering(FACTORS, can_run)


def main() -> None:
    failed = 0
    for group in groups(CASES, CASES_AT_ONCE):
        with tempfile.TemporaryDirectory() as directory:
            results = run(group, Path(directory))
        for case, found in zip(group, results, strict=True):
            right = max(found) < AGREE
            failed += not right
            numbers = " ".join(f"{error:.1e}" for error in found)
            print("right" if right else "WRONG", *case, numbers, flush=True)
    print(f"{len(CASES)} cases, {failed} wrong")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
