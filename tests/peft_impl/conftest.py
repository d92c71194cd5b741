"""The small base models as Hugging Face directories, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

import llama
from tests.oracle import SHAPES
from tests.peft_impl.common import tiny


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directory by shape; the weights are those of `tiny`."""
    root = tmp_path_factory.mktemp("bases")
    for shape in SHAPES:
        llama.save(tiny(shape), root / shape)
    return {shape: root / shape for shape in SHAPES}
