"""Weight files on disk, read one tensor at a time under Hugging Face's names.

`open_weights(directory)` detects the format and returns an object with `config`, `shapes` and `read(name)`:
safetensors (one file, or shards with an index), legacy `pytorch_model*.bin`, or Meta's `consolidated.NN.pth`.
"""

from __future__ import annotations

import os
import re
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.config import LlamaConfig
from llama.config_files import config_from_hf, config_from_meta
from llama.errors import InputError, listing
from llama.files import read_json, reading
from llama.meta import NAMES, meta_name, shard_dim, to_hf_rows

# Rotary tables that old checkpoints carry; they follow from the configuration.
_DERIVED = re.compile(
    r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
HEAD_FILE = "head.safetensors"  # of a head with extra layers, beside the weights that transformers reads


class Weights(ABC):
    """Named tensors on disk.

    Attributes:
        config: the architecture that the directory states.
        shapes: name -> shape of every tensor, in HF's names, rotary tables left out.
        path: the directory.
    """

    path: Path
    config: LlamaConfig
    shapes: dict[str, tuple[int, ...]]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype. It may share memory with the file: copy it before changing it."""

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor."""
        return self.read(name).dtype


@reading()
def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Open a HF or Meta model directory.

    Raises:
        InputError: no such directory, no weights in it, or files that are damaged or contradict each other.
    """
    weights = _detect(Path(path))
    weights.path = Path(path)
    _check_sizes(weights, path)
    return weights


def _detect(path: Path) -> Weights:
    if not path.is_dir():
        raise InputError(f"{path} is not a directory; expected a Hugging Face or Meta model directory")
    if (path / "config.json").exists():
        if (path / "model.safetensors.index.json").exists() or (path / "model.safetensors").exists():
            return SafetensorsWeights(path)
        if (path / "pytorch_model.bin.index.json").exists() or (path / "pytorch_model.bin").exists():
            return BinWeights(path)
        raise InputError(f"{path} has a config.json but no weights; expected model.safetensors, its shards with an index,"
                         " or pytorch_model.bin")  # fmt: skip
    if (path / "params.json").exists():
        return MetaWeights(path)
    names = listing(sorted(p.name for p in path.iterdir()), 8) or "nothing"
    raise InputError(f"{path} has neither config.json (Hugging Face) nor params.json (Meta); found {names}")


def _check_sizes(weights: Weights, path: str | os.PathLike[str]) -> None:
    """Compare the stated sizes with the files', so that no model is ever built that they cannot fill.

    A model of a mistyped size may take minutes to build, even without storage, or fail in torch.
    """
    config, shapes = weights.config, weights.shapes
    stated = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.layers.0.mlp.gate_proj.weight": (config.intermediate_size, config.hidden_size),
    }
    for name, shape in stated.items():
        if name not in shapes:
            raise InputError(f"{path}: {name} is missing; found {listing(sorted(shapes)) or 'no tensors'}")
        if shapes[name] != shape:
            raise InputError(f"{path}: {name} has shape {shapes[name]}; the configuration says {shape}")
    layers = len({found[0] for name in shapes if (found := re.match(r"model\.layers\.\d+\.", name))})
    if layers != config.num_hidden_layers:
        raise InputError(f"{path}: the weights have {layers} layers; the configuration says {config.num_hidden_layers}")


def _indexed_files(path: Path, single: str) -> dict[str, list[str]]:
    """File name -> tensor names that the index promises there; {single: []} where that file exists, as HF prefers it."""
    index = path / f"{single}.index.json"
    if (path / single).exists():
        return {single: []}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map; expected an object of tensor name -> file name")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{index}: {name} is mapped to {file!r}; expected a file name in the same directory")
        files.setdefault(file, []).append(name)
    for file in files:
        if not (path / file).is_file():
            raise InputError(f"{index} names {file}, which does not exist")
    return files


def _check_index(index: Path, file: str, promised: list[str], found: set[str]) -> None:
    if absent := [name for name in promised if name not in found]:
        raise InputError(f"{index} promises {listing(absent)} in {file}, which does not hold it")


class SafetensorsWeights(Weights):
    """`model.safetensors`, or shards with `model.safetensors.index.json`.

    A file is mapped into memory for as long as one of its tensors is in use: a mapping that stays would count as the process's
    memory up to the size of the whole file.
    """

    def __init__(self, path: Path) -> None:
        self.config = config_from_hf(read_json(path / "config.json"), path / "config.json")
        self.shapes, self._file_of, self._stamps = {}, {}, {}
        files = _indexed_files(path, "model.safetensors")
        for file, promised in (files | ({HEAD_FILE: []} if self.config.head_hidden else {})).items():
            (path / file).open("rb").close()  # safe_open would say of a file without read permission that it does not exist
            try:
                handle = safe_open(path / file, framework="pt")
                held = set(handle.keys())
                names = sorted(name for name in held if not _DERIVED.fullmatch(name))
                shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in names}
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path / file} is damaged or not a safetensors file: {error}") from None
            _check_index(path / "model.safetensors.index.json", file, promised, held)
            self.shapes.update(shapes)
            self._file_of.update(dict.fromkeys(names, path / file))
            self._stamps[path / file] = _stamp(path / file)

    def read(self, name: str) -> Tensor:
        file = self._file_of[name]
        if _stamp(file) != self._stamps[file]:
            raise InputError(f"{file} has changed since it was opened")
        with safe_open(file, framework="pt") as opened:
            return cast(Tensor, opened.get_tensor(name))


def _stamp(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


class BinWeights(Weights):
    """Legacy `pytorch_model.bin`, or shards with `pytorch_model.bin.index.json`; opened without unpickling code."""

    def __init__(self, path: Path) -> None:
        self.config = config_from_hf(read_json(path / "config.json"), path / "config.json")
        self._tensors: dict[str, Tensor] = {}
        for file, promised in _indexed_files(path, "pytorch_model.bin").items():
            tensors = load_pickled(path / file)
            _check_index(path / "pytorch_model.bin.index.json", file, promised, set(tensors))
            self._tensors.update({name: t for name, t in tensors.items() if not _DERIVED.fullmatch(name)})
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class MetaWeights(Weights):
    """`params.json` and `consolidated.NN.pth`: shards merged, query and key rows permuted to HF's rotary layout."""

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("consolidated.*.pth"))
        if not files:
            raise InputError(f"{path} has a params.json but no consolidated.*.pth")
        if [f.name for f in files] != [f"consolidated.{i:02d}.pth" for i in range(len(files))]:
            raise InputError(f"{path}: shards are {listing(f.name for f in files)}; expected consolidated.00.pth and onwards")
        self._shards = [load_pickled(file) for file in files]
        names = {name for name in self._shards[0] if not _DERIVED.fullmatch(name)}
        for file, shard in zip(files[1:], self._shards[1:], strict=True):
            if {name for name in shard if not _DERIVED.fullmatch(name)} != names:
                raise InputError(f"{file} and {files[0].name} hold different tensors: these shards do not belong together")
            for name in names:
                if shard[name].shape != self._shards[0][name].shape:
                    raise InputError(
                        f"{file}: {name} has shape {tuple(shard[name].shape)}, but {tuple(self._shards[0][name].shape)}"
                        f" in {files[0].name}: these shards do not belong together"
                    )
        if unknown := sorted(name for name in names if self._hf_name(name) is None):
            raise InputError(f"{files[0]}: {len(unknown)} tensors are not a Llama's by Meta's names: {listing(unknown)}")
        self._meta_of = {str(self._hf_name(name)): name for name in sorted(names)}
        self.shapes = {hf: self._merged_shape(meta) for hf, meta in self._meta_of.items()}
        for needed in ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"):
            if needed not in self.shapes:
                raise InputError(f"{files[0]}: missing {meta_name(needed)}")
        self.config = config_from_meta(
            read_json(path / "params.json"),
            self.shapes["model.embed_tokens.weight"][0],
            self.shapes["model.layers.0.mlp.gate_proj.weight"][0],
            path / "params.json",
        )

    @staticmethod
    def _hf_name(name: str) -> str | None:
        layer, rest = re.fullmatch(r"(layers\.\d+\.)?(.*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        hf = {meta: hf for hf, meta in NAMES.items()}.get(rest)
        return f"model.{layer}{hf}" if layer and hf else hf

    def _merged_shape(self, name: str) -> tuple[int, ...]:
        shape = list(self._shards[0][name].shape)
        dim = shard_dim(name)
        if dim is not None and len(shape) == 2:
            shape[dim] = sum(shard[name].shape[dim] for shard in self._shards)
        return tuple(shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._shards[0][self._meta_of[name]].dtype

    def read(self, name: str) -> Tensor:
        meta = self._meta_of[name]
        dim = shard_dim(meta)
        parts = [shard[meta] for shard in self._shards]
        merged = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            merged = to_hf_rows(merged, self.config.head_dim)
        return merged


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The flat dictionary of tensors in a `.bin` or `.pth` file.

    Raises:
        InputError: as `unpickled`, or the file holds anything but a dictionary of tensors.
    """
    loaded = unpickled(path)
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()):
        raise InputError(f"{path} holds something other than a flat dictionary of tensors")
    return loaded


def unpickled(path: Path) -> Any:
    """What a file of `torch.save` holds, memory-mapped where the format allows.

    Raises:
        InputError: missing, damaged, or holding more than tensors and plain containers. Nothing is executed (`weights_only`).
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can fail in any way: IndexError, KeyError, struct.error, BadZipFile, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is damaged or holds more than tensors: {reason}") from None
