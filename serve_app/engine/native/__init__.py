"""The CPU engine's compiled part: everything of a step that is not a matrix product.

Plain C++ behind a C interface, called through ctypes: it knows nothing of Python or torch, builds
in seconds with g++ and works with any version of either. It shares torch's OpenMP team, because
both are linked to `libgomp.so.1` and torch's has been loaded before.

`python -m serve_app.engine.native` builds it, once per instruction set; `load()` takes the best one
the machine has. Without it the engine runs on torch alone (`serve_app.engine.gpu`), slower.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).parent
# Best first. The compiler's flags, beside those of build.py.
VARIANTS = {
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mprefer-vector-width=512"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "generic": [],
}

_INT, _POINTER, _LONG = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
_OUTPUT = [_POINTER, _POINTER, _INT]  # values, scales, format
_SIGNATURES = {
    "t5_embed": [_POINTER, _INT, _INT, _POINTER, _INT, _POINTER],
    "t5_add_norm": [
        _POINTER, _POINTER, _INT, _POINTER, _INT, _INT, _POINTER, ctypes.c_float, *_OUTPUT,
    ],
    "t5_activate": [_POINTER, _INT, _POINTER, _INT, _INT, _INT, _INT, *_OUTPUT],
    "t5_self_attention": [
        _POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _POINTER, *_OUTPUT,
    ],
    "t5_cross_attention": [
        _POINTER, _POINTER, _INT, _POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _POINTER,
        *_OUTPUT,
    ],
    "t5_store_cross": [
        _POINTER, _POINTER, _INT, _POINTER, _LONG, _INT, _POINTER, _POINTER,
    ],
    "t5_encoder_attention": [
        _POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, *_OUTPUT,
    ],
    "t5_tile": [],
    "t5_pack": [_POINTER, _POINTER],
    "t5_linear": [_POINTER, _POINTER, _POINTER, _INT, _INT, _POINTER, _INT, _LONG],
    "t5_begin": [_POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT],
    "t5_choose": [
        _POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _POINTER,
    ],
    "t5_propose": [_POINTER, _INT, _POINTER, _INT, _INT, _INT, _POINTER, _POINTER],
}  # fmt: skip
_RETURNS_COUNT = {"t5_tile", "t5_begin", "t5_propose"}


def sources() -> list[Path]:
    """The C++ files, headers included."""
    return sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])


def library(variant: str) -> Path:
    """Where the build for an instruction set lies. A digest of the sources is part of the name,
    so that one built from others is never loaded."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources()))
    digest.update(" ".join(VARIANTS[variant]).encode())
    return HERE / f"{variant}-{digest.hexdigest()[:12]}.so"


def supported() -> list[str]:
    """Variants that this machine can run, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    names = list(VARIANTS)
    if capability == "AVX512":
        return names if bfloat16() else names[1:]
    return names[2:] if capability == "AVX2" else names[3:]


def bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported())


@cache
def load() -> ctypes.PyDLL | None:
    """The best kernels for this machine, or None where none have been built."""
    for variant in supported():
        if library(variant).exists():
            return open_library(variant)
    return None


def open_library(variant: str) -> ctypes.PyDLL:
    """The kernels of one instruction set.

    The calls keep the interpreter lock: they take microseconds, and giving it away some hundred
    times a step would let another thread hold up each of them.
    """
    kernels = ctypes.PyDLL(str(library(variant)))
    for name, arguments in _SIGNATURES.items():
        function = getattr(kernels, name)
        function.argtypes = arguments
        function.restype = _INT if name in _RETURNS_COUNT else None
    return kernels
