"""Suggested rate limits: what they refuse, counted as NGINX counts, and what they look like."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.api.limiter import RateLimiter, Turn
from serve_app.config import RateLimitSettings
from serve_app.errors import RateLimitedError
from serve_app.usage.limits import (
    Call,
    Limit,
    burst_needed,
    limit_for,
    round_up,
    tokens_for,
    tokens_needed,
    values,
)
from tests.unit.usage_day import Day

ROOT = Path(__file__).resolve().parents[2]


def refused(arrivals_ms: list[int], rate: int, burst: int) -> int:
    """Calls refused, in integers as `ngx_http_limit_req_lookup` has them: thousandths of a call."""
    per_second = rate * 1000 // 60
    excess, last, count = 0, None, 0
    for now in arrivals_ms:
        if last is not None:
            left = max(excess - per_second * (now - last) // 1000 + 1000, 0)
            if left > burst * 1000:
                count += 1
                continue
            excess = left
        last = now
    return count


# Rates that NGINX can hold exactly.
@given(
    st.lists(st.integers(0, 600_000), min_size=1, max_size=60).map(sorted),
    st.sampled_from([60, 120, 300, 600]),
)
def test_a_burst_is_just_enough(arrivals_ms: list[int], rate: int) -> None:
    burst = burst_needed([at / 1000 for at in arrivals_ms], rate)
    assert refused(arrivals_ms, rate, burst + 1) == 0
    assert burst == 0 or refused(arrivals_ms, rate, burst - 1) > 0


@pytest.mark.parametrize(
    ("arrivals", "rate", "burst"),
    [
        ([0.0], 60, 0),
        ([0.0] * 10, 60, 9),
        ([float(second) for second in range(100)], 60, 0),
        ([second / 2 for second in range(100)], 60, 50),  # half of 99 calls are too many
        ([0.0, 0.0, 0.0, 60.0, 60.0], 60, 2),
    ],
)
def test_bursts_that_can_be_told_by_hand(arrivals: list[float], rate: int, burst: int) -> None:
    assert burst_needed(arrivals, rate) == burst


def test_a_limit_covers_all_but_the_busiest_minutes() -> None:
    steady = [60.0 * minute + second for minute in range(100) for second in (0, 20, 40)]
    assert limit_for(steady, 1) == limit_for(steady, 1.5).__class__(rate=5, burst=1)
    # One minute of a hundred with 30 calls at once: that is for the burst.
    busy = sorted([*steady, *[3000.0] * 30])
    assert (limit_for(busy, 1).rate, limit_for(busy, 1).burst) == (5, 50)
    assert limit_for(steady, 4).rate == 20


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.2, 1), (1, 1), (1.01, 2), (2, 2), (3, 5), (9, 10), (10, 10), (11, 20), (501, 1000)],
)
def test_numbers_are_round(value: float, rounded: int) -> None:
    assert round_up(value) == rounded


def calls(a_minute: int) -> list[float]:
    return [minute * 60 + at * 60 / a_minute for minute in range(50) for at in range(a_minute)]


def test_most_get_the_default_and_the_busy_a_tier() -> None:
    arrivals = {"a": calls(5), "b.c": calls(50), "d": calls(5), "e": calls(50), "f": calls(2)}
    said = values(arrivals, {}, 1)
    assert said.endswith("# No tokens were seen: none can be limited.\n")
    assert "rate_limits" not in yaml.safe_load(said)
    suggested = yaml.safe_load(said)["ingress"]["rateLimit"]
    assert suggested == {
        "enabled": True,
        "rate": "5r/m",
        "burst": 1,
        "tiers": [{"name": "r50-b1", "match": "b[.]c|e", "rate": "50r/m", "burst": 1}],
    }
    [tier] = suggested["tiers"]
    # As the chart puts it into NGINX' pattern.
    pattern = re.compile(rf"^(?:{tier['match']})(?:\.[0-9a-f]{{8}})?$")
    known = ["b.c.01234567", "e", "bXc", "a", "be"]
    assert [bool(pattern.match(name)) for name in known] == [True, True, False, False, False]


def suggest(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve_app.cli.main", "limits", "suggest", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_reads_logs_and_writes_values(tmp_path: Path) -> None:
    day = Day()
    (tmp_path / "usage.jsonl").write_text("\n".join(day.service))
    (tmp_path / "access.log").write_text("\n".join(day.nginx))
    done = suggest("--logs", str(tmp_path), "--headroom", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "#   web-shop: 973 calls, " in done.stdout
    suggested: dict[str, Any] = yaml.safe_load(done.stdout)["ingress"]["rateLimit"]
    assert suggested["enabled"] is True
    by_name = {tier["match"]: tier for tier in suggested["tiers"]}
    # Two calls a minute, and at noon ten more at once.
    assert by_name["web-shop"]["rate"] == "2r/m"
    assert by_name["web-shop"]["burst"] >= 10
    # 600 tokens a minute of nightly, 240 of web-shop, 120 of late.
    tokens = yaml.safe_load(done.stdout)["rate_limits"]
    assert (tokens["enabled"], tokens["tokens_per_minute"]) == (True, 500)
    [tier] = tokens["tiers"]
    assert (tier["match"], tier["tokens_per_minute"]) == ("nightly", 1000)
    assert "#   nightly: 32,400 tokens, 1,000 a minute" in done.stdout


# Tokens


def replayed(calls: list[Call], settings: RateLimitSettings, client: str = "shop") -> int:
    """Calls that the service's own limiter refuses."""
    now = 0.0
    limiter = RateLimiter(settings, clock=lambda: now)
    turns: dict[int, Turn] = {}
    count = 0
    moments = [(call.came, 0, at) for at, call in enumerate(calls)]
    moments += [(call.ended, 1, at) for at, call in enumerate(calls)]
    for moment, ends, at in sorted(moments):
        now = moment
        if ends:
            if (turn := turns.pop(at, None)) is not None:
                turn.leave(calls[at].used)
            continue
        turn = limiter.turn(client)
        assert turn is not None
        turn.enter()
        try:
            turn.take(calls[at].asked)
        except RateLimitedError:
            turn.leave(0)
            count += 1
        else:
            turns[at] = turn
    return count


def one(came_ms: int, took_ms: int, asked: int, more: int) -> Call:
    return Call(came_ms / 1000, (came_ms + took_ms) / 1000, asked, max(asked + more, 0))


CALLS = st.lists(
    st.builds(
        one,
        st.integers(0, 900_000),
        st.integers(1, 60_000),
        st.integers(1, 5_000),
        # Output, and passes over summaries; or a call that failed and used less.
        st.integers(-5_000, 5_000),
    ),
    min_size=1,
    max_size=50,
)


@given(CALLS, st.integers(1, 100_000))
@settings(deadline=None)
def test_a_bucket_is_just_enough(calls: list[Call], rate: int) -> None:
    bucket = tokens_needed(calls, rate)
    largest = max(call.asked for call in calls)

    def refuses(burst: int) -> int:
        limits = RateLimitSettings(enabled=True, tokens_per_minute=rate, burst_tokens=burst)
        return replayed(calls, limits)

    assert refuses(bucket) == 0
    # Below the largest call a bucket lets that one in when it is full.
    assert bucket == largest or bucket - 2 < largest or refuses(bucket - 2) > 0


@given(st.dictionaries(st.sampled_from(["a", "b.c", "d", "e-f"]), CALLS, min_size=1))
@settings(deadline=None)
def test_what_is_suggested_refuses_nothing_of_what_it_was_made_from(
    work: dict[str, list[Call]],
) -> None:
    arrivals = {client: sorted(call.came for call in calls) for client, calls in work.items()}
    suggested = yaml.safe_load(values(arrivals, work, 1))
    limits = RateLimitSettings.model_validate(suggested["rate_limits"])
    edge = suggested["ingress"]["rateLimit"]
    for client, calls in work.items():
        assert replayed(calls, limits, client) == 0
        [rate, burst] = next(
            ([tier["rate"], tier["burst"]] for tier in edge["tiers"]
             if re.fullmatch(tier["match"], client)),
            [edge["rate"], edge["burst"]],
        )  # fmt: skip
        # NGINX holds thousandths of a call a second: what it loses there, a burst makes good.
        at_ms = [round(at * 1000) for at in arrivals[client]]
        assert refused(at_ms, int(rate.removesuffix("r/m")), burst + 1) == 0


@given(CALLS, st.floats(1, 1.5))
@settings(deadline=None)
def test_who_does_ten_times_as_much_is_refused(calls: list[Call], headroom: float) -> None:
    arrivals = sorted(call.came for call in calls)
    suggested = yaml.safe_load(values({"shop": arrivals}, {"shop": calls}, headroom))
    limits = RateLimitSettings.model_validate(suggested["rate_limits"])
    assert replayed([call for call in calls for _ in range(10)], limits) > 0
    edge = suggested["ingress"]["rateLimit"]
    at_ms = [round(at * 1000) for at in arrivals for _ in range(10)]
    assert refused(at_ms, int(edge["rate"].removesuffix("r/m")), edge["burst"]) > 0


def test_calls_without_tokens_need_the_least_limit() -> None:
    assert tokens_for([Call(0.0, 1.0, 0, 0)], 1.5) == Limit(1, 1)


def test_names_that_no_client_can_have_are_left_out() -> None:
    line = (
        '{"time":"2026-11-23T10:00:00Z","message":"request","request_id":"a","status":200,'
        '"route":"/v1/summarize","client":"x\\"}\\ninjected: true"}\n'
    )
    done = suggest("--logs", "-", stdin=line)
    assert done.returncode == 2
    assert done.stderr == ("t5-serve: no calls of any client: nothing to conclude limits from\n")
