"""A frozen backbone's features of each text, computed once and kept: a classifier's head then trains on them alone.

The backbone turns a text into one vector, the hidden state of its last token, and nothing that trains changes it. So each is
computed once, by all processes together, and kept in a file whose name is a hash of all it follows from: the backbone's weights
and shapes, the dtype of the computation, and the token ids of every text. Another model, text or length makes another name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fsdp_train.classification import ClassificationDataset
from fsdp_train.data import Batch
from fsdp_train.world import World
from llama.errors import InputError
from llama.heads import ClassificationHead
from llama.model import LlamaModel

VERSION = "1"  # of what a file means; another one makes all files unknown
TOKENS = 8192  # of one call of the backbone, padding included
_OF_THE_HEAD = ("id2label", "problem_type", "head_hidden", "tie_word_embeddings", "pad_token_id", "eos_token_id")


@dataclasses.dataclass
class FeatureDataset(ClassificationDataset):
    """Samples with `features` (N, C) in place of their texts."""

    features: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """The arguments of `HeadOnly`; an empty batch has a row without a target."""
        rows = self.features[list(indices)] if indices else torch.zeros_like(self.features[:1])
        return Batch({"hidden": rows[:, None].to(device)}, *self._labelled([self.samples[i] for i in indices], device))


class HeadOnly(nn.Module):
    """A classifier without its backbone: the same parameter names, features for texts."""

    def __init__(self, head: ClassificationHead) -> None:
        super().__init__()
        self.score = head

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `ClassificationHead`, on features (B, 1, C)."""
        scores: Tensor = self.score(hidden, labels)
        return scores


def cache_directory(setting: str) -> Path:
    """The directory that `--finetune.head.feature_cache` means."""
    if setting != "auto":
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-fsdp-finetuning" / "features"


def backbone_digest(backbone: LlamaModel) -> str:
    """A hash of the shapes, settings and bits of an unsharded backbone."""
    settings = {k: v for k, v in dataclasses.asdict(backbone.config).items() if k not in _OF_THE_HEAD}
    digest = hashlib.blake2b(f"{VERSION} {backbone.compute_dtype} {settings}".encode(), digest_size=16)
    for name, parameter in backbone.named_parameters():
        digest.update(f"{name} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_of(directory: Path, backbone: str, data: ClassificationDataset) -> Path:
    """Where the features of these texts are kept. Labels do not matter."""
    digest = hashlib.blake2b(backbone.encode(), digest_size=16)
    for sample in data.samples:
        digest.update(len(sample.ids).to_bytes(4, "little") + sample.ids.tobytes())
    return directory / f"{digest.hexdigest()}.safetensors"


def with_features(
    data: ClassificationDataset, path: Path, shape: tuple[int, torch.dtype], backbone: Callable[[], nn.Module], world: World,
    tell: Callable[[str], None],
) -> FeatureDataset:  # fmt: skip
    """`data` with the features in the file `path`, which is written if it is not there (or damaged). All must call it.

    Args:
        shape: width and dtype of a feature.
        backbone: gives the backbone, on its device, sharded or not; called only when something is to be computed.

    Raises:
        InputError: the file cannot be written.
    """
    size = (len(data.samples), shape[0])
    features = _stored(path, size, shape[1])
    if all(world.gather(features is not None)):
        tell(f"  features of {size[0]:,} texts: from {path}")
    else:
        with world.together():
            if world.local_rank == 0:
                _prepare(path, size[0] * size[1] * shape[1].itemsize)
        started = time.perf_counter()
        features = _computed(backbone(), data, size, shape[1], world, tell)
        with world.together():
            if world.local_rank == 0:  # one per host: the directory need not be shared between hosts
                _write(path, features)
        tell(f"  features of {size[0]:,} texts: computed in {time.perf_counter() - started:.1f} s, kept in {path}")
    assert features is not None
    known = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return FeatureDataset(**known, features=features)


@torch.no_grad()
def _computed(
    backbone: nn.Module, data: ClassificationDataset, size: tuple[int, int], dtype: torch.dtype, world: World,
    tell: Callable[[str], None],
) -> Tensor:  # fmt: skip
    """All features, on every process. Texts of like length share a call; the result does not depend on the processes."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(size[0]), key=lambda i: -len(data.samples[i].ids)):
        if batches[-1] and (len(batches[-1]) + 1) * len(data.samples[batches[-1][0]].ids) > TOKENS:
            batches.append([])
        batches[-1].append(index)
    features = torch.zeros(size, dtype=dtype, device=world.device)
    backbone.eval()
    told = time.perf_counter()
    for start in range(0, len(batches), world.size):
        mine = batches[start + world.rank] if start + world.rank < len(batches) else []
        inputs = data.batch(mine, world.device).inputs  # without samples it is one row: every process makes every call
        hidden = backbone(inputs["input_ids"], None, None, None)
        rows = torch.arange(len(mine), device=world.device)
        features[mine] = hidden[rows, inputs["last"][: len(mine)]].to(dtype)
        if time.perf_counter() - told > 10:
            told = time.perf_counter()
            tell(f"  features: {min(start + world.size, len(batches)):,} of {len(batches):,} batches")
    world.add(features)
    return features.cpu()


def _stored(path: Path, size: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """The features in the file, mapped into memory; None without a file that is what it should be."""
    try:
        with safe_open(path, framework="pt") as file:
            features: Tensor = file.get_tensor("features")
    except (OSError, SafetensorError):
        return None
    return features if features.shape == size and features.dtype == dtype and features.isfinite().all() else None


def _prepare(path: Path, needed: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise InputError(f"--finetune.head.feature_cache {path.parent}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK | os.X_OK) or free < needed:
        why = f"the features take {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free" if free < needed else "cannot be written"
        raise InputError(f"--finetune.head.feature_cache {path.parent}: {why}")


def _write(path: Path, features: Tensor) -> None:
    if not features.isfinite().all():
        raise InputError("the backbone's features are not finite: its weights are damaged, or too large for its dtype")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"features": features}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"--finetune.head.feature_cache: {path} cannot be written: {error}") from None
