"""One replica's service model, from its engine's own times for units of work.

The engine tells of each unit (`BatchRan`) how many documents it stepped, how many tokens it encoded
and how long it took, which is what the model is linear in. A sweep over input lengths and documents
at once makes units of all kinds; the fit is one of least relative deviations, which a few units
that something else held up do not move, and without negative coefficients. A mixed load, of which
the fit knows nothing, then tells its error.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from serve_app.engine.protocol import (
    BatchRan,
    Emit,
    Engine,
    EngineRequest,
    Event,
    Failed,
    Finished,
    GenerationSettings,
)
from serve_app.tuning.arrivals import Floats
from serve_app.tuning.model import Decode, Encode, ServiceModel

_TERMS = 6
_STEPS = 12  # of a document in the sweep
_MIXED = 48  # documents of the mixed load
_ROUNDS = 3  # at least, over the whole sweep
_REWEIGHTINGS = 30


class ProfileError(Exception):
    """The engine cannot be profiled; the message says why, in one line."""


@dataclass(frozen=True)
class Unit:
    """One unit of work: tokens encoded, of how many documents; rows and their input tokens."""

    encoded: int
    squares: int
    rows: int
    source: int

    def terms(self) -> list[float]:
        """What each of the model's coefficients is multiplied with, in the order of `Fit`."""
        return [
            float(self.encoded > 0),
            float(self.encoded),
            float(self.squares),
            1.0,
            float(self.rows),
            float(self.source),
        ]


@dataclass(frozen=True)
class Profile:
    """A fitted model and its error.

    Attributes:
        kinds: kinds of units that were measured.
        fit_error: median relative error of their times.
        mixed_error: relative error of the whole time of a mixed load, signed: above 0 where the
            model is slower than the engine was.
        load_s: seconds to load the model and run one request.
    """

    model: ServiceModel
    kinds: int
    fit_error: float
    mixed_error: float
    load_s: float


def profile(
    make: Callable[[Emit], Engine], name: str, seconds: float, lengths: Sequence[int], most: int
) -> Profile:
    """Measure an engine for about so many seconds.

    Args:
        make: makes the engine, without speculation.
        lengths: input tokens to try, ascending; the last is the model's most.
        most: rows of its batch.

    Raises:
        ProfileError: a request failed, or there was not enough time to see every kind of unit.
    """
    events: SimpleQueue[list[Event]] = SimpleQueue()
    began = time.perf_counter()
    engine = make(events.put)
    try:
        meter = _Meter(engine, events)
        meter.run([16], 1)
        load_s = time.perf_counter() - began
        seen = _sweep(meter, seconds * 0.8, lengths, most)
        coefficients, fit_error, kinds = fit(seen)
        model = _model(name, coefficients, most, lengths[-1])
        rng = np.random.default_rng(1)
        mixed = rng.integers(lengths[0], lengths[-1] + 1, _MIXED).tolist()
        units = [unit for _ in range(2) for unit in meter.run(mixed, _STEPS)]
    finally:
        engine.close()
    measured = sum(took for _, took in units)
    predicted = sum(float(np.dot(unit.terms(), coefficients)) for unit, _ in units)
    return Profile(model, kinds, fit_error, predicted / measured - 1, load_s)


def fit(seen: dict[Unit, list[float]]) -> tuple[Floats, float, int]:
    """Coefficients (seconds; `Unit.terms`), the median relative error, and kinds of units.

    Raises:
        ProfileError: too few kinds of units.
    """
    kinds = {unit: float(np.median(took)) for unit, took in seen.items()}
    encoding = sum(unit.encoded > 0 for unit in kinds)
    if min(encoding, len(kinds) - encoding) < _TERMS:
        raise ProfileError(
            f"only {encoding} kinds of work with encoding and {len(kinds) - encoding} without were "
            "seen, which is too few to fit a model: give it more seconds, rows or input lengths"
        )
    times = np.array(list(kinds.values()))
    # Relative deviations: a short step matters as much as a long one.
    terms = np.array([unit.terms() for unit in kinds]) / times[:, None]
    # A kind's median is the surer the more often it was seen.
    counts = np.sqrt([min(len(took), 25) for took in seen.values()])
    scale = np.maximum(terms.max(axis=0), 1e-300)
    kept = list(range(_TERMS))
    while True:
        coefficients = np.zeros(_TERMS)
        coefficients[kept] = _least_deviations(terms[:, kept] / scale[kept], counts) / scale[kept]
        if coefficients.min() >= 0:
            break
        kept.remove(int((coefficients * scale).argmin()))
    error = float(np.median(np.abs(terms @ coefficients - 1)))
    return coefficients, error, len(kinds)


def _least_deviations(terms: Floats, weights: Floats) -> Floats:
    """Coefficients for which the terms come nearest to 1, by iteratively reweighted squares."""
    ones = np.ones(len(terms))
    root = np.sqrt(weights)
    for _ in range(_REWEIGHTINGS):
        found = np.linalg.lstsq(terms * root[:, None], ones * root, rcond=None)[0]
        root = np.sqrt(weights / np.maximum(np.abs(terms @ found - 1), 1e-4))
    return np.asarray(found, dtype=np.float64)


def _model(name: str, coefficients: Floats, rows: int, most_tokens: int) -> ServiceModel:
    call, token, squared, step, row, source = (float(f"{one:.4g}") for one in coefficients)
    return ServiceModel(
        name=name,
        encode=Encode(call_s=call, token_s=token, squared_token_s=squared),
        decode=Decode(step_s=step, row_s=row, source_token_s=source),
        rows=rows,
        max_input_tokens=most_tokens,
    )


def _sweep(
    meter: _Meter, seconds: float, lengths: Sequence[int], most: int
) -> dict[Unit, list[float]]:
    """Units of work and the times each took, in rounds over all points until time is up."""
    seen: dict[Unit, list[float]] = defaultdict(list)
    points = [(length, documents) for length in lengths for documents in _doublings(most)]
    until = time.perf_counter() + seconds
    for round_ in range(1_000):
        for length, documents in points:
            if time.perf_counter() > until and round_ >= _ROUNDS:
                return seen
            for unit, took in meter.run([length] * documents, _STEPS):
                seen[unit].append(took)
    return seen


def _doublings(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts


class _Meter:
    """Runs documents through an engine and tells its units of work."""

    def __init__(self, engine: Engine, events: SimpleQueue[list[Event]]) -> None:
        self._engine = engine
        self._events = events

    def run(self, lengths: Sequence[int], steps: int) -> list[tuple[Unit, float]]:
        """All at once, greedy, each of so many steps. Units, in order, with their seconds."""
        # Documents enter in the order in which they are handed in, and end in it, too.
        settings = GenerationSettings(min_new_tokens=steps, max_new_tokens=steps)
        pending = {}
        for length in lengths:
            # Some id that a vocabulary has, and the end token: speed does not depend on which.
            ids = [*([20] * (length - 1)), 1]
            request = EngineRequest(uuid.uuid4().hex, ids, settings)
            pending[request.id] = length
            self._engine.submit(request)
        waiting, running = list(pending.items()), dict[str, int]()
        units = []
        while pending:
            batch = self._events.get(timeout=600)
            ran = next((one for one in batch if isinstance(one, BatchRan)), None)
            if ran is not None:
                entered = list(_enter(waiting, running, ran))
                units.append((_unit(entered, running), ran.seconds))
            for event in batch:
                if isinstance(event, Failed):
                    raise ProfileError(f"the engine fails: {event.message}")
                if isinstance(event, Finished):
                    pending.pop(event.id, None)
                    running.pop(event.id, None)
        return units


def _enter(waiting: list[tuple[str, int]], running: dict[str, int], ran: BatchRan) -> Iterator[int]:
    """The documents that a unit took in: as many as make up its encoded tokens."""
    left = ran.input_tokens
    while left > 0 and waiting:
        one, length = waiting.pop(0)
        running[one] = length
        left -= length
        yield length


def _unit(entered: Sequence[int], running: dict[str, int]) -> Unit:
    return Unit(
        encoded=sum(entered),
        squares=sum(length * length for length in entered),
        rows=len(running),
        source=sum(running.values()),
    )


def throughput(model: ServiceModel, tokens: int, steps: int) -> list[tuple[int, float, float]]:
    """Of each number of requests at work: their latency, s, and how many are done a second.

    In the time of one request as many others are encoded as are at work, between its steps.
    """
    encode = model.encode
    alone = encode.call_s + encode.token_s * tokens + encode.squared_token_s * tokens**2
    decode = model.decode
    rows = []
    for at_once in _doublings(model.rows):
        step = decode.step_s + (decode.row_s + decode.source_token_s * tokens) * at_once
        latency = steps * step + at_once * alone + model.overhead_s
        rows.append((at_once, latency, at_once / latency))
    return rows
