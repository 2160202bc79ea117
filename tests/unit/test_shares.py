"""The engine's time in equal parts: on a clock that only the steps move."""

from __future__ import annotations

from collections import Counter

import pytest

from serve_app.engine.shares import TimeShares

FIXED_S, ROW_S = 0.001, 0.0005


def spent(
    rows: dict[str, int], seconds: float, encoding_s: dict[str, float]
) -> tuple[Counter[str], Counter[str]]:
    """What each share's rows took of so much time, and how many steps; `encoding_s` each turn."""
    time, step = TimeShares(), (FIXED_S, ROW_S)
    time.running(rows)
    took, steps, now = Counter[str](), Counter[str](), 0.0
    while now < seconds:
        for share, cost in encoding_s.items():
            others = [other for other in rows if other != share]
            if time.first(share, others):
                time.encoded({share: 100}, cost)
                now += cost
                took[share] += cost
        shares = time.stepping(rows, step)
        stepped = {share: rows[share] for share in shares}
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


def test_who_comes_later_owes_nothing_and_is_owed_nothing() -> None:
    time = TimeShares()
    time.running(["heavy"])
    time.stepped({"heavy": 8}, (0.0, 0.0), 100.0)
    time.running(["heavy", "late"])
    assert time.stepping({"heavy": 8, "late": 1}, (FIXED_S, ROW_S)) == {"heavy", "late"}
    time.stepped({"heavy": 8, "late": 1}, (FIXED_S, ROW_S), 0.1)
    assert time.stepping({"heavy": 8, "late": 1}, (FIXED_S, ROW_S)) == {"late"}


def test_nothing_is_held_against_a_share_that_had_left() -> None:
    time = TimeShares()
    time.running(["heavy", "light"])
    time.stepped({"heavy": 8}, (0.0, 0.0), 1.0)
    time.running(["light"])
    time.running(["heavy", "light"])
    assert time.stepping({"heavy": 8, "light": 1}, (FIXED_S, ROW_S)) == {"heavy", "light"}


def test_encoding_goes_first_to_who_has_had_least() -> None:
    time = TimeShares()
    time.running(["a", "b"])
    # As much as another is not less: who would be next waits for whoever is there.
    assert not time.first("a", ["b"])
    time.stepped({"b": 1}, (0.0, 0.0), 1.0)
    assert time.first("a", ["b"])
    assert not time.first("b", ["a"])
    assert time.first("b", [])
    assert time.first("new", ["a", "b"])
    # Beside one that has just come, and so begins where the least is.
    assert not time.first("a", ["new"])
