"""What the runs of a row must come to.

Without dropout: what the loop in float64 gives. With dropout nobody else can draw the program's masks, but the loss itself is
an oracle: at weights that do not move, each step's gradient is the loss's derivative, by central differences along one
direction, under the same masks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from tests.combinations.array import LAYERS
from tests.combinations.case import CLIP, DECAY, DTYPES, NO_RATE, RATE, STEPS, WAY, Case
from tests.combinations.oracle import Model, Recipe, Sample, Step, attach, hang_prefix, train, train_base

# --- how far apart a precision may be ---------------------------------------------------------------------------------

TRIALS = 5
ROUNDINGS = 6  # of results, for one of a weight
NUMBER, LENGTH = 4, 1.5  # standard deviations that are granted to a number, and to the length of a vector


@dataclass(frozen=True)
class Tolerance:
    """What rounding in a precision may do to a run; measured in float64, nothing of the program in it.

    The loop is run again, `TRIALS` times, with each weight moved by its largest rounding error, up or down, in each forward
    and backward pass: how far that takes losses, gradients and weights is what this problem makes of one rounding of each
    weight. A decoder layer has 9 weights and rounds 17 results, and backward the gradients of two factors for each: `ROUNDINGS`
    times as many, of independent sign, which do as much as the root of that.

    Whatever the precision, what is told is added up in fp32 (`summed`), and weights are kept in it: each step multiplies them
    by one number less weight decay and takes another away, which are two roundings.

    Attributes:
        losses, gradients, norms: of each step, absolute; of gradients the length of the error.
        update: of all weights at the end, the length of the error.
    """

    losses: list[float]
    gradients: list[float]
    norms: list[float]
    update: float


def rounded(weights: Sequence[Tensor], precision: str, generator: torch.Generator) -> Callable[[], AbstractContextManager]:
    """A context in which each weight is moved by its rounding, up or down."""

    @contextmanager
    def moved() -> Iterator[None]:
        kept = [x.detach().clone() for x in weights]
        with torch.no_grad():
            for x in weights:
                up_or_down = torch.randint(2, x.shape, generator=generator) * 2 - 1
                x.mul_(1 + up_or_down * torch.finfo(DTYPES[precision]).eps / 2)
        yield
        with torch.no_grad():
            for x, own in zip(weights, kept, strict=True):
                x.copy_(own)

    return moved


def tolerance_of(case: Case, recipe: Recipe, steps: Sequence[Step], after: dict[str, Tensor]) -> Tolerance:
    """Of a run that comes to `steps` and ends with the weights `after`."""
    generator = torch.Generator().manual_seed(8)
    losses, gradients, updates = [0.0] * len(steps), [0.0] * len(steps), 0.0
    for _ in range(TRIALS):
        model, trained = beginning(case, recipe.batches)
        weights = {id(x): x for x in [*model.tensors.values(), *model.body.parameters(), *trained.values()]}
        found = train(model, trained, recipe, rounded(list(weights.values()), case["precision"], generator))
        ends = kept(case, trained)
        for number, ((loss, gradient), (other_loss, other)) in enumerate(zip(found, steps, strict=True)):
            losses[number] += (loss - other_loss) ** 2 / TRIALS
            gradients[number] += length(a - b for a, b in zip(gradient, other, strict=True)) ** 2 / TRIALS
        updates += length(ends[name] - after[name] for name in after) ** 2 / TRIALS
    # Of few trials a step's own is uncertain, and it grows from step to step: no less than the mean so far.
    losses = [max(own, sum(losses[: number + 1]) / (number + 1)) for number, own in enumerate(losses)]
    half = torch.finfo(torch.float32).eps / 2
    lengths = [LENGTH * math.sqrt(ROUNDINGS * square) for square in gradients]
    classes = len(model.tensors.get("score.weight", model.body.embed_tokens.weight))
    own = [summed(classes + sum(len(ids) for ids, _ in samples)) for samples in recipe.batches]
    return Tolerance(
        [
            NUMBER * math.sqrt(ROUNDINGS * square) + loss * part
            for square, (loss, _), part in zip(losses, steps, own, strict=True)
        ],
        lengths,
        [error + length(gradient) * summed(count_of(gradient)) for error, (_, gradient) in zip(lengths, steps, strict=True)],
        LENGTH * math.sqrt(ROUNDINGS * updates) + 2 * len(steps) * half * length(after.values()),
    )


def summed(count: int) -> float:
    """What adding up that many numbers in fp32, one after another, may do: as many roundings, of independent sign."""
    return NUMBER * math.sqrt(count) * torch.finfo(torch.float32).eps / 2


def count_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def length(tensors: Iterable[Tensor]) -> float:
    """The norm of all of them together."""
    return math.sqrt(sum(x.double().pow(2).sum().item() for x in tensors))


# --- without dropout --------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """Each difference as a part of its tolerance; above 1 it is none of the precision's.

    Attributes:
        blind: whether weights that never moved would pass: with these data rounding decides where AdamW's steps go.
    """

    loss: float = 0.0
    gradient: float = 0.0
    update: float = 0.0
    error: str = ""
    blind: bool = False

    @property
    def equal(self) -> bool:
        return not self.error and max(self.loss, self.gradient, self.update) <= 1

    def __str__(self) -> str:
        if self.error:
            return self.error
        return f"loss {self.loss:.2f}, gradient {self.gradient:.2f}, update {self.update:.2f}"


def verdict_of(case: Case) -> Verdict:
    """How a row that was run compares with its oracle."""
    return derived(case) if case.drops else compared(case)


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that tell of a step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def batches_of(case: Case) -> list[list[Sample]]:
    """The samples of each step. Packed, a step has them all, in whatever order."""
    samples = case.data[1]
    if case.packs:
        return [samples] * case.steps
    found: list[list[Sample]] = []
    for epoch in range(case.steps):
        order = list(range(len(samples)))
        if case["shuffle"] == "yes":  # the program's promise: a function of seed and epoch (here seed 0)
            order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(epoch)).tolist()
        starts = range(0, len(order), case.global_batch)
        found += [[samples[i] for i in order[start : start + case.global_batch]] for start in starts]
    return found[: case.steps]


def trained_by(case: Case, batches: Sequence[Sequence[Sample]]) -> Callable[[str], bool]:
    """Which of the base's own tensors train."""
    if case["method"] == "partial by gradient":
        layers = strongest_layers(case, batches)
        return lambda name: any(name.startswith(f"model.layers.{layer}.") for layer in layers)
    patterns = {
        "full": "",
        "partial": r".*(self_attn|norm)",
        "partial, gradual": r"model\.layers\.",
        "head": r"lm_head|score",
    }
    pattern = patterns[case["method"].removesuffix(", classifier")]
    return lambda name: re.match(pattern, name) is not None


def strongest_layers(case: Case, batches: Sequence[Sequence[Sample]]) -> list[int]:
    """Two of three, by the mean square of their gradients over two probe batches."""
    layers = re.compile(r"model\.layers\.(\d)\.")
    model = Model(case.base, DTYPES[case["precision"]])
    tensors = train_base(model, [name for name in model.tensors if layers.match(name)])
    squares = [0.0] * LAYERS
    for batch in batches[:2]:
        probe = batch if case.packs else batch[: case.micro_batch]
        gradients = torch.autograd.grad(model.loss(probe), list(tensors.values()))
        for name, gradient in zip(tensors, gradients, strict=True):
            found = layers.match(name)
            assert found is not None
            squares[int(found[1])] += gradient.pow(2).sum().item()
    return sorted(range(LAYERS), key=lambda layer: -squares[layer])[:2]


def from_the_top(name: str, step: int) -> bool:
    """Gradual unfreezing: one decoder layer more in each step."""
    return int(name.split(".")[2]) >= LAYERS - 1 - step


def compared(case: Case) -> Verdict:
    """The row's run beside the loop in float64."""
    rows, batches = steps_of(case.out), batches_of(case)
    if len(rows) != case.steps:
        return Verdict(error=f"{len(rows)} steps were told of, not {case.steps}")
    model, trained = beginning(case, batches)
    before = {name: tensor.detach().clone() for name, tensor in kept(case, trained).items()}
    recipe = Recipe(
        batches,
        RATE,
        weight_decay=DECAY,
        grad_clip=0 if case["in_backward"] == "yes" else CLIP,
        trains=from_the_top if case["method"] == "partial, gradual" else lambda name, step: True,
        skipped=[step for step, row in enumerate(rows) if row.get("skipped")],
    )
    steps = train(model, trained, recipe)
    after, files = kept(case, trained), load_results(case.out)
    if case.adapter and files.keys() != after.keys():
        return Verdict(error=f"tensors of the file: {sorted(files.keys() ^ after.keys())}")
    tolerance, verdict = tolerance_of(case, recipe, steps, after), Verdict()
    for number, (row, (loss, gradient)) in enumerate(zip(rows, steps, strict=True)):
        verdict.loss = max(verdict.loss, abs(row["loss"] - loss) / tolerance.losses[number])
        if not row.get("skipped"):
            verdict.gradient = max(verdict.gradient, abs(row["grad_norm"] - length(gradient)) / tolerance.norms[number])
    # A tensor without any gradient (of queries and keys, where the only token before a target sees itself alone) has in fp32
    # what rounding leaves of 0, and AdamW makes whole steps of that.
    silent = {name for name in trained if not any(name in step and step[name].any() for step in named(steps, recipe, trained))}
    wild = [name for name in silent if (files[name] - before[name]).abs().max() > 2 * case.steps * RATE]
    if wild:
        return Verdict(error=f"without a gradient, and moved by more than AdamW's steps: {wild}")
    verdict.update = length(after[name] - files[name] for name in after if name not in silent) / tolerance.update
    moved = length(after[name] - before[name] for name in after)
    verdict.blind = tolerance.update > moved
    return verdict


def named(steps: Sequence[Step], recipe: Recipe, trained: Iterable[str]) -> list[dict[str, Tensor]]:
    """The gradients of each step by name."""
    names = [[name for name in trained if recipe.trains(name, number)] for number in range(len(steps))]
    return [dict(zip(some, gradient, strict=True)) for some, (_, gradient) in zip(names, steps, strict=True)]


def beginning(case: Case, batches: Sequence[Sequence[Sample]]) -> tuple[Model, dict[str, Tensor]]:
    """The model as training finds it, and what of it trains."""
    dtype = DTYPES[case["precision"]]
    if case.adapter:
        model = Model(case.base, dtype)
        trained = attach(model, case.adapter)
        return model, projected(model, case.start) if case["method"] == "prefix, projected" else trained
    trains = trained_by(case, batches)
    model = Model(case.start / "model", dtype, trains)
    return model, train_base(model, [name for name in model.tensors if trains(name)])


def load_results(out: Path) -> dict[str, Tensor]:
    files = [path for kind in ("adapter", "model") for path in (out / kind).glob("*.safetensors")]
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def kept(case: Case, trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the user keeps: of a projected prefix what its MLP gives."""
    if case["method"] != "prefix, projected":
        return trained
    return {"prompt_embeddings": mlp(trained)().detach()}


def projected(model: Model, start: Path) -> dict[str, Tensor]:
    """The MLP of a prefix, which no adapter's file holds, from the start's checkpoint: of each layer its part of the last
    weight."""
    stored = checkpoint_of(start, 1).items()
    found = {name.removeprefix("parameter/"): tensor for name, tensor in stored if name.startswith("parameter/")}
    width = len(next(tensor for name, tensor in found.items() if name.endswith("encoders.default.bias")))
    trained = {
        name: (tensor.view(-1, width) if name.endswith((".weight", ".embedding")) else tensor).requires_grad_()
        for name, tensor in found.items()
    }
    hang_prefix(model, mlp(trained))
    return trained


def mlp(trained: dict[str, Tensor]) -> Callable[[], Tensor]:
    """PEFT's: embedding, linear, tanh, linear."""

    def prefix() -> Tensor:
        (E, W, b) = (trained[f"model.encoders.default.{name}"] for name in ("embedding", "weight", "bias"))
        inner = (E @ W.T + b).tanh()
        layers = [f"model.layers.{i}.self_attn.prefixes.default" for i in range(LAYERS)]
        return torch.cat([inner @ trained[f"{name}.weight"].T + trained[f"{name}.bias"] for name in layers], dim=1)

    return prefix


# --- with dropout -----------------------------------------------------------------------------------------------------

DERIVATIVE = 2e-3  # central differences leave out a sixth of the third derivative times WAY^2, and divide the loss's rounding


def derived(case: Case) -> Verdict:
    """The gradients of a row with dropout beside the differences of its loss; in a low precision, its own beside those."""
    exact = case.out if case["precision"] == "fp32" else case.beside("exact")
    gradients = gradients_of(exact)
    plus, minus = (steps_of(case.beside(side)) for side in ("plus", "minus"))
    if not len(gradients) == len(plus) == len(minus) == len(steps_of(exact)) == STEPS:
        return Verdict(error=f"{len(plus)} and {len(minus)} steps were told of, not {STEPS}")
    verdict, constants = Verdict(), row_norms(case)
    for told, gradient, above, below in zip(steps_of(exact), gradients, plus, minus, strict=True):
        if gradient.keys() != case.direction.keys():
            return Verdict(error=f"tensors of the checkpoint: {sorted(gradient.keys() ^ case.direction.keys())}")
        along = sum((gradient[name] * way.flatten()).sum().item() for name, way in case.direction.items())
        along -= sum((gradient[name] * change).sum().item() for name, change in constants.items())
        size = sum(part.norm().item() for part in gradient.values())  # along its own direction, each tensor's part of length 1
        differences = (above["loss"] - below["loss"]) / (2 * WAY)
        verdict.update = max(verdict.update, abs(differences - along) / size / DERIVATIVE)
        norm = length(gradient.values())
        addition = summed(count_of(gradient.values()))
        verdict.gradient = max(verdict.gradient, abs(told["grad_norm"] / norm - 1) / addition)
        middle = (above["loss"] + below["loss"]) / 2  # less the second derivative times WAY^2 / 2
        verdict.loss = max(verdict.loss, abs(told["loss"] / middle - 1) / DERIVATIVE)
    if exact == case.out:
        return verdict
    recipe = Recipe(batches_of(case), NO_RATE)
    model, trained = beginning(case, recipe.batches)
    tolerance = tolerance_of(case, recipe, train(model, trained, recipe), trained)  # without dropout
    found = zip(steps_of(case.out), gradients_of(case.out), steps_of(exact), gradients, strict=True)
    for number, (told, low, wanted, gradient) in enumerate(found):
        verdict.loss = max(verdict.loss, abs(told["loss"] - wanted["loss"]) / tolerance.losses[number])
        if not told.get("skipped"):
            apart = length(low[name] - gradient[name] for name in gradient)
            verdict.gradient = max(verdict.gradient, apart / tolerance.gradients[number])
    return verdict


def row_norms(case: Case) -> dict[str, Tensor]:
    """What DoRA's gradient leaves out by design: it takes the rows' norms n for constants (Liu et al. 2024, section 4.3), a
    difference does not. y has m / n in it, so dL/dn = -(m / n) dL/dm. Returns (m / n) dn along the direction, by m's name."""
    ends = {}
    for side in ("minus", "plus"):
        model = Model(case.base, torch.float32)
        attach(model, case.beside(f"{side}-start"))
        ends[side] = {path: norms() for path, norms in model.row_norms.items()}
    middle = load_file(case.adapter / "adapter_model.safetensors") if case.adapter else {}
    found = {}
    for path, norms in ends["plus"].items():
        name, below = f"{path}.lora_magnitude_vector", ends["minus"][path]
        found[name] = middle[name].double() / ((norms + below) / 2) * (norms - below) / (2 * WAY)
    return found


def gradients_of(out: Path) -> list[dict[str, Tensor]]:
    """Of each step, by the names that PEFT has, from AdamW's first moment: m = 0.9 m + 0.1 g."""
    found: list[dict[str, Tensor]] = []
    before: dict[str, Tensor] = {}
    for step in range(1, STEPS + 1):
        moments = {
            peft_name(name.removeprefix("exp_avg/")): tensor
            for name, tensor in checkpoint_of(out, step).items()
            if name.startswith("exp_avg/")
        }
        found.append({name: (moment - 0.9 * before.get(name, 0 * moment)) / 0.1 for name, moment in moments.items()})
        before = moments
    return found


def checkpoint_of(out: Path, step: int) -> dict[str, Tensor]:
    """Its tensors, each laid out in a row; torch's reader puts together what the processes have written."""
    reader = HuggingFaceStorageReader(str(out / "checkpoints" / f"step_{step:08d}"))
    found = {name: torch.empty(meta.size) for name, meta in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return {name: tensor.double() for name, tensor in found.items()}


def peft_name(name: str) -> str:
    """A trained tensor's name in an adapter's file."""
    name = re.sub(r"\.lora\.default\.([AB])$", r".lora_\1.weight", name)
    name = name.replace(".lora.default.magnitude", ".lora_magnitude_vector").replace(".copies.default.", ".")
    return f"base_model.model.{name}"
