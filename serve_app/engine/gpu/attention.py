"""Attention of a decode step as one CUDA kernel, compiled at run time.

In torch it is four or five kernels that read all caches up to the longest document's length; this
one reads as much of each as there is. NVRTC, which comes with torch, compiles `attention.cu` for
the card; where that cannot be, the engine goes on in torch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serve_app.engine.weights import Shape

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.cu")
THREADS = 128  # of a block, as in the source

# Given a kernel's name, blocks (heads, rows) and its arguments: tensors as addresses, ints.
Launch = Callable[[str, tuple[int, int], Sequence[Tensor | int]], None]


class StepAttention:
    """The kernels of `attention.cu`, on the current stream."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def cross(
        self, query: Tensor, keys: Tensor, values: Tensor, sources: Tensor, beams: int
    ) -> Tensor:
        """Attention to documents' sources.

        Args:
            query: (rows, heads * head width), contiguous.
            keys: (slots, heads, positions, head width), contiguous.
            values: the same.
            sources: (slots,), int64: how many positions there are; with any stride.
            beams: rows of a slot.

        Returns:
            As `query`; zeros where a slot has no source.
        """
        mixed = torch.empty_like(query)
        arguments = (query, keys, values, sources, mixed, sources.stride(0), beams, keys.shape[2])
        self._launch("cross", (keys.shape[1], len(query)), arguments)
        return mixed

    def generated(
        self,
        joined: Tensor,
        keys: Tensor,
        values: Tensor,
        steps: Tensor,
        ancestry: Tensor,
        distances: Tensor,
    ) -> Tensor:
        """Store keys and values of the rows' newest tokens, and attend to all so far.

        Args:
            joined: (rows, 3 * heads * head width), contiguous: queries, keys, values.
            keys: (slots, heads, positions, beams, head width), contiguous; changed in place.
            values: the same.
            steps: (slots,), int64: the newest token's position.
            ancestry: (slots, beams, positions), int64: the beam whose key is a hypothesis' own, of
                positions before the newest; slots as far apart as those of `steps`.
            distances: (heads, any), contiguous: bias by how far back a key lies.

        Returns:
            (rows, heads * head width).
        """
        mixed = joined.new_empty(len(joined), joined.shape[1] // 3)
        _, heads, positions, beams, _ = keys.shape
        stride, far = steps.stride(0), distances.shape[1]
        arguments = (
            joined, keys, values, steps, ancestry, distances, mixed, stride, beams, positions, far,
        )  # fmt: skip
        self._launch("generated", (heads, len(joined)), arguments)
        return mixed


def fits(shape: Shape, dtype: torch.dtype) -> bool:
    """Whether the kernels do such heads: of a power of two times 16 bytes, up to 512."""
    size = shape.head_width * dtype.itemsize
    parts, rest = divmod(size, 16)
    known = dtype in (torch.float32, torch.bfloat16)
    return known and not rest and 0 < parts <= 32 and parts & (parts - 1) == 0


def load(shape: Shape, dtype: torch.dtype) -> StepAttention | None:
    """The kernels for the current device, or None where it cannot have them, which is logged."""
    if not fits(shape, dtype):
        return None
    try:
        return StepAttention(_compiled(shape.head_width, dtype))
    except (OSError, RuntimeError, AttributeError):
        logger.warning("attention kernels cannot be had: it goes on, slower", exc_info=True)
        return None


def options(head_width: int, dtype: torch.dtype) -> list[str]:
    """What the source is compiled with."""
    half = ["-DHALF"] if dtype is torch.bfloat16 else []
    return [f"-DHEAD_WIDTH={head_width}", *half]


def _compiled(head_width: int, dtype: torch.dtype) -> Launch:
    major, minor = torch.cuda.get_device_capability()
    said = [f"--gpu-architecture=sm_{major}{minor}", *options(head_width, dtype)]
    binary = _compile(_nvrtc(), SOURCE.read_bytes(), [one.encode() for one in said])
    driver = ctypes.CDLL("libcuda.so.1")
    module = ctypes.c_void_p()
    _check("cuModuleLoadData", driver.cuModuleLoadData(ctypes.byref(module), binary))
    functions: dict[str, ctypes.c_void_p] = {}
    for name in ("cross", "generated"):
        found = functions[name] = ctypes.c_void_p()
        _check(name, driver.cuModuleGetFunction(ctypes.byref(found), module, name.encode()))

    def launch(name: str, blocks: tuple[int, int], arguments: Sequence[Tensor | int]) -> None:
        held = [
            ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else ctypes.c_int(one)
            for one in arguments
        ]
        pointers = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            name,
            driver.cuLaunchKernel(
                functions[name], *blocks, 1, THREADS, 1, 1, 0, stream, pointers, None
            ),
        )

    return launch


def _nvrtc() -> Any:
    """torch's own copy, or one that the system has."""
    name = f"libnvrtc.so.{str(torch.version.cuda).partition('.')[0]}"
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in Path(folder).glob(f"*/lib/{name}"):
            return ctypes.CDLL(str(path))
    return ctypes.CDLL(name)


def _compile(nvrtc: Any, source: bytes, said: list[bytes]) -> Any:
    program = ctypes.c_void_p()
    _check(
        "nvrtcCreateProgram",
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"attention.cu", 0, None, None),
    )
    try:
        result = nvrtc.nvrtcCompileProgram(program, len(said), (ctypes.c_char_p * len(said))(*said))
        if result:
            log = _take(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise RuntimeError(f"attention.cu: {log.value.decode(errors='replace')}")
        return _take(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _take(measure: Any, read: Any, program: ctypes.c_void_p) -> Any:
    size = ctypes.c_size_t()
    _check("nvrtc", measure(program, ctypes.byref(size)))
    told = ctypes.create_string_buffer(size.value)
    _check("nvrtc", read(program, told))
    return told


def _check(what: str, result: int) -> None:
    if result:
        raise RuntimeError(f"{what}: CUDA error {result}")
