"""Matrix products: the encoder's by oneDNN, a decode step's by own kernels.

The encoder multiplies hundreds of rows at a time and is bound by arithmetic, at which oneDNN is as
good as the machine. Weights are laid out for it once, as `torch.compile` does on freezing; a layout
made for 32 rows serves 1 to 4,096 as well as one of their own (measured: docs/performance.md), so
that each weight is held once. A step multiplies few rows and is bound by reading the weights and by
the price of a call: native/linear.cpp.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from serve_app.engine.cpu.memory import empty

_ROWS = 32
_PART = 2_048
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # native/vectors.h


class Precision(Enum):
    """How weights are held and rows multiplied; residuals, norms and softmax are float32 always.

    `INT8`: weights rounded per output channel, rows per row (Dettmers et al. 2022, "LLM.int8()",
    without its outlier path: T5's activations do not need it), everything between in bfloat16.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"

    @property
    def between(self) -> torch.dtype:
        """What products give out, and what self-attention's caches hold."""
        return torch.float32 if self is Precision.FLOAT32 else torch.bfloat16

    @property
    def kept(self) -> torch.dtype:
        """What cross-attention's caches hold; bytes with a scale for each position of a head."""
        return torch.int8 if self is Precision.INT8 else self.between

    @property
    def taken(self) -> torch.dtype:
        """What products take in."""
        return torch.uint8 if self is Precision.INT8 else self.between


class Rows(NamedTuple):
    """(rows, width). What is meant is `values` times `scales` by row, where there are any.

    Unsigned bytes stand for themselves less 128, or for themselves if `positive`.
    """

    values: Tensor
    scales: Tensor | None = None
    positive: bool = False

    @property
    def zero(self) -> int:
        """What stands for 0 among bytes."""
        return 0 if self.positive else 128


class Linear(Protocol):
    """`x @ weight.T`. `nbytes` is what the weight takes."""

    nbytes: int

    def __call__(self, x: Rows) -> Rows: ...


def many_rows(weight: Tensor, precision: Precision) -> Linear:
    """The product with a weight, (out, in), for the encoder."""
    if precision is Precision.INT8:
        return _OneDnnInt8(weight)
    return _OneDnn(weight.to(precision.between))


def few_rows(weight: Tensor, precision: Precision, kernels: ctypes.PyDLL) -> Linear:
    """The product with a weight, (out, in), for a decode step."""
    return _Panels(weight, precision, precision.between, kernels)


def head(weight: Tensor, precision: Precision, kernels: ctypes.PyDLL) -> Linear:
    """The output head for a decode step. Gives float32 whatever the precision: around 10, where
    logits are, bfloat16 has steps of 1/16, and rounding would decide between near ties."""
    return _Panels(weight, precision, torch.float32, kernels)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes q and scales s, with s = max |w| / 127 over each output channel and q = w / s."""
    scales = weight.abs().amax(1).float().clamp_(min=1e-12) / 127
    whole = torch.empty(weight.shape, dtype=torch.int8)
    # Part by part: the whole in float32 several times over would be the most that loading takes.
    parts = zip(whole.split(_PART), weight.split(_PART), scales.split(_PART), strict=True)
    for to, part, scale in parts:
        to.copy_((part.float() / scale[:, None]).round_())
    return whole, scales


class _OneDnn:
    """Weights in the rows' own type."""

    def __init__(self, weight: Tensor) -> None:
        self.nbytes = weight.nbytes
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Rows) -> Rows:
        return Rows(self._product(x.values, self._packed, None, "none", [], ""))


class _OneDnnInt8:
    """Weights in bytes."""

    def __init__(self, weight: Tensor) -> None:
        whole, self._scales = quantized(weight)
        self.nbytes = whole.nbytes
        self._packed = torch.ops.onednn.qlinear_prepack(whole, [_ROWS, weight.shape[1]])
        self._zeros = torch.zeros(len(whole), dtype=torch.int32)
        self._product = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Rows) -> Rows:
        # The rows' scales come to the sums later, with the next thing done to them.
        values = self._product(
            x.values, 1.0, x.zero, self._packed, self._scales, self._zeros, None, 1.0, 0,
            torch.bfloat16, "none", [], "",
        )  # fmt: skip
        return Rows(values, x.scales)


class _Linear(ctypes.Structure):
    """`Linear` of native/linear.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "sums", "scales")),
        *((name, ctypes.c_int) for name in ("out", "in_", "kind")),
    )


class _Panels:
    """Weights in native/linear.cpp's panels."""

    def __init__(
        self, weight: Tensor, precision: Precision, gives: torch.dtype, kernels: ctypes.PyDLL
    ) -> None:
        self._product = kernels.t5_linear
        self._out, width = weight.shape
        self._gives = gives
        tile = kernels.t5_tile()
        padded = -(-self._out // tile) * tile
        scales = torch.zeros(padded)
        if precision is Precision.INT8:
            source, scales[: self._out] = quantized(weight)
        else:
            source = weight.to(precision.between)
        sums = torch.zeros(padded, dtype=torch.int32)
        packed = empty((padded, width), source.dtype)
        self._kept = packed, sums, scales
        self.nbytes = packed.nbytes
        self._linear = _Linear(
            *(kept.data_ptr() for kept in self._kept), self._out, width, FORMATS[precision.taken]
        )
        self._address = ctypes.addressof(self._linear)
        kernels.t5_pack(self._address, source.contiguous().data_ptr())

    def __call__(self, x: Rows) -> Rows:
        values = torch.empty(len(x.values), self._out, dtype=self._gives)
        self._product(
            self._address, x.values.data_ptr(), None if x.scales is None else x.scales.data_ptr(),
            x.zero, len(values), values.data_ptr(), FORMATS[self._gives], self._out,
        )  # fmt: skip
        return Rows(values)
