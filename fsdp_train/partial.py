"""Partial fine-tuning: layers chosen by their gradients, and gradual unfreezing. (By name or kind: peft_impl/freeze.py.)

Gradual unfreezing is Howard & Ruder's (2018, arXiv 1801.06146, section 3.3): first what stands above the decoder layers
trains, then with it one layer more at a time, from the top down. Ranking layers by their gradient is Lee et al.'s (2022,
2210.11466, "Surgical fine-tuning", section 4): the layers that the data pulls at most are those to train; their Auto-RGN
divides by the norm of the layer's weights, which is `relative_gradient_norm` here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fsdp_train.data import Dataset
from fsdp_train.log import no_picture, write_whole
from fsdp_train.order import Plan
from fsdp_train.parallel import is_spread, local_part, plain_name, sum_over_model
from fsdp_train.settings import option
from fsdp_train.world import World
from llama.errors import InputError, nearest
from peft_impl.freeze import layer_of, layers_in

CRITERIA = ("gradient_norm", "relative_gradient_norm")


@dataclass(frozen=True)
class PartialConfig:
    """Which of the base's own parameters train."""

    train: tuple[str, ...] = option(
        (), "attention, mlp, norms, biases, embeddings, lm_head, last:N, first:N, names, globs (layers.*.q_proj), -NAME: not"
    )
    select: str = option(
        "", "also the K decoder layers at which the data pulls most: gradient_norm:K or relative_gradient_norm:K", "CRITERION:K"
    )
    probe_batches: int = option(8, "batches from which select ranks the layers")
    unfreeze_every: int = option(0, "gradual unfreezing: one decoder layer more, from the top, every N steps (0: all at once)")

    def __post_init__(self) -> None:
        for name, least in (("probe_batches", 1), ("unfreeze_every", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)}: expected at least {least}")
        if self.select:
            self.criterion()

    def criterion(self) -> tuple[str, int]:
        """The name and K of `select`.

        Raises:
            InputError: neither of the two, or no positive number.
        """
        name, _, number = self.select.partition(":")
        if name not in CRITERIA:
            raise InputError(
                f"select {self.select!r}: expected {' or '.join(f'{c}:K' for c in CRITERIA)}{nearest(name, CRITERIA)}"
            )
        if not re.fullmatch(r"[1-9]\d*", number):
            raise InputError(f"select {self.select!r}: expected {name}:K with K decoder layers, at least 1")
        return name, int(number)


@dataclass(frozen=True)
class RankedLayer:
    """One decoder layer; the root mean square over probe batches of its gradient's norm, and that over its weights' norm."""

    layer: int
    gradient_norm: float
    relative_gradient_norm: float
    trains: bool


def rank_layers(model: nn.Module, data: Dataset, plan: Plan, world: World, config: PartialConfig) -> list[RankedLayer]:
    """All decoder layers, in the model's order, with the K to train marked.

    Args:
        model: the base on its device, sharded or not, its decoder layers requiring gradients. It is not changed; unsharded,
            one tensor's gradient is held at a time.

    Raises:
        InputError: K is more than the model's layers, or a gradient is not finite.
    """
    criterion, count = config.criterion()
    owners: dict[Tensor, int | None] = {
        p: layer_of(plain_name(name)) for name, p in model.named_parameters() if p.requires_grad
    }
    layers = sorted({layer for layer in owners.values() if layer is not None})
    if count > len(layers):
        raise InputError(f"--finetune.partial.select {config.select}: the model has {len(layers)} decoder layers")
    squares = torch.zeros(2, len(layers), dtype=torch.float64, device=world.device)  # of gradients, of weights
    for parameter, layer in owners.items():
        if layer is not None:
            squares[1, layer] += local_part(parameter.detach()).double().pow(2).sum()

    def take(parameter: Tensor) -> None:
        layer = owners[parameter]
        if layer is not None and parameter.grad is not None:
            squares[0, layer] += local_part(parameter.grad).double().pow(2).sum()
        parameter.grad = None

    spread = is_spread(model)
    hooks = [] if spread else [p.register_post_accumulate_grad_hook(take) for p in owners]
    for step in range(config.probe_batches):
        batch = data.batch(plan.micro_batches(step)[0], world.device)
        targets = world.sum(batch.targets)[0]
        (model(**batch.inputs, labels=batch.labels) * (world.size / targets)).backward()
        for parameter in owners if spread else ():
            take(parameter)
    for hook in hooks:
        hook.remove()
    total = torch.tensor([sum_over_model(one, model, world) for one in squares.flatten()], dtype=torch.float64).view(2, -1)
    gradient = (total[0] / config.probe_batches).sqrt()
    if not gradient.isfinite().all():
        raise InputError(f"--finetune.partial.select {config.select}: the probe batches give gradients that are not finite")
    relative = gradient / total[1].sqrt()
    best = (gradient if criterion == "gradient_norm" else relative).argsort(descending=True, stable=True)[:count].tolist()
    return [RankedLayer(i, gradient[i].item(), relative[i].item(), i in best) for i in layers]


def show_ranking(ranking: Sequence[RankedLayer]) -> str:
    """A bar per layer, for people."""
    longest = max(row.gradient_norm for row in ranking) or 1.0
    return "\n".join(
        f"  layer {row.layer:>3}  gradient {row.gradient_norm:.3e}  relative {row.relative_gradient_norm:.3e}"
        f"  {'trains' if row.trains else '      '}  {'#' * round(30 * row.gradient_norm / longest)}"
        for row in ranking
    )


def save_ranking(ranking: Sequence[RankedLayer], directory: Path) -> None:
    """Write `layer_ranking.csv` and, with the `ui` extra, `layer_ranking.png`."""
    lines = [f"{r.layer},{r.gradient_norm!r},{r.relative_gradient_norm!r},{str(r.trains).lower()}" for r in ranking]
    write_whole(directory / "layer_ranking.csv", "\n".join(["layer,gradient_norm,relative_gradient_norm,trains", *lines, ""]))
    try:
        import matplotlib
    except ImportError:
        no_picture("layer_ranking.png")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained", sharey=True)
    for axis, name in zip(axes, CRITERIA, strict=True):
        colours = ["tab:blue" if row.trains else "lightgrey" for row in ranking]
        axis.barh([row.layer for row in ranking], [getattr(row, name) for row in ranking], color=colours)
        axis.set_xlabel(name.replace("_", " "))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("decoder layer (blue: trains)")
    figure.savefig(directory / "layer_ranking.png", dpi=120)
    pyplot.close(figure)


class Unfreezing:
    """Which of the trained parameters take part in a step: a pure function of the step, so that resuming needs nothing saved.

    Stage 0 is what stands above the decoder layers, each further stage the next layer below, the last one an embedding of its
    own. A weight that head and embedding share belongs to the head.
    """

    def __init__(self, model: nn.Module, every: int, tied: bool) -> None:
        """Args: the model, sharded or not, with everything that will ever train requiring gradients; steps per stage (0: all
        at once); whether head and embedding share a weight."""
        self._every = every
        trained = [(plain_name(name), p) for name, p in model.named_parameters() if p.requires_grad]

        def place(name: str) -> str | int:
            layer = layer_of(name)
            return layer if layer is not None else "embedding" if "embed_tokens" in name and not tied else "top"

        places = [place(name) for name, _ in trained]
        order = ["top", *reversed(layers_in([name for name, _ in trained])), "embedding"]
        present = [one for one in order if one in places]
        self._stages = [(present.index(one), p) for one, (_, p) in zip(places, trained, strict=True)]
        self.count = len(present)

    def before_step(self, step: int) -> None:
        """Let the parameters of this step's stages require gradients, and no others."""
        reached = step // self._every if self._every else math.inf
        for stage, parameter in self._stages:
            parameter.requires_grad_(stage <= reached)

    def finish(self) -> None:
        """Let all of them require gradients again: what is saved is everything that was to train."""
        for _, parameter in self._stages:
            parameter.requires_grad_(True)
