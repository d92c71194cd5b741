"""PEFT adapter directories: `adapter_config.json` and `adapter_model.safetensors`, written checked and read strictly.

    save_adapter(model, "out/adapter")
    load_adapter(model, "out/adapter", "math")        # ours, or one that Hugging Face `peft` wrote

Loading success proves nothing in PEFT: it drops what it does not expect. Here every tensor must be expected, present, of
the right shape and finite, and every setting understood.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llama import Llama, LlamaConfig, relabel, replace_head
from llama.errors import InputError, listing, nearest
from llama.files import new_directory, read_json, write_json
from llama.weight_files import load_pickled
from peft_impl.adapters import METHODS, adapters_of, add_adapter, is_untrained, method_of, remove_adapter

CONFIG_FILE, WEIGHTS_FILE, LEGACY_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
LABELS_FILE = "labels.json"  # of a classifier's adapter: ours, beside PEFT's files, which PEFT does not read
CLASSIFIER = "SEQ_CLS"  # PEFT's task type


def save_adapter(
    model: Llama,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    state: Mapping[str, Tensor] | None = None,
    base: str | None = None,
    replace: bool = False,
) -> int:
    """Write adapter `name` as a PEFT directory; it is read back and compared before it gets the name `path`.

    Args:
        state: full tensors by parameter name, where the model's own are sharded over processes.
        base: recorded as `base_model_name_or_path`.
        replace: overwrite an existing directory.

    Returns:
        Bytes of the tensors written.

    Raises:
        InputError: no such adapter, a tensor that is not finite, or `path` exists.
    """
    adapters_of(model).check_name(name)
    config = adapters_of(model).configs[name]
    method = method_of(config)
    source = dict(model.named_parameters()) if state is None else state
    with torch.no_grad():
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in method.pack(model, name, source).items()}
    if wrong := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise InputError(f"adapter {name!r} is not finite and is not saved: {listing(wrong)}")
    if state is None and is_untrained(model, name):
        warnings.warn(f"adapter {name!r} was never trained: it is what add_adapter made it", stacklevel=2)
    with new_directory(path, replace) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        labels = dict(enumerate(model.config.id2label))
        common = {
            "task_type": CLASSIFIER if labels else "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
        }
        write_json(temporary / CONFIG_FILE, {**common, **method.to_peft(model, config)})
        if labels:  # PEFT has no place for their names
            named = {"id2label": {str(i): label for i, label in labels.items()}, "problem_type": model.config.problem_type}
            write_json(temporary / LABELS_FILE, named)
        _, written = read_adapter(temporary)
        if set(written) != set(tensors) or not all(torch.equal(written[key], tensors[key]) for key in tensors):
            raise OSError(f"{WEIGHTS_FILE} does not hold what was in memory")
    return sum(tensor.nbytes for tensor in tensors.values())


def read_adapter_config(path: str | os.PathLike[str]) -> Any:
    """The configuration of the adapter in a directory, of which no tensor is read.

    Raises:
        InputError: no such file, a damaged one, a method or a setting that is not implemented.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a directory; expected a PEFT adapter with {CONFIG_FILE} and {WEIGHTS_FILE}")
    found = read_json(path / CONFIG_FILE)
    where = str(path / CONFIG_FILE)
    kind = found.get("peft_type")
    if not isinstance(kind, str) or kind not in METHODS:
        raise InputError(f"{where}: peft_type is {kind!r}; expected {listing(METHODS)}")
    return METHODS[kind].from_peft(found, where)


def read_adapter(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the tensors (by PEFT's keys) of an adapter directory.

    Raises:
        InputError: missing or damaged files, a method or a setting that is not implemented.
    """
    path = Path(path)
    config = read_adapter_config(path)
    if (path / WEIGHTS_FILE).exists():
        try:
            return config, load_file(path / WEIGHTS_FILE)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path / WEIGHTS_FILE} is damaged or not a safetensors file: {error}") from None
    if (path / LEGACY_FILE).exists():
        return config, load_pickled(path / LEGACY_FILE)
    raise InputError(f"{path} has neither {WEIGHTS_FILE} nor {LEGACY_FILE}")


def load_adapter(
    model: Llama,
    path: str | os.PathLike[str],
    name: str = "default",
    trainable: bool = False,
    config: Any = None,
) -> None:
    """Add the adapter in `path` to the model, active; frozen unless `trainable`.

    Args:
        config: in the place of the one in the file, where the two differ in how it is to be trained (lora_dropout).

    Raises:
        InputError: anything missing, unexpected, wrongly shaped, not finite or not implemented, naming the keys. The model
            is then as it was.
    """
    stored, tensors = read_adapter(path)
    config = stored if config is None else config
    _check_labels(model.config, path)
    method_of(config).fits(model, read_json(Path(path) / CONFIG_FILE), str(Path(path) / CONFIG_FILE))
    active, required = adapters_of(model).active, {n: p.requires_grad for n, p in model.named_parameters()}
    try:
        add_adapter(model, config, name)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    parameters, method = dict(model.named_parameters()), method_of(config)
    try:
        with torch.no_grad():
            _compare(method.pack(model, name, parameters), tensors, Path(path))
    except InputError:
        remove_adapter(model, name)
        for own, parameter in model.named_parameters():
            parameter.requires_grad_(required[own])
        adapters_of(model).choose(active)
        raise
    if reason := method.inert(tensors):
        warnings.warn(f"{path}: the adapter has no effect: {reason}", stacklevel=2)
    with torch.no_grad():
        for own, tensor in method.unpack(model, name, tensors).items():
            if parameters[own].is_meta:  # of a base without values
                owner, _, key = own.rpartition(".")
                parameters[own] = nn.Parameter(torch.empty_like(parameters[own], device="cpu"))
                setattr(model.get_submodule(owner), key, parameters[own])
            parameters[own].copy_(tensor)
            parameters[own].requires_grad_(trainable)


def adapter_labels(path: str | os.PathLike[str]) -> tuple[tuple[str, ...], str | None] | None:
    """The names of a classifier's labels and its problem type; None for an adapter of a language model.

    What PEFT wrote has no names: they become LABEL_0, LABEL_1, ..., as in `transformers`.

    Raises:
        InputError: as `read_adapter`, or a damaged `labels.json`.
    """
    path = Path(path)
    if read_json(path / CONFIG_FILE).get("task_type") != CLASSIFIER:
        return None
    score = read_adapter(path)[1].get("base_model.model.score.weight")
    if score is None:
        raise InputError(f"{path / CONFIG_FILE}: task_type is {CLASSIFIER}, but there is no head (score) among the tensors")
    if not (path / LABELS_FILE).exists():
        return tuple(f"LABEL_{i}" for i in range(len(score))), None
    found = read_json(path / LABELS_FILE)
    named = found.get("id2label")
    if not isinstance(named, dict) or set(named) != {str(i) for i in range(len(score))}:
        raise InputError(f"{path / LABELS_FILE}: id2label = {named!r}; expected names for the ids 0 to {len(score) - 1}")
    names = tuple(named[str(i)] for i in range(len(score)))
    try:
        checked = LlamaConfig(id2label=names, problem_type=found.get("problem_type"))
    except InputError as error:
        raise InputError(f"{path / LABELS_FILE}: {error}") from None
    return names, checked.problem_type


def labels_on(
    base: LlamaConfig, path: str | os.PathLike[str]
) -> tuple[tuple[str, ...], str | None, str] | None:  # fmt: skip
    """The labels with which the adapter in `path` answers on `base`; None for an adapter of a language model.

    The adapter's own, if it names them. What PEFT wrote does not: its scores then have the names
    of a base that is a classifier.

    Returns:
        The names, the problem type (None: neither of them says), and a note for people where the
        base's names are used.

    Raises:
        InputError: as `adapter_labels`, or the base is a classifier with another number of labels.
    """
    found = adapter_labels(path)
    if found is None:
        return None
    names, problem = found
    if base.id2label and len(base.id2label) != len(names):
        raise InputError(
            f"{path} answers with {len(names)} labels ({listing(names, 10)}),"
            f" the base has {len(base.id2label)} ({listing(base.id2label, 10)})"
        )
    if base.id2label and problem is None:
        source = f"the base's ({listing(base.id2label, 10)}), as {path} has no {LABELS_FILE}"
        return base.id2label, base.problem_type, f"label names: {source}"
    return names, problem, ""


def match_head(model: Llama, path: str | os.PathLike[str]) -> str:
    """Give the base the head that the adapter in `path` goes with, a classifier's for a classifier's.

    A base that is a classifier keeps its head, and gets the names and the problem type of the
    adapter's labels.

    Returns:
        A note for people, or an empty string, as `labels_on`.

    Raises:
        InputError: as `labels_on`, or an adapter that is loaded already answers with other labels.
    """
    found = labels_on(model.config, path)
    if found is None:
        return ""
    names, problem, note = found
    if not model.config.id2label:
        replace_head(model, names, problem)
    elif (names, problem) != (model.config.id2label, model.config.problem_type):
        if loaded := list(getattr(model.head, "copies", {})):
            other = _other_labels(model.config, path, names, problem)
            raise InputError(f"{other}, which adapters loaded already answer with: {listing(loaded)}")
        relabel(model, names, problem)
    return note


def _check_labels(base: LlamaConfig, path: str | os.PathLike[str]) -> None:
    """Raise InputError where a classifier's adapter would answer with names that are not its own."""
    if not base.id2label:
        if read_json(Path(path) / CONFIG_FILE).get("task_type") == CLASSIFIER:
            raise InputError(f"{path} is a classifier's adapter; give the base a head for its labels first (match_head)")
        return
    found = labels_on(base, path)
    if found is not None and found[:2] != (base.id2label, base.problem_type):
        other = _other_labels(base, path, *found[:2])
        raise InputError(f"{other}; match_head gives the model the adapter's first")


def _other_labels(
    base: LlamaConfig, path: str | os.PathLike[str], names: tuple[str, ...], problem: str | None
) -> str:  # fmt: skip
    return (
        f"{path} answers with the labels {listing(names, 10)} ({problem}),"
        f" the model has {listing(base.id2label, 10)} ({base.problem_type})"
    )


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    if missing := [key for key in expected if key not in found]:
        raise InputError(f"{path}: {len(missing)} of {len(expected)} tensors are missing: {listing(missing)}")
    if unknown := [key for key in found if key not in expected]:
        raise InputError(f"{path}: {len(unknown)} tensors have no place in this model under"
                         f" {CONFIG_FILE}: {listing(unknown)}{nearest(unknown[0], expected)}")  # fmt: skip
    for key, parameter in expected.items():
        if found[key].shape != parameter.shape:
            raise InputError(f"{path}: {key} has shape {tuple(found[key].shape)}; this model needs {tuple(parameter.shape)}")
        if not found[key].is_floating_point():
            raise InputError(f"{path}: {key} holds {found[key].dtype}; expected floating-point numbers")
        if not torch.isfinite(found[key]).all():
            raise InputError(f"{path}: {key} holds NaN or infinity")
