"""Matrix products with weights laid out once for oneDNN, as `torch.compile` does on freezing.

With few rows a plain product spends most of its time reading the weight badly. A layout made for 32
rows serves 1 to 4,096 as well as layouts of their own do (measured: docs/performance.md), so that
each weight is held once.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from serve_app.engine import native

_ROWS = 32
_PANEL = 48  # columns of the logits that native/encoder.cpp makes at once


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
        """What products give out, and what caches hold."""
        return torch.float32 if self is Precision.FLOAT32 else torch.bfloat16

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


class Linear(Protocol):
    """`x @ weight.T`."""

    def __call__(self, x: Rows) -> Rows: ...


class _Float:
    """Weights in the rows' own type."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Rows) -> Rows:
        return Rows(self._product(x.values, self._packed, None, "none", [], ""))


class _Int8:
    """Weights in bytes: q = w / s, with s = max |w| / 127 over each output channel."""

    def __init__(self, weight: Tensor, gives: torch.dtype) -> None:
        wide = weight.float()
        scales = wide.abs().amax(1).clamp_(min=1e-12) / 127
        whole = (wide / scales[:, None]).round_().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(whole, [_ROWS, weight.shape[1]])
        self._scales = scales
        self._zeros = torch.zeros(len(scales), dtype=torch.int32)
        self._gives = gives
        self._product = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Rows) -> Rows:
        # The rows' scales come to the sums later, with the next thing done to them.
        values = self._product(
            x.values, 1.0, 0 if x.positive else 128, self._packed, self._scales, self._zeros, None,
            1.0, 0, self._gives, "none", [], "",
        )  # fmt: skip
        return Rows(values, x.scales)


class _Bfloat16Head:
    """float32 logits of bfloat16 rows and weights, which oneDNN would round to bfloat16: with
    values around 10 a step is 1/16 there, and near ties would be decided by rounding."""

    def __init__(self, weight: Tensor) -> None:
        self._out, self._in = weight.shape
        self._kernels = native.load()
        self._packed = torch.empty(-(-self._out // _PANEL), _PANEL * self._in, dtype=weight.dtype)
        self._kernels.t5_pack_head(
            weight.contiguous().data_ptr(), self._out, self._in, self._packed.data_ptr()
        )
        self._logits = torch.empty(0, len(self._packed) * _PANEL)

    def __call__(self, x: Rows) -> Rows:
        rows = len(x.values)
        if len(self._logits) < rows:
            self._logits = torch.empty(rows, self._logits.shape[1])
        self._kernels.t5_head(
            x.values.data_ptr(), rows, self._packed.data_ptr(), self._out, self._in,
            self._logits.data_ptr(), self._logits.shape[1],
        )  # fmt: skip
        return Rows(self._logits[:rows])


def linear(weight: Tensor, precision: Precision) -> Linear:
    """The product with a weight, (out, in), of any floating type."""
    if precision is Precision.INT8:
        return _Int8(weight, torch.bfloat16)
    return _Float(weight.to(precision.between))


def head(weight: Tensor, precision: Precision) -> Linear:
    """The output head; gives float32 whatever the precision."""
    if precision is Precision.INT8:
        return _Int8(weight, torch.float32)
    if precision is Precision.BFLOAT16 and weight.shape[1] % 2 == 0:
        return _Bfloat16Head(weight.to(torch.bfloat16))
    return _Float(weight.float())
