"""`load` and `save`: model directories to models and back, one tensor at a time.

model = llama.load("path/to/Llama-2-7b-hf", dtype=torch.bfloat16)
llama.save(model, "copy")
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from llama.config_files import config_to_hf
from llama.errors import InputError, listing, nearest
from llama.export import check_plain
from llama.files import new_directory, write_json
from llama.model import Llama
from llama.weight_files import HEAD_FILE, Weights, open_weights
from llama.weight_writer import shards_of, total_bytes, write_safetensors

MAX_SHARD_BYTES = 5_000_000_000  # of one safetensors file, HF's customary size
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "generation_config.json",
)


def load(
    path: str | os.PathLike[str], dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu"
) -> Llama:  # fmt: skip
    """A model from a HF or Meta directory (detected), in `dtype` on `device`; None: each tensor in the dtype it is stored in.

    Each tensor is read, cast and put in place before the next, so memory peaks at the model plus one tensor.

    Raises:
        InputError: anything missing, unknown, wrongly shaped, damaged or unsupported, with file and key.
    """
    weights = open_weights(path)
    model = on_meta(weights)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(stored_dtype(weights, name) if dtype is None else dtype)
    filler(model, weights, device)(model)
    return model


def on_meta(weights: Weights) -> Llama:
    """The model of these files without values: its parameters are on the meta device, and `filler` gives them theirs.

    Raises:
        InputError: the files' names or shapes are not the model's.
    """
    with torch.device("meta"):
        model = Llama(weights.config)
    check_names(weights, model, weights.path)
    return model


def filler(model: Llama, weights: Weights, device: str | torch.device = "cpu") -> Callable[[nn.Module], None]:
    """A function that reads what is on the meta device within a module of `model`, each tensor in its dtype.

    Called on one part of the model after the other, it lets a model that is spread over processes be loaded without ever
    being whole. Modules are known by what they are called now, whatever wraps them later. A copy of a module (`X.copies.NAME`,
    see peft_impl) starts with the values of X, a head of its own with those of the embedding it shared.

    Raises:
        InputError: from the function: a damaged file or a dtype that is not a floating-point one.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding = model.model.embed_tokens

    def fill(part: nn.Module) -> None:
        _give_back()
        for module in part.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta:
                    continue
                name = re.sub(r"\.copies\.[^.]+", "", f"{names[module]}.{key}")
                if name == "lm_head.weight" and weights.config.ties_head:
                    name = "model.embed_tokens.weight"
                tensor = _floating(weights.read(name), name, weights.path).to(device, parameter.dtype, copy=True)
                setattr(module, key, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
                if model.config.ties_head and module in (model.head, embedding):
                    model.head.weight = embedding.weight = getattr(module, key)

    return fill


def _give_back() -> None:
    """Hand memory that is free back to the system: glibc keeps what tensors of up to 32 MB leave behind."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def _floating(tensor: Tensor, name: str, path: str | os.PathLike[str]) -> Tensor:
    _check_floating(tensor.dtype, name, path)
    return tensor


def stored_dtype(weights: Weights, name: str) -> torch.dtype:
    """The dtype of a tensor on disk.

    Raises:
        InputError: it is not a floating-point one.
    """
    dtype = weights.dtype(name)
    _check_floating(dtype, name, weights.path)
    return dtype


def _check_floating(dtype: torch.dtype, name: str, path: str | os.PathLike[str]) -> None:
    if not dtype.is_floating_point:
        raise InputError(f"{path}: {name} holds {dtype}; quantised weights are not supported")


def check_names(weights: Weights, model: Llama, path: str | os.PathLike[str]) -> None:
    """Compare the files' names and shapes with the model's.

    Raises:
        InputError: they differ; lists the names, and for shapes both sides.
    """
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = dict(weights.shapes)
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some files repeat the tied weight; the embedding is the one that counts
    if missing := [name for name in expected if name not in found]:
        hint = " (tie_word_embeddings is false)" if missing == ["lm_head.weight"] else ""
        raise InputError(f"{path}: {len(missing)} tensors are missing: {listing(missing)}{hint}")
    if unknown := [name for name in found if name not in expected]:
        raise InputError(
            f"{path}: {len(unknown)} tensors do not belong to this model: {listing(unknown)}{nearest(unknown[0], expected)}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise InputError(f"{path}: {name} has shape {found[name]}; the configuration says {shape}")


def save(
    model: Llama,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write a HF directory that `transformers` opens with no missing and no unexpected keys.

    The files are written under a temporary name, tensor by tensor, read back and compared, and only then given the name
    `path`. A head with extra layers, which `transformers` does not have, goes into `head.safetensors`; `transformers` opens
    the rest as a `LlamaModel`.

    Args:
        dtype: of the file; default that of each of the model's parameters.
        tensors: (name, full tensor) in any order, where the model's own parameters are sharded over processes, or on the
            meta device; the model then only says which there are. One at a time is held.
        tokenizer_from: a directory whose tokenizer files are copied along.
        replace: overwrite an existing directory.

    Raises:
        InputError: `path` exists or cannot be written, or the model holds tensors that are not a Llama's (an adapter that is
            not merged) or not finite.
    """
    config, parameters = model.config, dict(model.named_parameters())
    check_plain(config, parameters)
    expected = {name: (tuple(p.shape), dtype or p.dtype) for name, p in parameters.items()}
    of_head = [name for name in expected if config.head_hidden and not name.startswith("model.")]
    body = {name: shape for name, shape in expected.items() if name not in of_head}
    files = shards_of(body, max_shard_bytes)
    with new_directory(path, replace) as temporary:
        head = {HEAD_FILE: of_head} if of_head else {}
        write_safetensors(temporary, files | head, expected, parameters.items() if tensors is None else tensors)
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": total_bytes(body)}, "weight_map": weight_map}
            write_json(temporary / "model.safetensors.index.json", index)
        # What opens the directory in the dtype of its config.json must not round: the one that holds all tensors.
        widest = reduce(torch.promote_types, (stored for _, stored in expected.values()))
        write_json(temporary / "config.json", config_to_hf(config, widest))
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, temporary)


def copy_tokenizer(source: str | os.PathLike[str], target: Path) -> None:
    """Copy the tokenizer's files (those of `TOKENIZER_FILES` that exist) beside the weights."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)
