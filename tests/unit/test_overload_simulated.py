"""Queue, turns and expected waits under overload, on a clock of their own: no machine is too slow.

The engine's own parts decide; only steps and encoding are made up: so many seconds by rows and
tokens, and nothing is computed.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest

from serve_app.engine.pace import Pace
from serve_app.engine.protocol import EngineRequest, GenerationSettings
from serve_app.engine.queue import Entry, FairQueue
from serve_app.engine.turns import Turns
from serve_app.engine.work import Tally

ROWS, TOKENS, STEPS = 8, 100, 50
TOKEN_S, FIXED_S, ROW_S = 100e-6, 5e-3, 1e-3


@dataclass(frozen=True)
class Arrival:
    at: float
    share: str = "a"
    deadline_s: float = 2.0
    steps: int = STEPS
    tokens: int = TOKENS


@dataclass
class Outcome:
    arrival: Arrival
    kind: str = ""
    ended: float = 0.0
    steps: int = 0

    @property
    def latency(self) -> float:
        return self.ended - self.arrival.at


def simulated(arrivals: list[Arrival]) -> list[Outcome]:
    """What becomes of them."""
    queue, pace, turns, tally = FairQueue(), Pace(ROWS), Turns(ROWS, 4_096), Tally()
    outcomes = [Outcome(one) for one in arrivals]
    of: dict[Entry, Outcome] = {}
    coming = iter(outcomes)
    upcoming = next(coming, None)
    running: list[Entry] = []
    now = 0.0

    def end(entry: Entry, kind: str) -> None:
        outcome = of.pop(entry)
        outcome.kind, outcome.ended, outcome.steps = kind, now, entry.made

    while upcoming is not None or running or len(queue):
        if not running and not len(queue) and upcoming is not None:
            now = max(now, upcoming.arrival.at)
        while upcoming is not None and upcoming.arrival.at <= now:
            one, at = upcoming.arrival, upcoming.arrival.at
            settings = GenerationSettings(min_new_tokens=one.steps, max_new_tokens=one.steps)
            request = EngineRequest(
                "", [1] * one.tokens, settings, at + one.deadline_s, share=one.share
            )
            entry = Entry(request, arrived=now)
            of[entry] = upcoming
            if pace.late_s(entry, running, queue.before(one.share), now) is not None:
                end(entry, "refused")
            else:
                queue.push(entry)
            upcoming = next(coming, None)
        for entry in queue.take(partial(Entry.late, now=now)):
            end(entry, "late")
        for entry in [one for one in running if one.late(now)]:
            running.remove(entry)
            end(entry, "late")
        pulled = turns.pull(queue, running, pace, now)
        running += pulled
        if not running:
            continue
        tokens, rows = sum(entry.tokens for entry in pulled), len(running)
        encode_s, step_s = tokens * TOKEN_S, FIXED_S + rows * ROW_S
        now += encode_s + step_s
        tally.encoded(tokens, encode_s)
        tally.stepped(rows, rows, rows, step_s)
        tally.cpu_s += encode_s + step_s
        for entry in list(running):
            entry.made += 1
            if entry.made == entry.request.settings.max_new_tokens:
                tally.finished += 1
                running.remove(entry)
                end(entry, "late" if entry.late(now) else "done")
        pace.stepped(tally, now)
    return outcomes


def poisson(rate: float, end: float, deadline_s: float = 2.0) -> list[Arrival]:
    chance = random.Random(round(rate))
    moments = itertools.accumulate(chance.expovariate(rate) for _ in range(int(rate * end * 2) + 9))
    return [Arrival(at, deadline_s=deadline_s) for at in moments if at < end]


def counted(outcomes: list[Outcome], start: float, end: float) -> Counter[str]:
    return Counter(one.kind for one in outcomes if start <= one.arrival.at < end)


# A full batch ends 8 documents after 50 steps of 13 ms and 80 ms of encoding: 11 a second.
CAPACITY = ROWS / (STEPS * (FIXED_S + ROWS * ROW_S) + ROWS * TOKENS * TOKEN_S)


@pytest.mark.parametrize("deadline_s", [2.0, 10.0])
def test_goodput_stays_at_three_times_what_can_be_done(deadline_s: float) -> None:
    best = 0
    for part in (0.3, 0.6, 0.8, 1.0):
        outcomes = simulated(poisson(part * CAPACITY, 60, deadline_s=deadline_s))
        best = max(best, counted(outcomes, 20, 60)["done"])
    outcomes = simulated(poisson(3 * CAPACITY, 60, deadline_s=deadline_s))
    kinds = counted(outcomes, 20, 60)
    assert kinds["done"] >= 0.9 * best, (kinds, best)
    # Little is computed for nothing.
    wasted = sum(one.steps for one in outcomes if one.kind == "late")
    assert wasted <= 0.05 * STEPS * kinds["done"]


def test_below_what_can_be_done_nobody_is_refused() -> None:
    outcomes = simulated(poisson(0.6 * CAPACITY, 60))
    assert counted(outcomes, 0, 60).keys() == {"done"}


def test_a_storm_of_those_who_come_back_when_told_ends() -> None:
    """20 at once, with time for little more than a batch; those refused come again, later."""
    left, rounds = 20, 0
    while left and rounds < 10:
        warm = poisson(0.5 * CAPACITY, 10)
        storm = [Arrival(10.0) for _ in range(left)]
        outcomes = simulated(warm + storm)
        left -= sum(one.kind == "done" for one in outcomes if one.arrival.at == 10.0)
        rounds += 1
    assert not left
    assert rounds <= 4


def test_a_light_client_is_hardly_slower_beside_a_heavy_one() -> None:
    light = [Arrival(20.0 + at, share="light", steps=20) for at in range(4)]
    alone = simulated([Arrival(float(at), share="light", steps=20) for at in range(20)] + light)
    # Parts of documents, twice as many as can be done.
    heavy = [
        Arrival(at / 20, share="heavy", deadline_s=300, steps=60, tokens=500) for at in range(500)
    ]
    beside = simulated(sorted(heavy + light, key=lambda one: one.at))

    def slowest(outcomes: list[Outcome]) -> float:
        mine = [one for one in outcomes if one.arrival.share == "light" and one.arrival.at >= 20]
        assert {one.kind for one in mine} == {"done"}
        return sorted(one.latency for one in mine)[int(0.95 * len(mine))]

    # Twice the rows in each step, and their encoding between the steps.
    assert slowest(beside) <= 4 * slowest(alone)
