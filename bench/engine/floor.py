"""What a decode step could not take less than, here and now.

Its matrix products, one after the other over the weights of all layers, each in the faster of two
implementations (oneDNN's packed ones and our own); plus the bytes of the caches that it reads, over
the bandwidth at which this machine reads memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_BUFFER = 256 << 20  # bytes: larger than any cache


def best_of(run: Callable[[], object], seconds: float = 0.4) -> float:
    """Seconds of the fastest of several runs."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


class Floor:
    """Measures in a process of its own; one precision of one model."""

    def __init__(self, path: str, dtype: str, threads: int) -> None:
        import torch

        from serve_app.engine import native
        from serve_app.engine.checkpoint import resolve
        from serve_app.engine.cpu.linear import Precision, Rows, few_rows, head, many_rows
        from serve_app.engine.weights import read_shape

        torch.set_num_threads(threads)
        self._torch = torch
        config = resolve(path).config
        self.shape = shape = read_shape(config)
        self._precision = how = Precision(dtype)
        kernels = native.load()
        assert kernels is not None
        inner = shape.heads * shape.head_width
        feed = int(config["d_ff"])
        sizes = [
            (3 * inner, shape.width), (shape.width, inner), (inner, shape.width),
            (shape.width, inner), (feed * (2 if shape.gated else 1), shape.width),
            (shape.width, feed),
        ]  # fmt: skip
        self._sizes = sizes * shape.decoder_layers
        weights = [torch.randn(size) for size in self._sizes]
        self._products = [
            (few_rows(weight, how, kernels), many_rows(weight, how)) for weight in weights
        ]
        vocabulary = torch.randn(shape.vocabulary, shape.width)
        self._head = head(vocabulary, how, kernels), many_rows(vocabulary, how)
        self._rows_of = Rows

    def bandwidth(self) -> float:
        """Bytes per second that all threads together read."""
        buffer = self._torch.zeros(_BUFFER // 4)
        return _BUFFER / best_of(buffer.sum, 1.0)

    def products(self, rows: int) -> tuple[float, float]:
        """Seconds of a step's matrix products at so many rows, and their operations per second."""
        both = []
        for which in (0, 1):
            inputs = [self._input(rows, size[1]) for size in self._sizes]
            last = self._input(rows, self.shape.width)

            def run(which: int = which, inputs: Any = inputs, last: Any = last) -> None:
                for products, x in zip(self._products, inputs, strict=True):
                    products[which](x)
                self._head[which](last)

            with self._torch.inference_mode():
                both.append(best_of(run, 1.0))
        weights = sum(a * b for a, b in self._sizes) + self.shape.vocabulary * self.shape.width
        return min(both), 2 * rows * weights / min(both)

    def cache_bytes(self, documents: int, source: float, depth: float) -> float:
        """Bytes of keys and values that a greedy step reads."""
        inner = self.shape.heads * self.shape.head_width
        cross = source * self._precision.kept.itemsize
        own = depth * self._precision.between.itemsize
        return documents * self.shape.decoder_layers * 2 * inner * (cross + own)

    def _input(self, rows: int, width: int) -> Any:
        torch, taken = self._torch, self._precision.taken
        if taken is torch.uint8:
            values = torch.randint(0, 255, (rows, width), dtype=taken)
            return self._rows_of(values, torch.ones(rows))
        return self._rows_of(torch.randn(rows, width).to(taken))
