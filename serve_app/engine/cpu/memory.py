"""Large arrays in large pages.

A step reads some hundred megabytes, each page of them once: with pages of 4 KiB a good part of that
time goes into finding the pages.
"""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_HUGE = 2 << 20


def empty(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty`, in pages of 2 MiB if it is large and the system has them.

    Pages that have not been touched take no memory.
    """
    count = math.prod(size)
    if count * dtype.itemsize < _HUGE:
        return torch.empty(*size, dtype=dtype)
    # A page more, so that an aligned part can be taken.
    region = mmap.mmap(-1, count * dtype.itemsize + _HUGE, flags=mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(region, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + count * dtype.itemsize].view(dtype).view(*size)


def give_back() -> None:
    """Return to the system what the allocator keeps for later, where it is glibc's."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
