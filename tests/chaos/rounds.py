"""Rounds of faults under load. One seed gives one sequence of faults and of requests."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from tests.chaos.faults import BY_NAME, FAULTS, Fault, writes_events
from tests.chaos.judge import Window, counts, lost, violations
from tests.chaos.load import Load
from tests.chaos.service import LocalService, started, until

FAULT_S = 90.0  # what a fault may take, its load and recovery included
_PER_ROUND = 3
_LAST_EVERY = 4  # rounds, of which one ends with a fault that ends the service
_RECOVERS_S = 240.0
_ENDS_WITH = "Ray has stopped by itself"


@dataclass
class Outcome:
    """What one fault did.

    Attributes:
        recovery_s: from the end of the fault until the service was whole and answered.
        endings: requests by how they ended.
        broken: promises that did not hold.
    """

    round: int
    fault: str
    requests: int = 0
    lost: int = 0
    recovery_s: float = 0.0
    endings: str = ""
    broken: list[str] = field(default_factory=list)
    skipped: str = ""

    def row(self) -> str:
        """Of a Markdown table."""
        if self.skipped:
            return f"| {self.round} | {self.fault} | | | | not done: {self.skipped} |"
        return (
            f"| {self.round} | {self.fault} | {self.requests} | {self.lost} "
            f"| {self.recovery_s:.1f} | {self.endings} |"
        )


HEAD = "| round | fault | requests | lost | recovered after, s | how they ended |\n" + (
    "|---|---|---|---|---|---|"
)


def deal(seed: int, rounds: int) -> list[list[str]]:
    """Names of the faults of each round: shuffled, and all of them before any comes again."""
    chance = random.Random(f"{seed}/faults")
    common = [fault.name for fault in FAULTS if not fault.ends_service]
    ends = [fault.name for fault in FAULTS if fault.ends_service]

    def decks() -> Iterator[str]:
        while True:
            yield from chance.sample(common, len(common))

    cards = decks()
    return [
        [*islice(cards, _PER_ROUND), *(ends if number % _LAST_EVERY == 0 else [])]
        for number in range(1, rounds + 1)
    ]


def play(
    seed: int,
    number: int,
    names: Sequence[str],
    say: Callable[[str], None] = lambda _: None,
    ends: float = math.inf,
) -> list[Outcome]:
    """One round: a service, these faults one after the other, the service's end.

    A fault from which it did not recover ends the round, and so does the time: no fault begins that
    could last beyond `ends`, `time.monotonic()` seconds.
    """
    outcomes: list[Outcome] = []
    with started() as service:
        for turn, name in enumerate(names):
            if time.monotonic() + FAULT_S > ends:
                break
            fault = BY_NAME[name]
            outcome = Outcome(number, name, skipped=fault.missing(service))
            outcomes.append(outcome)
            if not outcome.skipped:
                try:
                    _strike(service, fault, f"{seed}/{number}/{turn}", outcome)
                except AssertionError as error:
                    outcome.broken.append(f"{error}; {service.said()[-3:]}")
            say(outcome.row())
            for one in outcome.broken:
                say(f"BROKEN: {one}")
            if outcome.broken or (fault.ends_service and not outcome.skipped):
                break  # nothing is left to do another fault to
        left = service.stop()
        if outcomes:
            outcomes[-1].broken += [f"left behind: {one}" for one in left]
    return outcomes


def _strike(service: LocalService, fault: Fault, seed: str, outcome: Outcome) -> None:
    chance = random.Random(seed)
    with Load(service.url, service.token, seed) as load:
        time.sleep(chance.uniform(2, 5))
        began = time.monotonic()
        recovered = fault.inject(service, chance)
        over = time.monotonic()
        until(recovered, f"recovery from: {fault.name}", _RECOVERS_S)
        ended = time.monotonic()
        time.sleep(2)
    outcome.requests, outcome.lost = len(load.requests), len(lost(load.requests))
    outcome.recovery_s, outcome.endings = ended - over, counts(load.requests)
    if fault.ends_service:
        ended = time.monotonic()  # it stays gone
        status, said = service.ended(), service.said()
        if status != 2 or not any(_ENDS_WITH in line for line in said):
            outcome.broken.append(f"t5-serve run ended with {status}: {said[-3:]}")
    else:
        until(service.idle, "no slot is in use and nothing waits once the load has ended")
        # Each replica writes in order: all events of the load come before these.
        until(lambda: writes_events(service), "usage events are written")
    window = Window(began, ended, fault.allowed, fault.loses_events)
    outcome.broken += violations(load.requests, service.events(), window)
