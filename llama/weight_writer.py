"""Safetensors files written tensor by tensor, in whatever order they come: no second copy of a model is ever held.

The format (huggingface.co/docs/safetensors): the header's length in 8 bytes, the header in JSON, the tensors' bytes. With
names, shapes and dtypes known beforehand the header is written first, and each tensor has its place. The library itself would
want all tensors of a file at once. It reads them back here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llama.errors import InputError, listing
from llama.export import check_finite

Shape = tuple[tuple[int, ...], torch.dtype]
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def shards_of(expected: Mapping[str, Shape], limit: int, stem: str = "model") -> dict[str, list[str]]:
    """Names by file, in order, at most `limit` bytes in each (a larger single tensor gets its own file)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (shape, dtype) in expected.items():
        size = _bytes(shape, dtype)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


def write_safetensors(
    directory: Path, files: Mapping[str, list[str]], expected: Mapping[str, Shape], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write `tensors`, each cast to its expected dtype, then read every file back and compare.

    Args:
        files: the names that each file holds; together those of `expected`.
        tensors: each name once, in any order. One at a time is held.

    Raises:
        InputError: a name that is missing, repeated or not expected, a wrong shape, or a tensor that is not finite.
        OSError: the files do not hold what was written.
    """
    digests: dict[str, bytes] = {}
    with ExitStack() as stack:
        places = {}
        for file, names in files.items():
            stream = stack.enter_context(open(directory / file, "wb"))
            header: dict[str, object] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name in sorted(names, key=lambda name: -expected[name][1].itemsize):  # so that every tensor is aligned
                shape, dtype = expected[name]
                end = offset + _bytes(shape, dtype)
                header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
                places[name] = (stream, offset)
                offset = end
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            stream.write(len(text).to_bytes(8, "little") + text)
            places.update({name: (stream, 8 + len(text) + places[name][1]) for name in names})
        for name, tensor in tensors:
            _check(name, tensor, expected, digests)
            written = tensor.detach().to("cpu", expected[name][1]).contiguous()
            check_finite(name, written)
            stream, place = places[name]
            stream.seek(place)
            stream.write(_view(written))
            digests[name] = _digest(written)
            del tensor, written
    if absent := [name for name in expected if name not in digests]:
        raise InputError(f"{len(absent)} tensors to be saved are missing: {listing(absent)}")
    for file, names in files.items():
        with safe_open(directory / file, framework="pt") as stored:
            for name in names:
                if _digest(stored.get_tensor(name)) != digests[name]:
                    raise OSError(f"{file}: {name} was not written as it is in memory")


def _check(name: str, tensor: Tensor, expected: Mapping[str, Shape], seen: Mapping[str, bytes]) -> None:
    if name not in expected or name in seen:
        raise InputError(f"{name} {'comes twice' if name in seen else 'is no tensor of this model'}; nothing is saved")
    if tuple(tensor.shape) != expected[name][0]:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; the model says {expected[name][0]}")


def total_bytes(expected: Mapping[str, Shape]) -> int:
    """Of all tensors."""
    return sum(_bytes(shape, dtype) for shape, dtype in expected.values())


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _view(tensor: Tensor) -> Any:
    """The tensor's bytes, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(_view(tensor.contiguous()), digest_size=16).digest()
