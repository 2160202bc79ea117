"""A load sent to a live service, with what is needed to simulate the very same one.

Each request asks for a fixed number of new tokens, so that its decode steps are known, and is cut
to one encoder input. What it really was, in tokens, is read from its answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np

from serve_app.tuning.arrivals import Floats
from serve_app.tuning.dashboard import Dashboard, DashboardError
from serve_app.tuning.send import OK, Run, Target, send
from serve_app.tuning.sizes import Ints
from serve_app.tuning.texts import made_up, of_characters

POLL_S = 0.5  # between two looks at the replicas
_WARM = 3  # requests before those that a probe counts


@dataclass(frozen=True)
class Plan:
    """The load: one entry per request.

    Attributes:
        at: when it is due, seconds, ascending.
        sizes: words of its text; characters where `characters`.
        out: new tokens it asks for.
        beams: its beam width.
    """

    at: Floats
    duration_s: float
    sizes: Ints
    out: Ints
    beams: Ints
    seed: int
    deadline_s: float
    characters: bool = False

    def body(self, number: int) -> bytes:
        """The n-th request. No two texts are alike."""
        rng = np.random.default_rng([self.seed, number])
        make = of_characters if self.characters else made_up
        steps = int(self.out[number])
        body = {
            "text": make(int(self.sizes[number]), rng),
            "num_beams": int(self.beams[number]),
            "min_new_tokens": steps,
            "max_new_tokens": steps,
            "on_overflow": "truncate",
            "timeout_s": self.deadline_s,
        }
        return json.dumps(body).encode()


@dataclass
class Answers:
    """What answers say of their requests: NaN where there was none. Tokens and seconds."""

    input_tokens: Floats
    output_tokens: Floats
    queue_s: Floats
    compute_s: Floats

    @classmethod
    def of(cls, count: int) -> Answers:
        """None yet, of so many requests."""
        return cls(*(np.full(count, np.nan) for _ in range(4)))

    def add(self, number: int, content: bytes) -> None:
        """Take `usage` of the answer to the n-th request; an answer without counts for nothing."""
        try:
            usage = json.loads(content)["usage"]
            row = [float(usage[name]) for name in ("input_tokens", "output_tokens")]
            row += [float(usage[name]) / 1e3 for name in ("queue_ms", "compute_ms")]
        except (ValueError, KeyError, TypeError):
            return
        columns = (self.input_tokens, self.output_tokens, self.queue_s, self.compute_s)
        for column, value in zip(columns, row, strict=True):
            column[number] = value


@dataclass
class Watched:
    """Replicas over time as they were seen: seconds from the load's beginning, ascending."""

    at: list[float] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    unseen: int = 0  # looks without an answer

    def starts_s(self) -> list[float]:
        """How long replicas were on their way: from a risen target until as many run."""
        took: list[float] = []
        since = None
        rows = list(zip(self.at, self.target, self.running, strict=True))
        for (_, before, _), (at, target, running) in pairwise(rows):
            if target < before:
                since = None
            elif target > before:
                since = at
            if since is not None and running >= target:
                took.append(at - since)
                since = None
        return took


@dataclass(frozen=True)
class Replayed:
    """A load that was sent: how it was met, and what replicas did meanwhile (None: not seen)."""

    run: Run
    answers: Answers
    replicas: Watched | None


@dataclass(frozen=True)
class Probed:
    """Requests of the load sent one after the other, so that none waits for another.

    Attributes:
        latency_s: of each, from its sending.
        overhead_s: what the median request took outside the engine.
    """

    latency_s: Floats
    answers: Answers
    overhead_s: float


class ReplayError(Exception):
    """The service does not answer as a service of this kind; one line."""


async def probe(plan: Plan, target: Target, count: int) -> Probed:
    """Send the first requests of the load, each when the one before has its answer.

    Raises:
        ReplayError: one failed, or an answer has no usage.
    """
    count = min(count, len(plan.at))
    answers, latency = Answers.of(count), np.zeros(count)
    for turn in range(-min(_WARM, count), count):
        number, run = turn % count, Run()
        said: list[bytes] = []
        body = plan.body(number)
        kept = partial(_keep, said)
        await send([0.0], partial(_same, body), target, run, asyncio.Event(), kept)
        for content in said:
            answers.add(number, content)
        if run.sent[0].kind != OK:
            raise ReplayError(f"{target.url}: the probe failed: {run.sent[0].kind}")
        if np.isnan(answers.compute_s[number]):
            raise ReplayError(f"{target.url}: an answer without `usage`: not this service")
        latency[number] = run.sent[0].ended - run.sent[0].began
    outside = latency - answers.queue_s - answers.compute_s
    return Probed(latency, answers, max(float(np.median(outside)), 0.0))


def _same(body: bytes, _: int) -> bytes:
    return body


def _keep(said: list[bytes], _: int, content: bytes) -> None:
    said.append(content)


async def replay(
    plan: Plan, target: Target, dashboard: Dashboard | None, run: Run | None = None
) -> Replayed:
    """Send the load and watch the replicas from its beginning to its end."""
    run = run or Run()
    answers = Answers.of(len(plan.at))
    watched = Watched() if dashboard is not None else None
    watching = None
    if dashboard is not None and watched is not None:
        watching = asyncio.create_task(_watch(dashboard, watched, plan.duration_s))
    await send(plan.at.tolist(), plan.body, target, run, asyncio.Event(), answers.add)
    if watching is not None:
        await watching
    return Replayed(run, answers, watched)


async def _watch(dashboard: Dashboard, watched: Watched, until_s: float) -> None:
    began = time.perf_counter()
    while (at := time.perf_counter() - began) <= until_s:
        try:
            now = await asyncio.to_thread(dashboard.read)
        except DashboardError:
            watched.unseen += 1
        else:
            # The answer is of some moment between question and answer.
            watched.at.append((at + time.perf_counter() - began) / 2)
            watched.target.append(now.target)
            watched.running.append(now.running)
        await asyncio.sleep(max(at + POLL_S - (time.perf_counter() - began), 0.05))
