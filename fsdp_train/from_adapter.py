"""Continuing from a saved adapter: its method and settings beside those that were given.

    --finetune.from_adapter out/adapter

A given setting must be the adapter's, or the run ends before anything is loaded. Two settings are
no part of what an adapter computes: `lora_dropout`, of which a given value holds in training, and
`init_std`, of a start that is not drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from fsdp_train.settings import as_text, build, changed, values_of
from llama import PRESETS, Llama
from llama.errors import InputError
from peft_impl import LlamaAdapterConfig, LoraConfig, PrefixTuningConfig, read_adapter_config
from peft_impl.targets import linear_targets

T = TypeVar("T")

ADAPTER_CONFIGS = {
    "lora": LoraConfig,
    "llama_adapter": LlamaAdapterConfig,
    "prefix": PrefixTuningConfig,
}
DROPOUT = "finetune.lora.lora_dropout"
_NOT_COMPUTED = {DROPOUT, "finetune.prefix.init_std"}


def adapter_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The method and its settings, by dotted name, of a run that continues from an adapter.

    Args:
        given: the settings that were given, `finetune.from_adapter` among them.

    Raises:
        InputError: a given setting contradicts the adapter; or as `read_adapter_config`.
    """
    path = given["finetune.from_adapter"]
    if given.get("finetune.method", "lora") not in ADAPTER_CONFIGS:
        return {}  # a contradiction that the settings show without the adapter
    settings = stored_settings(path)
    classifier = given.get("finetune.head.kind") == "classification"
    for name in [name for name in settings if name in given]:
        if name in _NOT_COMPUTED:
            settings[name] = given[name]
        elif not _agree(name, given[name], settings[name], classifier):
            stored = f"{name.rpartition('.')[2]} {as_text(settings[name])}"
            raise InputError(
                f"--{name} {as_text(given[name])}, but the adapter {path} has {stored}; leave it out"
                " to continue from this adapter"
            )
    return settings


def stored_settings(path: str) -> dict[str, Any]:
    """The method and the settings of the adapter in a directory, by dotted name.

    Raises:
        InputError: as `read_adapter_config`.
    """
    config = read_adapter_config(path)
    method = next(name for name, kind in ADAPTER_CONFIGS.items() if isinstance(config, kind))
    return {"finetune.method": method, **values_of(config, f"finetune.{method}.")}


def training_notes(finetune: Any) -> list[str]:
    """A line where training differs from what the adapter's file says of it.

    Raises:
        InputError: as `read_adapter_config`.
    """
    if not finetune.settled or finetune.method != "lora":
        return []
    dropout, stored = finetune.lora.lora_dropout, stored_settings(finetune.from_adapter)[DROPOUT]
    if dropout == stored:
        return []
    return [f"--{DROPOUT} {dropout}: holds in this training; {finetune.from_adapter} has {stored}"]


def continued(finetune: T) -> T:
    """A `FinetuneConfig` with the settings of the adapter that it names, if it names one.

    One that was made in Python does not say which of its settings were given: the method counts as
    given, and what differs from its default.

    Raises:
        InputError: as `adapter_settings`.
    """
    values = values_of(finetune, "finetune.")
    if not values["finetune.from_adapter"] or getattr(finetune, "settled", False):
        return finetune
    given = {**changed(finetune, "finetune."), "finetune.method": values["finetune.method"]}
    return settled(build(type(finetune), {**values, **adapter_settings(given)}, "finetune."))


def settled(finetune: Any) -> Any:
    """The same `FinetuneConfig`, known to hold the settings of the adapter that it names."""
    return dataclasses.replace(finetune, settled=True)


def _agree(name: str, given: Any, stored: Any, classifier: bool) -> bool:
    """Whether two values of a setting mean the same: PEFT's files keep no order of names."""
    if name.endswith(".target_modules"):
        given, stored = _projections(given), _projections(stored)
    if not all(value is None or isinstance(value, tuple) for value in (given, stored)):
        return bool(given == stored)
    # A classifier's head is always saved beside its adapter, whoever names it.
    ours = {"score"} if classifier and name.endswith(".modules_to_save") else set()
    return set(given or ()) - ours == set(stored or ()) - ours


def _projections(targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
    """`all-linear` as the names of the projections, which is what an adapter's file has for it."""
    if targets != "all-linear":
        return targets
    with torch.device("meta"):
        model = Llama(PRESETS["demo"])
    return tuple({path.rpartition(".")[2] for path in linear_targets(model, targets, None)})
