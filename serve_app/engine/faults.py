"""Which errors of a device are no fault of the request that met them."""

from __future__ import annotations

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
