"""Matrix products with weights laid out for the machine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 32  # batch rows that the layout is chosen for; it serves any other number too


class Linear:
    """`x @ weight.T`.

    On a CPU the weight is reordered once into oneDNN's blocked layout, as `torch.compile` does when
    it freezes a model: with few rows most of a plain product is spent on reading the weight badly
    (measured: docs/performance.md). Elsewhere, and where that layout is not to be had, it is plain.

    Args:
        weight: (out, in).
    """

    def __init__(self, weight: Tensor) -> None:
        self._packed = _packed(weight)
        self._weight = weight if self._packed is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        if self._packed is None:
            assert self._weight is not None
            return functional.linear(x, self._weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product


def _packed(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where plain products serve."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    except (AttributeError, RuntimeError):  # the op is not part of torch's public interface
        return None
    return packed
