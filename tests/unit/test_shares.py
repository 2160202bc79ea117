"""The engine's time in equal parts: on a clock that only the steps move."""

from __future__ import annotations

from collections import Counter

import pytest

from serve_app.engine.shares import TimeShares

FIXED_S, ROW_S = 0.001, 0.0005


def spent(
    rows: dict[str, int], seconds: float, encoding_s: dict[str, float]
) -> tuple[Counter[str], Counter[str]]:
    """What each share's rows took of so much time, and how many steps.

    `encoding_s`: of a document of the share, one each 10 steps.
    """
    time, step = TimeShares(), (FIXED_S, ROW_S)
    took, steps, encoded, now = Counter[str](), Counter[str](), Counter[str](), 0.0
    while now < seconds:
        time.join(rows)
        for share, cost in encoding_s.items():
            if steps[share] >= 10 * encoded[share] and not time.ahead(share, rows, step):
                encoded[share] += 1
                time.encoded({share: 100}, cost)
                now += cost
                took[share] += cost
        stepped = {share: n for share, n in rows.items() if not time.ahead(share, rows, step)}
        cost = FIXED_S + ROW_S * sum(stepped.values())
        time.stepped(stepped, step, cost)
        now += cost
        for share, count in stepped.items():
            took[share] += FIXED_S / len(stepped) + ROW_S * count
            steps[share] += 1
    return took, steps


def test_a_share_of_one_row_gets_half_of_the_time_beside_one_of_many() -> None:
    took, steps = spent({"light": 1, "heavy": 31}, 10, {})
    assert took["light"] == pytest.approx(took["heavy"], rel=0.05)
    # Alone it would have made a step each 1.5 ms.
    assert steps["light"] * 0.0015 >= 10 / 2 * 0.9
    assert steps["heavy"] * 0.0175 >= 10 / 2 * 0.8


def test_who_encodes_long_documents_decodes_less() -> None:
    took, steps = spent({"light": 1, "heavy": 8}, 10, {"heavy": 0.06})
    assert took["light"] == pytest.approx(took["heavy"], rel=0.05)
    assert steps["light"] * 0.0015 >= 10 / 2 * 0.9
    assert steps["heavy"] > 50


def test_equal_shares_step_together() -> None:
    _, steps = spent({"a": 4, "b": 4, "c": 4}, 1, {})
    assert max(steps.values()) - min(steps.values()) <= 1
    # Each step is of all: none of them alone.
    assert steps["a"] == pytest.approx(1 / (FIXED_S + 12 * ROW_S), rel=0.02)


def beside(time: TimeShares) -> set[str]:
    """Who of a light and a heavy share takes the next step."""
    rows = {"heavy": 8, "light": 1}
    return {share for share in rows if not time.ahead(share, rows, (FIXED_S, ROW_S))}


def test_who_comes_later_is_owed_what_it_had_to_wait_for_and_no_more() -> None:
    time = TimeShares()
    for _ in range(1_000):
        time.join(["heavy"])
        time.encoded({"heavy": 1}, 0.1)
    time.join(["heavy", "light"])
    assert beside(time) == {"light"}
    time.encoded({"light": 1}, 0.09)
    assert beside(time) == {"light"}
    time.encoded({"light": 1}, 0.006)  # less than a step of all of them is left
    assert beside(time) == {"heavy", "light"}
    time.encoded({"light": 1}, 0.012)
    assert beside(time) == {"heavy"}


def test_who_has_left_and_comes_again_is_as_far_ahead_as_before() -> None:
    time = TimeShares()
    time.join(["heavy", "light"])
    time.encoded({"heavy": 1}, 1.0)
    time.join(["light"])
    time.join(["heavy", "light"])
    assert beside(time) == {"light"}
    # Unless the others have had as much meanwhile.
    time.join(["light"])
    time.encoded({"light": 1}, 2.0)
    time.join(["light"])
    time.join(["heavy", "light"])
    assert beside(time) == {"heavy", "light"}


def test_those_who_have_left_are_forgotten_in_the_end() -> None:
    time = TimeShares()
    for number in range(10_000):
        time.join(["stays", f"{number}"])
        time.encoded({"stays": 1, f"{number}": 1}, 0.1)
    assert len(time._had) <= 1_100
