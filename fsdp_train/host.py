"""What keeps the host out of the step's way: its garbage collector, and its allocator."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's mallopt(3)
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**25, _MMAP_MAX: 0}
_RETURNING = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _MMAP_MAX: 2**16}  # what glibc itself adapts to


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, garbage is collected only where the caller says `gc.collect()`, which then looks at new objects alone; and on a
    CPU memory that a step frees stays with the process for the next one, instead of being returned and faulted in again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    if device.type == "cpu":
        _allocator(_KEEPING)
    try:
        yield
    finally:
        if device.type == "cpu":
            _allocator(_RETURNING)
        gc.enable()
        gc.unfreeze()


def _allocator(options: dict[int, int]) -> None:
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library than glibc has no such options
            library = ctypes.CDLL(None)
            for option, value in options.items():
                library.mallopt(option, value)
