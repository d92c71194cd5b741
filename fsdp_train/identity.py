"""What a checkpoint and the run that goes on from it must have in common: what changes the numbers.

Each entry stands under the name of the setting that decides it, so that a refusal can say what to
change back. Some of them may be changed on purpose (`--checkpoint.accept_changes`), by group.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fsdp_train.data import Dataset
from fsdp_train.settings import as_text
from llama import LlamaConfig
from llama.errors import listing

MAY_CHANGE = ("data", "optim", "order", "batch", "precision")
_GROUPS = {  # by the beginning of an entry's name; what is in none of them must not change
    "data.content": "data",
    "optim.": "optim",
    "train.seed": "order",
    "data.shuffle": "order",
    "data.packing": "order",
    "batch": "batch",
    "frozen dtype": "precision",
    "parallel.": "precision",
}
_DATA_SETTINGS = ("path", "format", "max_length", "eval_path", "eval_fraction")


def identity_of(
    settings: Mapping[str, str],
    target: LlamaConfig,
    adapter: Any,
    trained: Sequence[str],
    frozen_checksum: str,
    data: Dataset,
    global_batch: int,
    precision: Mapping[str, str],
) -> dict[str, str]:
    """The entries of a run, all of them text.

    Args:
        settings: of the run, all of them, by dotted name, as one would type them.
        target: the configuration of the model that trains.
        adapter: the adapter's configuration (of `--finetune.from_adapter`, where it came from
            there); None where the base's own parameters train.
        trained: names of the base's own parameters that train.
        frozen_checksum: of what does not train.
        data: what is trained on.
        global_batch: samples of an optimizer step.
        precision: dtypes that change the numbers, by name.
    """
    found = {f"model.{name}": str(value) for name, value in vars(target).items()}
    found["frozen weights"] = frozen_checksum
    method = settings["finetune.method"]
    found["finetune.method"] = method
    if adapter is not None:
        for field in dataclasses.fields(adapter):
            found[f"finetune.{method}.{field.name}"] = as_text(getattr(adapter, field.name))
    else:
        found["finetune.partial.train"] = ",".join(trained)
        for name in ("finetune.partial.select", "finetune.partial.unfreeze_every"):
            found[name] = settings[name]
    found["data.content"] = data_fingerprint(data)
    order = ("train.seed", "data.shuffle", "data.packing")
    optim = [name for name in settings if name.startswith("optim.")]
    found |= {name: settings[name] for name in (*order, *optim)}
    found["batch"] = str(global_batch)
    return {**found, **precision}


def data_fingerprint(data: Dataset) -> str:
    """A hash of all ids and labels in order."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in data.samples:
        digest.update(sample.ids.tobytes())
        digest.update(sample.labels.tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Change:
    """One entry that differs: its group (empty: it must not), and a sentence for people."""

    group: str
    text: str


def changes(
    saved: Mapping[str, str],
    now: Mapping[str, str],
    saved_settings: Mapping[str, str],
    settings: Mapping[str, str],
) -> list[Change]:
    """The entries that differ between a checkpoint and this run.

    Args:
        saved, now: what `identity_of` gave the run that wrote the checkpoint, and this one.
        saved_settings, settings: all settings of both runs, by dotted name.
    """
    different = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    # In another dtype all frozen elements differ, and none of them says more than the dtype.
    if "frozen dtype" in different and "frozen weights" in different:
        different.remove("frozen weights")
    return [Change(_group_of(name), _sentence(name, saved, now, saved_settings, settings)) for name in different]


def _group_of(name: str) -> str:
    for beginning, group in _GROUPS.items():
        if name.startswith(beginning):
            return group
    return ""


def _sentence(
    name: str,
    saved: Mapping[str, str],
    now: Mapping[str, str],
    saved_settings: Mapping[str, str],
    settings: Mapping[str, str],
) -> str:
    before, after = saved.get(name, "not set"), now.get(name, "not set")
    if name == "frozen weights":
        return f"the frozen weights are others (--model.path was {saved_settings['model.path']}, is {settings['model.path']})"
    if name == "data.content":
        settings_of_data = [f"data.{one}" for one in _DATA_SETTINGS]
        given = [
            f"--{one} was {saved_settings.get(one)}, is {settings[one]}"
            for one in settings_of_data
            if saved_settings.get(one) != settings[one]
        ]
        return "the training data is another: " + (", ".join(given) or "the files' content")
    if name == "finetune.partial.train":
        was, is_now = before.split(","), after.split(",")
        return (
            f"what trains is another (--{name}): no longer"
            f" {listing([n for n in was if n not in is_now]) or 'nothing'}, now also"
            f" {listing([n for n in is_now if n not in was]) or 'nothing'}"
        )
    if name.startswith("model."):
        return f"the model's {name.removeprefix('model.')} was {before}, is {after}"
    if name == "batch":
        return f"batch was {before}, is {after} (samples of a step, over all processes)"
    if name == "frozen dtype":
        return f"frozen weights were kept in {before}, are in {after} (--model.dtype, or --parallel.precision)"
    return f"--{name} was {before}, is {after}"
