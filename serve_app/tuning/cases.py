"""What settings are tried on: loads to choose by, and others, held out, to judge the choice by.

Of an arrival process, others are other seeds. Of a recorded trace of several windows (days), they
are other windows; of one alone, resamples of it by the local block bootstrap (Paparoditis and
Politis, "Local block bootstrap", 2002): each stretch of some minutes is replaced by one that came
close to that time, so the shape of the day stays and what happened when does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from serve_app.tuning.arrivals import Load
from serve_app.tuning.loads import drawn, recorded
from serve_app.tuning.model import ServiceModel
from serve_app.tuning.oracle import works
from serve_app.tuning.simulate import Block
from serve_app.tuning.sizes import Mix, Sizes
from serve_app.tuning.trace import Trace, TraceError

TRAINING, HELD_OUT = 2, 3
DAY_S = 86_400.0
_BLOCKS = 96  # of a bootstrapped window, so a quarter of an hour of a day
_NEAR = 2  # blocks
_FEWEST = 100  # requests of a trace that is resampled
_BEGIN_S = 300.0
_JITTER_S = 300.0


@dataclass(frozen=True)
class Case:
    """One load.

    Attributes:
        seed: of all other chance in its simulation.
        first: replicas that its first minutes keep busy: a service is not met in its sleep, so
            every simulation begins with so many, within the bounds of its settings.
    """

    name: str
    load: Block
    duration_s: float
    seed: int
    first: int

    @property
    def requests(self) -> int:
        """How many there are."""
        return len(self.load[0])


def process_cases(
    load: Load,
    sizes: tuple[Sizes, Sizes, Mix],
    model: ServiceModel,
    objective_s: float,
    seed: int,
) -> tuple[list[Case], list[Case]]:
    """Training and held-out loads of an arrival process.

    Raises:
        TraceError: no request came.
    """

    def made(own: int) -> Block:
        pieces = list(drawn(load, *sizes, model.max_input_tokens, own))
        if not pieces:
            raise TraceError(f"no request came in {load.duration_s:g} s: a higher --rate is needed")
        return _joined(pieces)

    return seeded_cases(made, load.duration_s, model, objective_s, seed)


def seeded_cases(
    made: Callable[[int], Block],
    duration_s: float,
    model: ServiceModel,
    objective_s: float,
    seed: int,
) -> tuple[list[Case], list[Case]]:
    """Training and held-out loads, each `made` with a seed of its own."""
    cases = [
        _case(f"seed {own}", made(own), duration_s, own, model, objective_s)
        for own in range(seed, seed + TRAINING + HELD_OUT)
    ]
    return cases[:TRAINING], cases[TRAINING:]


def trace_cases(
    trace: Trace,
    speed: float,
    duration_s: float,
    window_s: float,
    model: ServiceModel,
    objective_s: float,
    seed: int,
) -> tuple[list[Case], list[Case]]:
    """Training and held-out windows of a trace that is taken for `duration_s`.

    Of several windows the busiest and the one of median work are for training. A rest shorter than
    half a window is left out.

    Raises:
        TraceError: there is no load in it.
    """
    block = _joined(list(recorded(trace, speed, duration_s, model.max_input_tokens)))
    count = max(int(duration_s / window_s + 0.5), 1)
    window_s = min(window_s, duration_s)
    windows = [_cut(block, number * window_s, (number + 1) * window_s) for number in range(count)]
    windows = [one for one in windows if len(one[0])]
    if not windows:
        raise TraceError("no request of the trace lies in the time that was asked for")
    named = [(f"window {number + 1}", one) for number, one in enumerate(windows)]
    rng = np.random.default_rng([seed, 3])
    if len(named) == 1:
        whole = windows[0]
        held = [(f"resample {number + 1}", _resampled(whole, window_s, rng)) for number in range(3)]
        chosen, others = [("as recorded", whole), held[0]], held[1:]
        if len(whole[0]) < _FEWEST or not all(len(one[0]) for _, one in held):
            raise TraceError(
                f"too few requests, or too close together, to judge settings by: {len(whole[0]):,}"
                f", of at least {_FEWEST} that are wanted"
            )
    else:
        busy = [float(works(one, model, math.inf).sum()) for one in windows]
        order = np.argsort(busy, kind="stable")[::-1].tolist()
        median = order[len(order) // 2]
        picked = [order[0], median][: max(len(order) - 1, 1)]
        rest = [number for number in order if number not in picked]
        # The next busiest, and of the others any.
        kept = [rest[0], *rng.permutation(rest[1:])[: HELD_OUT - 1].tolist()]
        chosen = [named[number] for number in sorted(set(picked))]
        others = [named[number] for number in sorted(kept)]
    made = [
        _case(name, one, window_s, seed + number, model, objective_s)
        for number, (name, one) in enumerate([*chosen, *others])
    ]
    return made[: len(chosen)], made[len(chosen) :]


def multiplied(trace: Trace, times: int, seed: int) -> Trace:
    """Each text as so many, up to five minutes earlier or later: of a log that has one in so many
    requests, or of a service that grows."""
    if times == 1:
        return trace
    rng = np.random.default_rng([seed, 4])
    at = np.repeat(trace.at, times) + rng.uniform(-_JITTER_S, _JITTER_S, len(trace.at) * times)
    order = np.argsort(at, kind="stable")
    columns = {
        name: np.repeat(getattr(trace, name), times)[order]
        for name in ("characters", "input_tokens", "output_tokens", "parts", "beams")
    }
    return replace(trace, at=at[order] - at[order[0]], left_out=trace.left_out * times, **columns)


def _case(
    name: str, block: Block, duration_s: float, seed: int, model: ServiceModel, objective_s: float
) -> Case:
    begin_s = min(_BEGIN_S, duration_s)
    early = _cut(block, 0, begin_s)
    work = works(early, model, math.inf).sum() / begin_s
    return Case(name, block, duration_s, seed, max(math.ceil(work), 1))


def _cut(block: Block, begin: float, end: float) -> Block:
    first, last = np.searchsorted(block[0], [begin, end])
    at, tokens, out, beams = block
    here = slice(first, last)
    return at[here] - begin, tokens[here], out[here], beams[here]


def _joined(pieces: list[Block]) -> Block:
    at = np.concatenate([piece[0] for piece in pieces])
    tokens = np.concatenate([piece[1] for piece in pieces])
    out = np.concatenate([piece[2] for piece in pieces])
    beams = np.concatenate([piece[3] for piece in pieces])
    return at, tokens, out, beams


def _resampled(block: Block, duration_s: float, rng: np.random.Generator) -> Block:
    long = duration_s / _BLOCKS

    def pieces() -> Iterator[Block]:
        for number in range(_BLOCKS):
            begin = float(np.clip(number + rng.uniform(-_NEAR, _NEAR), 0, _BLOCKS - 1)) * long
            at, tokens, out, beams = _cut(block, begin, begin + long)
            yield at + number * long, tokens, out, beams

    return _joined(list(pieces()))
