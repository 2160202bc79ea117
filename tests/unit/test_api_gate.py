"""What an engine has refused as late is refused without it, for a moment."""

from __future__ import annotations

from itertools import pairwise

from serve_app.api.gate import Gate
from serve_app.calls import Call, Rejected
from serve_app.engine.protocol import Finished, FinishReason, GenerationSettings, Usage

LONG = GenerationSettings(max_new_tokens=200)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def call(timeout_s: float, share: str = "a", settings: GenerationSettings = LONG) -> Call:
    return Call("id", [1], settings, timeout_s, share)


def test_the_same_with_no_more_time_is_refused_for_as_long_as_it_would_be_late() -> None:
    clock = Clock()
    gate = Gate(clock)
    assert gate.refusal(call(4.0)) is None
    gate.saw(call(4.0), Rejected("late", 0.05, late_s=0.05))
    clock.now += 0.02
    refusal = gate.refusal(call(4.0))
    assert refusal is not None
    assert refusal.late_s is not None
    assert round(refusal.late_s, 6) == round(refusal.retry_after_s, 6) == 0.03
    # Less time, more late; more time, not late; and nothing is known of others.
    assert gate.refusal(call(3.9)) is not None
    assert gate.refusal(call(4.04)) is None
    assert gate.refusal(call(4.0, share="b")) is None
    assert gate.refusal(call(4.0, settings=GenerationSettings(max_new_tokens=8))) is None
    clock.now += 0.1
    assert gate.refusal(call(4.0)) is None  # it may be done in time now: the engine knows


def asked(gate: Gate, clock: Clock, rate: float, seconds: float) -> list[float]:
    """When the engine was asked of calls that come at a rate, all of them refused by it."""
    began, times = clock.now, []
    while clock.now - began < seconds:
        if gate.refusal(call(4.0)) is None:
            times.append(clock.now - began)
            gate.saw(call(4.0), Rejected("late", 0.001, late_s=0.001))
        clock.now += 1 / rate
    return times


def test_an_engine_that_refuses_all_is_asked_twenty_times_a_second() -> None:
    clock = Clock()
    times = asked(Gate(clock), clock, rate=500, seconds=10)
    # The first two close together: until it has refused one there is nothing to wait for.
    assert 190 <= len(times) <= 203
    assert max(b - a for a, b in pairwise(times)) <= 0.06


def test_an_engine_that_answers_more_is_asked_more() -> None:
    clock = Clock()
    gate = Gate(clock)
    for _ in range(400):  # 200 a second, for as long as is looked back
        gate.saw(call(4.0), Finished("id", [1], FinishReason.STOP, Usage()))
        clock.now += 0.005
    times = asked(gate, clock, rate=2_000, seconds=0.05)
    assert 13 <= len(times) <= 17  # at 300 a second


def test_who_has_more_time_than_was_refused_is_not_held_up() -> None:
    clock = Clock()
    gate = Gate(clock)
    gate.saw(call(4.0), Rejected("late", 1.0, late_s=1.0))
    clock.now += 0.2
    assert gate.refusal(call(4.0)) is None
    assert gate.refusal(call(4.0)) is not None
    assert gate.refusal(call(5.1)) is None


def test_what_was_refused_a_second_ago_says_nothing() -> None:
    clock = Clock()
    gate = Gate(clock)
    gate.saw(call(4.0), Rejected("late", 60.0, late_s=60.0))
    clock.now += 0.2
    assert [gate.refusal(call(4.0)) is None for _ in range(3)] == [True, False, False]
    clock.now += 0.9
    assert all(gate.refusal(call(4.0)) is None for _ in range(3))


def test_kinds_that_nobody_asks_for_are_forgotten() -> None:
    clock = Clock()
    gate = Gate(clock)
    for number in range(10_000):
        gate.saw(call(4.0, share=f"{number}"), Rejected("late", 1.0, late_s=1.0))
        clock.now += 0.01
    assert len(gate._seen) <= 256 + 1


def test_a_full_queue_says_nothing_of_the_next_moment() -> None:
    gate = Gate(Clock())
    gate.saw(call(4.0), Rejected("the queue is full", 3.0))
    assert gate.refusal(call(4.0)) is None
