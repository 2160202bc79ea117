"""Loads for simulation: arrivals with tokens, steps and rows, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from serve_app.tuning.arrivals import Load, blocks
from serve_app.tuning.simulate import Block
from serve_app.tuning.sizes import Mix, Sizes
from serve_app.tuning.trace import Trace, TraceError


def drawn(
    load: Load, tokens: Sizes, steps: Sizes, mix: Mix, most_tokens: int, seed: int
) -> Iterator[Block]:
    """A load of an arrival process: input tokens, output tokens and beams of each request."""
    # Streams of their own, so that arrivals do not change when sizes do.
    coming, sizing = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    for at in blocks(load, coming):
        count = len(at)
        read = np.minimum(tokens.sample(sizing, count), most_tokens)
        yield at, read, steps.sample(sizing, count), mix.sample(sizing, count)


def recorded(trace: Trace, speed: float, duration_s: float, most_tokens: int) -> Iterator[Block]:
    """A load as it came, so many times as fast. A text of several parts is as many requests.

    What a request without an answer would have cost is taken to be the median of the others.

    Raises:
        TraceError: no request got an answer.
    """
    known = (trace.input_tokens > 0) & (trace.output_tokens > 0)
    if not known.any():
        raise TraceError("no request of the trace got an answer, so none tells its tokens")
    read, made = trace.input_tokens.copy(), trace.output_tokens.copy()
    parts = np.where(known, trace.parts, 1)
    for values in (read, made):
        values[~known] = int(np.median(values[known] / parts[known]))

    def each(values: np.ndarray) -> np.ndarray:
        return np.repeat(np.maximum(values // parts, 1), parts)

    at = np.repeat(trace.at / speed, parts)
    here = int(np.searchsorted(at, duration_s, side="right"))
    beams = np.repeat(np.maximum(trace.beams, 1), parts)
    yield (
        at[:here],
        np.minimum(each(read), most_tokens)[:here],
        each(made)[:here],
        beams[:here],
    )
