"""Which errors of a device are no fault of the request that met them."""

from __future__ import annotations

import traceback

import torch

_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: Exception) -> bool:
    """Whether it may work with less at once. torch says so in several ways."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _MEMORY)


def poisoned(error: Exception) -> bool:
    """Whether the device is lost to this process: a CUDA context does not recover from errors."""
    if out_of_memory(error):
        return False
    lost = isinstance(error, torch.AcceleratorError)
    return lost or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def let_go(error: BaseException) -> None:
    """Free what the frames hold that an error has left, tensors on the device among it.

    As long as somebody has the error, they live: trying again with less would find no more memory
    than before.
    """
    seen: set[int] = set()
    left: BaseException | None = error
    while left is not None and id(left) not in seen:
        seen.add(id(left))
        traceback.clear_frames(left.__traceback__)
        left = left.__cause__ or left.__context__
