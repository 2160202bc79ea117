"""Each view over a day whose answers are written down here, and over lines old, new and doubled."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
import sqlglot

from serve_app.usage.events import SCHEMA_VERSION
from serve_app.usage.reader import Tally, read_files
from serve_app.usage.views import BASE, REPORTS, Usage, question, view_sql
from tests.unit.usage_day import MONDAY, Day

SQL = sorted(Path(__file__).resolve().parents[2].glob("serve_app/usage/sql/*.sql"))
DAY, NEXT = date(2026, 11, 23), date(2026, 11, 24)


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * share
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def read(folder: Path, **options: Any) -> Usage:
    tally = Tally()
    usage = Usage(read_files([folder], tally), **options)
    assert tally.broken_lines == 0
    return usage


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The day as logs lie about: in several files, some compressed, with lines that came twice."""
    folder, day = tmp_path_factory.mktemp("logs"), Day()
    half = len(day.service) // 2
    service = day.service[half:] + day.service[half - 5 : half + 5]
    (folder / "usage-1.jsonl.gz").write_bytes(gzip.compress("\n".join(day.service[:half]).encode()))
    (folder / "usage-2.jsonl").write_text("\n".join(service) + "\n")
    (folder / "access.log").write_text("\n".join(day.nginx) + "\n")
    (folder / "access.log.1").write_text("\n".join(day.nginx[::10]) + "\n")
    return folder


@pytest.fixture(scope="module")
def usage(logs: Path) -> Usage:
    return read(logs)


def at(hour: int, minute: int = 0) -> datetime:
    return MONDAY + timedelta(hours=hour, minutes=minute)


def test_calls_per_client_day(usage: Usage) -> None:
    assert usage.report("calls_per_client_day").rows == [
        # day, client, calls, succeeded, failed, texts
        (DAY, "web-shop", 973, 960, 13, 973),
        (DAY, "nightly", 65, 54, 11, 305),
        (DAY, "-", 17, 0, 17, 17),
        (DAY, "late", 1, 1, 0, 1),
        (NEXT, "late", 1, 1, 0, 1),
    ]


def test_calls_by_weekday_hour(usage: Usage) -> None:
    calls = {2: 60, 3: 10, 4: 3, 5: 4, 6: 5, 7: 2, 8: 1, 12: 130, 23: 1}
    calls |= dict.fromkeys((9, 10, 11, 13, 14, 15, 16), 120)
    rows = [(1, hour, count, 1, float(count)) for hour, count in sorted(calls.items())]
    assert usage.report("calls_by_weekday_hour").rows == [*rows, (2, 0, 1, 1, 1.0)]


def test_success_per_hour(usage: Usage) -> None:
    found = {row[0]: row[1:] for row in usage.report("success_per_hour").rows}
    # calls, succeeded, client errors, server errors, success rate, error rate
    assert found == {
        at(2): (60, 54, 0, 6, 0.9, 0.1),
        at(3): (10, 0, 10, 0, 0.0, 0.0),
        at(4): (3, 0, 2, 1, 0.0, 0.3333),
        at(5): (4, 0, 4, 0, 0.0, 0.0),
        at(6): (5, 0, 5, 0, 0.0, 0.0),
        at(7): (2, 0, 2, 0, 0.0, 0.0),
        at(8): (1, 0, 1, 0, 0.0, 0.0),
        **{at(hour): (120, 120, 0, 0, 1.0, 0.0) for hour in (9, 10, 11, 13, 14, 15, 16)},
        at(12): (130, 120, 10, 0, 0.9231, 0.0),
        at(23): (1, 1, 0, 0, 1.0, 0.0),
        at(24): (1, 1, 0, 0, 1.0, 0.0),
    }


def test_latency(usage: Usage) -> None:
    # Of 1 to 960 the median lies between 480 and 481; the 95th percentile 0.95 of the way from the
    # first to the last, at 1 + 0.95 × 959.
    assert usage.report("latency").rows == [
        # day, route, calls, p50, p95, p99, queue p95, compute p95
        (DAY, "/hf/summarization", 1, 40.0, 40.0, 40.0, 2.0, 5.0),
        (DAY, "/v1/summarize", 960, 480.5, 912.05, 950.41, 2.0, 5.0),
        (DAY, "/v1/summarize/batch", 54, 1000.0, 1000.0, 1000.0, 10.0, 50.0),
        (NEXT, "/hf/summarization", 1, 40.0, 40.0, 40.0, 2.0, 5.0),
    ]


def test_auth_failures(usage: Usage) -> None:
    assert usage.report("auth_failures").rows == [
        (DAY, "nginx", 401, "unauthorized", "192.0.2.7", 7, at(3), at(3)),
        (DAY, "service", 401, "unauthorized", "-", 4, at(5), at(5)),
        (DAY, "nginx", 403, "forbidden", "192.0.2.8", 3, at(3), at(3)),
    ]


def test_throttled_calls(usage: Usage) -> None:
    assert usage.report("throttled_calls").rows == [
        # hour, client, over NGINX's rate, over the service's limits, queue full, all
        (at(2), "nightly", 0, 0, 6, 6),
        (at(12), "web-shop", 10, 0, 0, 10),
    ]


def test_rate_limit_candidates(usage: Usage) -> None:
    # web-shop: 480 minutes with 2 calls, but 12 at noon, and those at 7 and 8 o'clock.
    # nightly: 60 minutes with a call, and one with 5. A call of web-shop or late uses 100 + 20
    # tokens, one of nightly 500 + 100.
    assert usage.report("rate_limit_candidates").rows == [
        # client, calls, active minutes, peak, its minute, p95, the same of tokens, throttled, share
        ("web-shop", 973, 482, 12, at(12), 2.0, 240, 240.0, 10, 0.0103),
        ("nightly", 65, 61, 5, at(6), 1.0, 600, 600.0, 6, 0.0923),
        ("late", 2, 2, 1, at(23, 59), 1.0, 120, 120.0, 0, 0.0),
    ]


def test_top_clients(usage: Usage) -> None:
    rows = usage.report("top_clients").rows
    # client, calls, share, days, success rate
    assert [row[:5] for row in rows] == [
        ("web-shop", 973, 0.9205, 1, 0.9866),
        ("nightly", 65, 0.0615, 1, 0.8308),
        ("-", 17, 0.0161, 1, 0.0),
        ("late", 2, 0.0019, 2, 1.0),
    ]
    assert rows[0][5:] == (at(7), at(16, 59) + timedelta(seconds=1))


def test_cost_per_client_day(usage: Usage) -> None:
    assert usage.report("cost_per_client_day").rows == [
        # day, client, calls, chunks, input, output, cached, compute s, share of the day's 7.505 s
        (DAY, "web-shop", 973, 960, 96_000, 19_200, 0, 4.8, 0.6396),
        (DAY, "nightly", 65, 270, 27_000, 5_400, 0, 2.7, 0.3598),
        (DAY, "late", 1, 1, 100, 20, 0, 0.005, 0.0007),
        (DAY, "-", 17, 0, 0, 0, 0, 0.0, 0.0),
        (NEXT, "late", 1, 1, 100, 20, 0, 0.005, 1.0),
    ]


def test_overview(usage: Usage) -> None:
    took = [*map(float, range(1, 961)), *[1000.0] * 54, 40.0, 40.0]
    [row] = usage.report("overview").records()
    assert row == {
        "first_call": at(2),
        "last_call": at(24) + timedelta(seconds=0.1),
        "calls": 1057,
        "clients": 3,
        "success_rate": 0.9612,  # 1016 of 1057
        "error_rate": 0.0066,  # 7 of 1057
        "auth_failures": 14,
        "throttled": 16,
        "p50_ms": round(percentile(took, 0.5), 2),
        "p95_ms": round(percentile(took, 0.95), 2),
        "p99_ms": round(percentile(took, 0.99), 2),
        "input_tokens": 123_200,
        "output_tokens": 24_640,
        "compute_seconds": 7.51,
        "dropped_events": 0,
    }


def test_the_page_is_a_request_and_no_call(usage: Usage) -> None:
    rows = usage.report("requests").records()
    pages = [row for row in rows if row["route"] == "/"]
    assert len(pages) == 9
    assert not any(row["is_call"] for row in pages)
    # A path nobody serves has no name of its own.
    assert [row["status"] for row in rows if row["route"] == "other"] == [404]


def test_a_request_is_one_row_with_both_its_lines(usage: Usage) -> None:
    rows = usage.report("requests").records()
    assert len(rows) == 1057 + 9 + 1
    [left] = [row for row in rows if row["status"] == 499]
    assert (left["source"], left["error_type"], left["address"]) == (
        "service",
        "client-closed",
        "192.0.2.1",
    )
    assert left["total_ms"] == 3.0  # the service's, not NGINX's 2.5 s
    assert {row["source"] for row in rows if row["status"] in (413, 429)} == {"nginx"}


def test_one_id_for_all_calls_hides_none_of_them(tmp_path: Path) -> None:
    day = Day()
    served = [json.loads(line) for line in day.service if '"web-shop"' in line][3:6]
    edge = [json.loads(line) for line in day.nginx if '"web-shop"' in line][3:6]
    assert [one["request_id"] for one in served] == [one["request_id"] for one in edge]
    for line in (*served, *edge):
        line["request_id"] = "always"
    (tmp_path / "lines.log").write_text(
        "".join(json.dumps(line) + "\n" for line in (*served, *edge, *served))
    )
    rows = read(tmp_path).report("requests").records()
    assert [row["total_ms"] for row in sorted(rows, key=lambda row: row["time"])] == [
        1.0,
        8.0,
        15.0,
    ]
    assert {(row["source"], row["address"]) for row in rows} == {("service", "192.0.2.1")}


def test_a_period_and_a_client(logs: Path) -> None:
    def calls(**options: Any) -> list[tuple[Any, ...]]:
        return [row[:3] for row in read(logs, **options).report("calls_per_client_day").rows]

    assert calls(since=at(12), until=at(13)) == [(DAY, "web-shop", 130)]
    assert calls(client="nightly") == [(DAY, "nightly", 65)]
    assert calls(since=at(24)) == [(NEXT, "late", 1)]
    assert calls(client="nobody") == []


def test_nothing_gives_empty_reports(tmp_path: Path) -> None:
    (tmp_path / "usage-1.jsonl").write_text("")
    usage = read(tmp_path)
    assert {name: usage.report(name).rows for name in REPORTS} == {name: [] for name in REPORTS}


# Lines of other versions


def test_yesterdays_lines_are_read(tmp_path: Path) -> None:
    # As releases before the usage events logged a request.
    old = {
        "time": "2026-11-22T10:00:00+0000",
        "severity": "INFO",
        "logger": "serve_app.api.middleware",
        "message": "request",
        "method": "POST",
        "route": "/v1/summarize",
        "client": "shop",
    }
    good = {
        **old, "status": 200, "duration_ms": 12.5, "characters": 90, "input_tokens": 30,
        "output_tokens": 10, "chunks": 1, "truncated": 1, "request_id": "a",
    }  # fmt: skip
    bad = {**old, "status": 503, "duration_ms": 1, "problem": "overloaded", "fields": []}
    lines = [good, {**bad, "request_id": "b"}]
    (tmp_path / "ray.log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read(tmp_path).report("requests").records()
    seen = {row["request_id"]: row for row in rows}
    assert [seen[one]["schema_version"] for one in "ab"] == [0, 0]
    assert [seen[one]["total_ms"] for one in "ab"] == [12.5, 1.0]
    assert (seen["a"]["succeeded"], seen["a"]["truncated"]) == (True, 1)
    assert seen["b"]["error_type"] == "overloaded"
    assert seen["a"]["compute_ms"] is None
    assert seen["a"]["time"] == datetime(2026, 11, 22, 10, tzinfo=UTC)


# Recorded from the releases that wrote them: the same eight calls.
RECORDED = Path(__file__).with_name("usage_lines")


def recorded(version: int) -> list[dict[str, Any]]:
    lines = (RECORDED / f"version-{version}.jsonl").read_text().splitlines()
    assert {json.loads(line).get("schema_version", 0) for line in lines} == {version}
    return [json.loads(line) for line in lines]


def test_the_last_recorded_version_is_todays() -> None:
    versions = sorted(int(path.stem.partition("-")[2]) for path in RECORDED.iterdir())
    assert versions == list(range(SCHEMA_VERSION + 1))


@pytest.mark.parametrize("version", range(SCHEMA_VERSION + 1))
def test_recorded_lines_of_each_version_give_the_same_answers(version: int, tmp_path: Path) -> None:
    lines = recorded(version)
    (tmp_path / "lines.log").write_text("".join(json.dumps(line) + "\n" for line in lines))
    usage = read(tmp_path)
    [day] = {date.fromisoformat(line["time"][:10]) for line in lines}
    assert usage.report("calls_per_client_day").rows == [
        # day, client, calls, succeeded, failed, texts. A batch of 2.
        (day, "shop", 4, 3, 1, 4),
        (day, "job", 3, 2, 1, 4),
        (day, "-", 1, 0, 1, 1),
    ]
    rows = {row["request_id"]: row for row in usage.report("requests").records()}
    assert [rows[f"old-{number}"]["error_type"] for number in range(1, 9)] == [
        None, None, None, None, None, "invalid", "unauthorized", "deadline",
    ]  # fmt: skip
    # The failed call's cost is known since version 2.
    late = rows["old-8"]
    assert (late["input_tokens"], bool(late["compute_ms"])) == (
        (None, False) if version < 2 else (40, True)
    )
    assert all(row["total_ms"] > 0 for row in rows.values())
    [overview] = usage.report("overview").records()
    good = (40, 549, 96, 81, 40)
    assert overview["input_tokens"] == sum(good) + (40 if version >= 2 else 0)
    assert sum(row["truncated"] or 0 for row in rows.values()) == 1
    for name in REPORTS:
        assert (usage.report(name).rows == []) == (name == "throttled_calls"), name


def test_a_linked_dataset_gives_what_the_sink_gives() -> None:
    """The table of Observability Analytics, in the columns that its schema has."""
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'; CREATE SCHEMA request_logs; CREATE SCHEMA t5_requests")
    db.execute(
        "CREATE TABLE request_logs._AllLogs (timestamp TIMESTAMPTZ, severity VARCHAR, "
        "insert_id VARCHAR, log_name VARCHAR, resource STRUCT(type VARCHAR, labels JSON), "
        "text_payload VARCHAR, json_payload JSON)"
    )
    day = Day()
    for number, text in enumerate([*day.service, *day.nginx]):
        payload = json.loads(text)
        # Special fields leave the payload.
        row = [payload.pop("time"), payload.pop("severity"), str(number), "stdout"]
        db.execute(
            "INSERT INTO request_logs._AllLogs VALUES (?, ?, ?, ?, "
            "{'type': 'k8s_container', 'labels': '{}'}, NULL, ?)",
            [*row, json.dumps(payload)],
        )
    db.execute(
        "INSERT INTO request_logs._AllLogs "
        "VALUES (now(), 'INFO', 'x', 'stdout', NULL, 'text', NULL)"
    )
    for name in (*BASE, *REPORTS):
        text = view_sql(name, source="request_logs")
        [statement] = sqlglot.transpile(text, read="bigquery", write="duckdb")
        db.execute(statement)
    [calls] = db.execute("SELECT calls, input_tokens FROM t5_requests.overview").fetchall()
    assert calls == (1057, 123_200)
    found = db.execute("SELECT client, calls FROM t5_requests.top_clients").fetchall()
    assert found == [("web-shop", 973), ("nightly", 65), ("-", 17), ("late", 2)]


def test_tomorrows_lines_are_read(tmp_path: Path) -> None:
    line = json.loads(Day().service[1])
    line |= {"schema_version": 99, "new_field": {"deep": [1]}, "another": "x"}
    (tmp_path / "usage-1.jsonl").write_text(json.dumps(line) + "\n")
    [row] = read(tmp_path).report("requests").records()
    assert (row["schema_version"], row["client"], row["input_tokens"]) == (99, "nightly", 500)


def test_a_field_of_another_type_is_unknown_and_spoils_nothing(tmp_path: Path) -> None:
    line = json.loads(Day().service[1])
    line |= {"status": "often", "input_tokens": "many", "stream": "perhaps", "total_ms": True}
    (tmp_path / "usage-1.jsonl").write_text(json.dumps(line) + "\n")
    usage = read(tmp_path)
    [row] = usage.report("requests").records()
    assert (row["status"], row["input_tokens"], row["stream"]) == (None, None, None)
    for name in REPORTS:
        usage.report(name)


def test_drops_are_summed(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in Day().service[1:3]]
    lines[0]["dropped_events"], lines[1]["dropped_events"] = 3, 4
    (tmp_path / "usage-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [row] = read(tmp_path).report("overview").records()
    assert row["dropped_events"] == 7


def test_no_field_has_two_types_in_the_one_table_of_both_logs() -> None:
    day = Day()
    kinds: dict[str, set[type]] = {}
    for line in [*day.service, *day.nginx]:
        for name, value in json.loads(line).items():
            kind = float if isinstance(value, int) and not isinstance(value, bool) else type(value)
            kinds.setdefault(name, set()).add(kind)
    assert {name: held for name, held in kinds.items() if len(held) > 1} == {}


# The files themselves


@pytest.mark.parametrize("file", SQL, ids=lambda path: path.stem)
def test_a_view_is_one_bigquery_statement_of_its_files_name(file: Path) -> None:
    [statement] = sqlglot.parse(file.read_text(), read="bigquery")
    assert isinstance(statement, sqlglot.exp.Create)
    assert statement.kind == "VIEW"
    assert statement.this.sql(dialect="bigquery") == f"t5_requests.{file.stem}"
    read_from = {
        table.sql(dialect="bigquery")
        for table in statement.expression.find_all(sqlglot.exp.Table)
        if table.db
    }
    known = {"events": "stdout", "requests": "events"}
    assert read_from == {f"t5_requests.{known.get(file.stem, 'requests')}"}


def test_every_view_has_a_test_here() -> None:
    assert sorted(path.stem for path in SQL) == sorted([*BASE, *REPORTS])
    for name in REPORTS:
        assert f"test_{name}" in globals()
        assert question(name).endswith(("?", "."))


def test_the_docs_have_a_command_and_a_query_for_each_report() -> None:
    text = (SQL[0].parents[3] / "docs" / "usage.md").read_text()
    for name in REPORTS:
        command = "t5-serve usage" + f" {name.replace('_', '-')}" * (name != "overview")
        assert f"| `{command}` | `SELECT * FROM t5_requests.{name}` |" in text, name


def test_a_dataset_of_another_name() -> None:
    text = view_sql("overview", "my-project.logs")
    assert "t5_requests" not in text
    [statement] = sqlglot.parse(text, read="bigquery")
    assert "`my-project`.logs.overview" in statement.sql(dialect="bigquery") or (
        "`my-project.logs.overview`" in statement.sql(dialect="bigquery")
    )
