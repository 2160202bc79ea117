"""Each report on a day of real traffic is what its clients saw, counted here without SQL."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from serve_app.usage.reader import Tally, read_files
from serve_app.usage.views import REPORTS, Usage
from tests.integration.conftest import Deploy, until
from tests.integration.usage_traffic import (
    MONDAY,
    SETTINGS,
    Day,
    Seen,
    edge,
    logged,
    shipped,
)

Lines = dict[str, dict[str, Any]]
EDGE_ONLY = {401, 403, 413}


class Facts:
    """The day as seen, and its lines by request id."""

    def __init__(self, day: Day, events: list[Any], access: list[Any], usage: Usage) -> None:
        self.seen = day.seen
        self.events: Lines = {line["request_id"]: line for line in events}
        self.access: Lines = {line["request_id"]: line for line in access}
        self.lines = (len(events), len(access))
        self.usage = usage
        self.calls = [seen for seen in day.seen.values() if seen.path != "/"]

    def took_ms(self, call: Seen) -> float:
        if call.request_id in self.events:
            return float(self.events[call.request_id]["total_ms"])
        return float(self.access[call.request_id]["duration_s"]) * 1e3

    def used(self, call: Seen, name: str) -> float:
        """As its answer says; of a call without one, and of times, as its event says."""
        if call.usage and not name.endswith("_ms"):
            return sum(one[name] for one in call.usage)
        return self.events.get(call.request_id, {}).get(name, 0)


@pytest.fixture(scope="module")
def facts(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    folder = tmp_path_factory.mktemp("day")
    service = deploy("day", "/day", usage={"folder": str(folder / "usage")}, **SETTINGS)
    (folder / "nginx").mkdir()
    with edge(service, folder / "nginx") as (url, log):
        day = Day(url, service)
        passed_on = [one for one in day.seen.values() if not at_edge(one)]
        events: list[Any] = []

        def all_there() -> bool:
            events.extend(shipped(folder / "usage"))
            return len(events) >= len(passed_on)

        until(all_there, "every request's event was written")
        until(lambda: len(logged(log)) >= len(day.seen), "every request's access line was written")
        access = logged(log)
    lines = folder / "lines.log"
    with lines.open("w") as file:
        for line in (*events, *access):
            moment = day.seen[line["request_id"]].at.isoformat()
            file.write(json.dumps({**line, "time": moment}) + "\n")
    return Facts(day, events, access, Usage(read_files([lines], Tally())))


def at_edge(call: Seen) -> bool:
    return call.status in EDGE_ONLY or (call.status == 429 and call.client == "bursty")


def same(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    """Equal, but for the rounding of floating point to the places that a view shows."""
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert row == tuple(
            pytest.approx(value, abs=0.006) if isinstance(value, float) else value
            for value in wanted
        )


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    at = (len(ordered) - 1) * share
    low, high = math.floor(at), math.ceil(at)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def minute(at: datetime) -> datetime:
    return at.replace(second=0, microsecond=0)


def name(call: Seen) -> str:
    return call.client or "-"


def test_every_request_has_its_lines_once(facts: Facts) -> None:
    assert facts.lines == (len(facts.events), len(facts.access))
    assert set(facts.access) == set(facts.seen)
    assert set(facts.events) == {id_ for id_, one in facts.seen.items() if not at_edge(one)}


def test_events_have_the_times_of_the_answers(facts: Facts) -> None:
    answered = [call for call in facts.calls if call.usage]
    assert len(answered) > 10
    for call in answered:
        for kind in ("queue_ms", "compute_ms"):
            told = sum(one[kind] for one in call.usage)
            assert facts.used(call, kind) == pytest.approx(told, abs=0.02)  # rounded, each


def test_calls_per_client_day(facts: Facts) -> None:
    groups: dict[tuple[date, str], list[Seen]] = defaultdict(list)
    for call in facts.calls:
        groups[call.at.date(), name(call)].append(call)
    rows = []
    for (day, client), calls in groups.items():
        good = sum(call.kind is None for call in calls)
        texts = sum(
            call.texts if facts.events.get(call.request_id, {}).get("texts") else 1
            for call in calls
        )
        rows.append((day, client, len(calls), good, len(calls) - good, texts))
    rows.sort(key=lambda row: (row[0], -row[2], row[1]))
    same(facts.usage.report("calls_per_client_day").rows, rows)
    assert sum(row[2] for row in rows) == len(facts.calls)


def test_calls_by_weekday_hour(facts: Facts) -> None:
    hours = Counter(call.at.hour for call in facts.calls)
    rows = [(1, hour, count, 1, float(count)) for hour, count in sorted(hours.items())]
    same(facts.usage.report("calls_by_weekday_hour").rows, rows)
    assert len(rows) > 10


def test_success_per_hour(facts: Facts) -> None:
    rows = []
    hours: dict[datetime, list[Seen]] = defaultdict(list)
    for call in facts.calls:
        hours[call.at.replace(minute=0, second=0, microsecond=0)].append(call)
    for hour, calls in sorted(hours.items()):
        good = sum(call.kind is None for call in calls)
        bad = sum(call.status >= 500 for call in calls)
        rest = len(calls) - good - bad
        shares = (round(good / len(calls), 4), round(bad / len(calls), 4))
        rows.append((hour, len(calls), good, rest, bad, *shares))
    same(facts.usage.report("success_per_hour").rows, rows)
    assert sum(row[4] for row in rows) == 1  # the full queue


def test_latency(facts: Facts) -> None:
    rows = []
    for path in sorted({call.path for call in facts.calls}):
        calls = [call for call in facts.calls if call.path == path and call.kind is None]
        took = [facts.took_ms(call) for call in calls]
        queued = [facts.used(call, "queue_ms") for call in calls]
        computed = [facts.used(call, "compute_ms") for call in calls]
        rows.append(
            (
                MONDAY.date(), path, len(calls),
                *(percentile(took, share) for share in (0.5, 0.95, 0.99)),
                percentile(queued, 0.95), percentile(computed, 0.95),
            )
        )  # fmt: skip
    same(facts.usage.report("latency").rows, rows)


def test_auth_failures(facts: Facts) -> None:
    at = [call.at for call in facts.calls if call.status in (401, 403)]
    assert len(set(at)) == 1
    rows = [
        (MONDAY.date(), "nginx", 401, "unauthorized", "127.0.0.1", 3, at[0], at[0]),
        (MONDAY.date(), "nginx", 403, "forbidden", "127.0.0.1", 2, at[0], at[0]),
    ]
    same(facts.usage.report("auth_failures").rows, rows)


def test_throttled_calls(facts: Facts) -> None:
    offences = sum(call.kind == "rate-limited" for call in facts.calls if call.client == "offender")
    assert offences
    found = facts.usage.report("throttled_calls").records()
    assert [
        (row["hour"].hour, row["client"], row["over_rate"], row["over_limits"], row["queue_full"])
        for row in found
    ] == [(6, "bursty", 2, 0, 0), (7, "offender", 0, offences, 0), (18, "nightly", 0, 0, 1)]


def test_rate_limit_candidates(facts: Facts) -> None:
    rows = []
    for client in {call.client for call in facts.calls if call.client}:
        calls = [call for call in facts.calls if call.client == client]
        counts = Counter(minute(call.at) for call in calls)
        tokens: Counter[datetime] = Counter()
        for call in calls:
            for kind in ("input_tokens", "output_tokens"):
                tokens[minute(call.at)] += int(facts.used(call, kind))
        refused = sum(call.kind in ("rate-limited", "overloaded") for call in calls)
        rows.append(
            (
                client, len(calls), len(counts), max(counts.values()),
                min(at for at, count in counts.items() if count == max(counts.values())),
                percentile(list(map(float, counts.values())), 0.95),
                max(tokens.values()),
                percentile([float(tokens[at]) for at in counts], 0.95),
                refused, round(refused / len(calls), 4),
            )
        )  # fmt: skip
    rows.sort(key=lambda row: (-row[3], row[0]))
    found = facts.usage.report("rate_limit_candidates").rows
    assert len(found) == len(rows)
    for row, wanted in zip(found, rows, strict=True):
        # To one place.
        assert row == tuple(
            pytest.approx(one, abs=0.051) if isinstance(one, float) else one for one in wanted
        )


def test_top_clients(facts: Facts) -> None:
    rows = []
    for client in {name(call) for call in facts.calls}:
        calls = [call for call in facts.calls if name(call) == client]
        good = sum(call.kind is None for call in calls)
        moments = [call.at for call in calls]
        shares = round(len(calls) / len(facts.calls), 4), 1, round(good / len(calls), 4)
        rows.append((client, len(calls), *shares, min(moments), max(moments)))
    rows.sort(key=lambda row: (-row[1], row[0]))
    same(facts.usage.report("top_clients").rows, rows)


def test_cost_per_client_day(facts: Facts) -> None:
    rows = []
    whole = sum(facts.used(call, "compute_ms") for call in facts.calls) / 1e3
    for client in {name(call) for call in facts.calls}:
        calls = [call for call in facts.calls if name(call) == client]
        tokens = [
            sum(int(facts.used(call, kind)) for call in calls)
            for kind in ("chunks", "input_tokens", "output_tokens")
        ]
        seconds = sum(facts.used(call, "compute_ms") for call in calls) / 1e3
        rows.append(
            (MONDAY.date(), client, len(calls), *tokens, 0, round(seconds, 3), seconds / whole)
        )
    rows.sort(key=lambda row: (-row[7], row[1]))
    same(facts.usage.report("cost_per_client_day").rows, rows)


def test_failed_calls_have_cost_what_they_used(facts: Facts) -> None:
    asked = {
        call.usage[0]["input_tokens"]
        for call in facts.calls
        if call.client == "web-shop" and call.usage
    }
    [tokens] = asked  # the same text in all of them
    late = [
        facts.events[call.request_id]
        for call in facts.calls
        if call.kind == "deadline" and call.client == "nightly"
    ]
    # It ran until its deadline.
    assert [event["input_tokens"] for event in late] == [tokens]
    [ran] = [event for event in late if event["input_tokens"]]
    assert ran["output_tokens"] > 0
    assert ran["compute_ms"] > 1000
    for event in late:
        assert event["asked_tokens"] == tokens
        if event is not ran:
            assert (event["output_tokens"], event["compute_ms"]) == (0, 0)
            assert event["queue_ms"] > 1000
    [left] = [facts.events[call.request_id] for call in facts.calls if call.kind == "client-closed"]
    assert (left["input_tokens"], left["error_type"]) == (tokens, "client-closed")
    assert left["output_tokens"] > 0
    assert left["compute_ms"] > 0


def test_overview(facts: Facts) -> None:
    took = [facts.took_ms(call) for call in facts.calls if call.kind is None]
    [row] = facts.usage.report("overview").records()
    calls = facts.calls
    expected = {
        "first_call": min(call.at for call in calls),
        "last_call": max(call.at for call in calls),
        "calls": len(calls),
        "clients": len({call.client for call in calls} - {None}),
        "success_rate": round(len(took) / len(calls), 4),
        "error_rate": round(1 / len(calls), 4),
        "auth_failures": 5,
        "throttled": sum(call.kind in ("rate-limited", "overloaded") for call in calls),
        "p50_ms": pytest.approx(percentile(took, 0.5), abs=0.006),
        "p95_ms": pytest.approx(percentile(took, 0.95), abs=0.006),
        "p99_ms": pytest.approx(percentile(took, 0.99), abs=0.006),
        "input_tokens": sum(int(facts.used(call, "input_tokens")) for call in calls),
        "output_tokens": sum(int(facts.used(call, "output_tokens")) for call in calls),
        "compute_seconds": pytest.approx(
            sum(facts.used(call, "compute_ms") for call in calls) / 1e3, abs=0.002
        ),
        "dropped_events": 0,
    }
    assert row == expected


def test_no_report_is_left_out_here() -> None:
    assert all(f"test_{report}" in globals() for report in REPORTS)


def test_nothing_of_a_text_is_in_any_line(facts: Facts, tmp_path: Path) -> None:
    lines = json.dumps([*facts.events.values(), *facts.access.values()])
    assert "t5s_" not in lines
    assert "summary" not in lines.replace("/hf/summarization", "")
