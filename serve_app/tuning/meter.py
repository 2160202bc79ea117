"""What simulated replicas say of their work: `engine.work.Meter` for all of them, compiled.

The same sums, the same costs made of them, held against that one by the tests. Of one thing a
simulation knows less: it has no `max_new_tokens`, which bounds what a request is taken to decode.
And of one more: until a request has finished, others are taken to be as long as they will be.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from serve_app.engine.work import BELIEF, HALF_LIFE_S, LEAST_TOKENS
from serve_app.tuning import kernel
from serve_app.tuning.arrivals import Floats
from serve_app.tuning.kernel import (
    ENCODE_S,
    ENCODED,
    FINISHED,
    MADE,
    PRODUCTS,
    ROWS,
    SQUARES,
    STEP_S,
    STEPS,
    Cluster,
    Ints,
    compiled,
)

# Columns of what is reported: the fields of `engine.work.Work`.
WAITING_S, RUNNING_S, DONE_S, DONE = range(4)


class Meters(NamedTuple):
    """A row for each replica; columns of the first two as `Cluster.tally` has them."""

    last: Floats
    recent: Floats
    done_s: Floats
    begun: Ints


def meters(replicas: int) -> Meters:
    """Of replicas that have done nothing."""
    return Meters(
        np.zeros((replicas, 10)),
        np.zeros((replicas, 10)),
        np.zeros(replicas),
        np.zeros(replicas, dtype=np.int64),
    )


def begin(m: Meters, r: int) -> None:
    """A replica is new."""
    for column in m:
        column[r] = 0


@compiled  # type: ignore[untyped-decorator]
def row_cost(recent: Floats, slots: int) -> float:
    """Seconds of a row in a step of a full batch, as `engine.work.Meter.row_s`."""
    if recent[ROWS] == 0:
        return 0.0
    rows, seconds = recent[ROWS] / recent[STEPS], recent[STEP_S] / recent[STEPS]
    proportional = seconds / rows
    belief = BELIEF * rows * rows
    covariance = recent[PRODUCTS] / recent[STEPS] - rows * seconds
    variance = max(recent[SQUARES] / recent[STEPS] - rows * rows, 0.0)
    slope = (covariance + belief * proportional) / (variance + belief)
    slope = min(max(slope, 0.0), proportional)
    return float(slope + (seconds - slope * rows) / max(slots, rows))


@compiled  # type: ignore[untyped-decorator]
def report(c: Cluster, m: Meters, slots: int, replicas: Ints, now: float, said: Floats) -> None:
    """Put into `said`, a row for each of the replicas, their work; NaN: nobody knows it."""
    for place in range(len(replicas)):
        r = replicas[place]
        if c.live[r] > 0 and now > c.since[r] and c.step_s[r] > 0:
            done = int((now - c.since[r]) / c.step_s[r] + 1e-9)
            kernel.tally(c, r, min(done, c.planned[r]))
        recent = m.recent[r]
        if m.begun[r] == 0:
            m.begun[r] = 1
            for column in range(len(recent)):
                m.last[r, column] = c.tally[r, column]
        else:
            busy_s = c.tally[r, ENCODE_S] + c.tally[r, STEP_S]
            busy_s -= m.last[r, ENCODE_S] + m.last[r, STEP_S]
            encoded = c.tally[r, ENCODED] - m.last[r, ENCODED]
            rows = c.tally[r, ROWS] - m.last[r, ROWS]
            keep = 0.5 ** (busy_s / HALF_LIFE_S)
            for column in range(len(recent)):
                fresh = c.tally[r, column] - m.last[r, column]
                recent[column] = keep * recent[column] + fresh
                m.last[r, column] = c.tally[r, column]
            if recent[ENCODED] >= LEAST_TOKENS:
                token_s = recent[ENCODE_S] / recent[ENCODED]
                m.done_s[r] += token_s * encoded + row_cost(recent, slots) * rows
        mean = recent[MADE] / recent[FINISHED] if recent[FINISHED] > 0 else 0.0
        waiting_tokens = waiting_steps = running_steps = 0.0
        request = c.head[r]
        while request >= 0:
            steps = mean if mean > 0 else float(c.out[request])
            waiting_tokens += c.tokens[request]
            waiting_steps += c.beams[request] * max(steps, 1.0)
            request = c.next[request]
        running_tokens = float(c.encoding[r]) if c.live[r] > 0 and now < c.since[r] else 0.0
        for one in range(c.live[r]):
            request = c.document[r, one]
            out = max(c.out[request], 1)
            made = c.step[r] + c.tallied[r] - (c.finish[r, one] - out)
            steps = mean if mean > 0 else float(out)
            running_steps += c.beams[request] * max(steps - made, 1.0)
        row = said[place]
        if recent[ENCODED] < LEAST_TOKENS:
            idle = c.head[r] < 0 and c.live[r] == 0
            row[:] = 0.0 if idle else np.nan
            if idle:
                row[DONE_S], row[DONE] = m.done_s[r], m.last[r, FINISHED]
            continue
        token_s = recent[ENCODE_S] / recent[ENCODED]
        row_s = row_cost(recent, slots)
        row[WAITING_S] = token_s * waiting_tokens + row_s * waiting_steps
        row[RUNNING_S] = token_s * running_tokens + row_s * running_steps
        row[DONE_S], row[DONE] = m.done_s[r], m.last[r, FINISHED]
