"""The small models as directories, written by HF's own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.llama.common import tiny_hf
from tests.oracle import SHAPES, STORIES


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directory by shape, with the weights of `tiny_hf`; for reading only."""
    root = tmp_path_factory.mktemp("hf")
    for shape, config in SHAPES.items():
        tiny_hf(config).save_pretrained(root / shape)
    return {**{shape: root / shape for shape in SHAPES}, "stories": STORIES}
