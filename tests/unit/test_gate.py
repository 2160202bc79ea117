"""What an engine has refused as late is refused without it, for a moment."""

from __future__ import annotations

from serve_app.api.gate import Gate
from serve_app.calls import Call, Rejected
from serve_app.engine.protocol import GenerationSettings

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
    clock.now += 0.04
    assert gate.refusal(call(4.0)) is None


def test_the_engine_is_asked_again_after_a_tenth_of_a_second() -> None:
    clock = Clock()
    gate = Gate(clock)
    gate.saw(call(4.0), Rejected("late", 60.0, late_s=60.0))
    clock.now += 0.09
    assert gate.refusal(call(4.0)) is not None
    clock.now += 0.02
    assert gate.refusal(call(4.0)) is None


def test_a_full_queue_says_nothing_of_the_next_moment() -> None:
    gate = Gate(Clock())
    gate.saw(call(4.0), Rejected("the queue is full", 3.0))
    assert gate.refusal(call(4.0)) is None
