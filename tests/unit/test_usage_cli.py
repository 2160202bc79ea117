"""`t5-serve usage` as a user has it: a process, its output, its errors in one line."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sqlglot

from serve_app.usage.text import shown, table_text
from serve_app.usage.views import BASE, REPORTS, Table
from tests.unit.usage_day import Day

ROOT = Path(__file__).resolve().parents[2]
NAMES = [name.replace("_", "-") for name in REPORTS]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, day = tmp_path_factory.mktemp("usage"), Day()
    (folder / "usage-1.jsonl").write_text("\n".join(day.service) + "\n")
    (folder / "access.log.gz").write_bytes(gzip.compress("\n".join(day.nginx).encode()))
    return folder


def usage(
    *arguments: str | Path, folder: Path | None = None, stdin: bytes = b""
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "T5_SERVE_USAGE_FOLDER": "/nonexistent"}
    if folder is not None:
        environment["T5_SERVE_USAGE_FOLDER"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.cli.main", "usage", *map(str, arguments)],
        env=environment,
        input=stdin,
        capture_output=True,
        timeout=120,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def rows(*arguments: str | Path, **options: Any) -> list[dict[str, Any]]:
    done = usage(*arguments, "--json", **options)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def refused(*arguments: str | Path, **options: Any) -> str:
    done = usage(*arguments, **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("t5-serve: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_without_a_name_it_is_the_overview_of_the_services_own_folder(logs: Path) -> None:
    done = usage(folder=logs)
    assert (done.returncode, done.stderr) == (0, "")
    told = dict(re.split(r"\s{2,}", line) for line in done.stdout.splitlines())
    assert told["calls"] == "1,057"
    assert told["input_tokens"] == "123,200"
    assert told["first_call"] == "2026-11-23 02:00"
    assert usage("overview", "--logs", logs).stdout == done.stdout


def test_a_report_is_a_table(logs: Path) -> None:
    lines = usage("calls-per-client-day", "--logs", logs).stdout.splitlines()
    assert lines[0].split() == ["day", "client", "calls", "succeeded", "failed", "texts"]
    assert lines[1].split() == ["2026-11-23", "web-shop", "973", "960", "13", "973"]
    assert len(lines) == 6
    # Numbers are aligned on the right.
    ends = {line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines}
    assert len(ends) == 1


def test_json_has_the_rows_with_times_in_rfc_3339(logs: Path) -> None:
    [throttled, over] = rows("throttled-calls", "--logs", logs)
    assert throttled == {
        "hour": "2026-11-23T02:00:00Z",
        "client": "nightly",
        "over_rate": 0,
        "over_limits": 0,
        "queue_full": 6,
        "calls": 6,
    }
    assert over["client"] == "web-shop"
    assert rows("cost-per-client-day", "--logs", logs)[0]["day"] == "2026-11-23"


def test_files_folders_and_stdin_are_read_together(logs: Path) -> None:
    [both] = rows("--logs", logs / "usage-1.jsonl", "--logs", logs / "access.log.gz")
    [piped] = rows(
        "--logs", "-", "--logs", logs / "usage-1.jsonl", stdin=(logs / "access.log.gz").read_bytes()
    )
    [service] = rows("--logs", logs / "usage-1.jsonl")
    assert both == piped
    assert (both["calls"], service["calls"]) == (1057, 1057 - 10 - 10 - 2 - 1)


def test_a_period_and_a_client(logs: Path) -> None:
    given = ("--logs", logs, "--since", "2026-11-23T12:00", "--until", "2026-11-23T13:00+00:00")
    assert rows(*given)[0]["calls"] == 130
    assert rows("--logs", logs, "--client", "nightly")[0]["calls"] == 65
    assert rows("--logs", logs, "--until", "2026-11-23") == []
    assert "nothing to show" in usage("--logs", logs, "--client", "nobody").stdout


def test_an_age_counts_from_now(tmp_path: Path) -> None:
    def line(age: timedelta) -> str:
        time = (datetime.now(UTC) - age).isoformat()
        event = {"time": time, "message": "request", "request_id": time, "route": "/v1/summarize"}
        return json.dumps({**event, "status": 200, "client": str(age.days)}) + "\n"

    ages = [timedelta(hours=1), timedelta(days=2), timedelta(days=9)]
    (tmp_path / "usage-1.jsonl").write_text("".join(map(line, ages)))
    for since, calls in (("90m", 1), ("3d", 2), ("1w", 2), ("2w", 3)):
        assert rows("--logs", tmp_path, "--since", since)[0]["calls"] == calls


def test_broken_lines_are_told_and_the_rest_is_counted(logs: Path, tmp_path: Path) -> None:
    broken = tmp_path / "usage-2.jsonl"
    broken.write_bytes(b'{"time": "2026\n\xff\xfe{\n{"a\n')
    done = usage("--logs", logs, "--logs", broken)
    assert done.returncode == 0
    assert re.search(r"calls +1,057\n", done.stdout)
    assert "2 lines could not be read" in done.stderr
    assert f"{broken}:1: not JSON; {broken}:3: not JSON" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_page_holds_all_reports_and_fetches_nothing(logs: Path, tmp_path: Path) -> None:
    hostile = {"time": "2026-11-23T10:00:00Z", "message": "request", "request_id": "evil"}
    hostile |= {"client": "<script>alert(1)</script>", "route": "/v1/x", "status": "200"}
    (tmp_path / "usage-3.jsonl").write_text(json.dumps(hostile) + "\n")
    page = tmp_path / "report.html"
    done = usage("--logs", logs, "--logs", tmp_path, "--html", page)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = page.read_text()
    for name in REPORTS:
        assert f"<h2>{name.replace('_', ' ')}</h2>" in text

    tags: list[str] = []
    values: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            values.extend(value or "" for name, value in attrs if name in ("href", "src", "style"))

    Parser().feed(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    assert values == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert "default-src 'none'" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    charts = [ET.fromstring(one) for one in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(charts) == 8
    titles = {one.text for chart in charts for one in chart.iter("title")}
    assert "2026-11-23: 973 web-shop" in titles
    assert "Mon 12:00: 130" in titles
    assert "2026-11-23 02:00: 6 server errors" in titles
    assert "web-shop: 4.8 s" in titles
    columns = [one for one in charts[0].iter("rect") if "973 web-shop" in (one[0].text or "")]
    others = [one for one in charts[0].iter("rect") if "65 nightly" in (one[0].text or "")]
    heights = [float(one.attrib["height"]) for one in (*columns, *others)]
    assert heights[0] / heights[1] == pytest.approx(973 / 65, rel=0.01)


def test_an_empty_page(tmp_path: Path) -> None:
    (tmp_path / "usage-1.jsonl").write_text("")
    page = tmp_path / "report.html"
    assert usage("--logs", tmp_path, "--html", page).returncode == 0
    assert page.read_text().count("nothing to show") == len(REPORTS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--logs", "/nonexistent/x"], "/nonexistent/x: no such file or folder"),
        ([], "there is no usage yet"),
        (["bogus"], "bogus"),
        (["latency", "--since", "yesterday"], "'yesterday' is neither a date"),
        (["--since", "99999999w", "--logs", "-"], "neither a date"),
        (["--json", "--html", "x", "--logs", "-"], "not both"),
        (["--html", "/nonexistent/x.html", "--logs", "-"], "/nonexistent/x.html: No such file"),
        (["sql", "--dataset", "x; DROP"], "--dataset: must be NAME or PROJECT.NAME"),
        (["sql", "--source", "a`b"], "--source: must be NAME or PROJECT.NAME, is 'a`b'"),
    ],
)
def test_errors_are_one_line(arguments: list[str], said: str) -> None:
    assert said in refused(*arguments)


def test_without_the_extra_it_says_what_to_install(logs: Path) -> None:
    code = (
        "import sys; sys.modules['duckdb'] = None; sys.argv = ['t5-serve', 'usage', '--logs', "
        f"{str(logs)!r}]; from serve_app.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "t5-serve: reports need DuckDB and sqlglot: pip install 't5-serve[usage]'\n"
    )


def test_help_lists_the_reports_and_each_has_an_example() -> None:
    listed = usage("--help").stdout
    for name in [*NAMES, "sql", "tail"]:
        assert re.search(rf"^  {name} ", listed, re.MULTILINE), name
    for name in ("latency", "sql", "tail"):
        assert f"t5-serve usage {name}" in usage(name, "--help").stdout


def test_sql_is_what_bigquery_takes() -> None:
    done = usage("sql", "--dataset", "my-project.logs")
    statements = sqlglot.parse(done.stdout, read="bigquery")
    assert len([one for one in statements if one is not None]) == len(BASE) + len(REPORTS)
    assert "t5_requests" not in done.stdout
    # Each view after those it reads.
    assert done.stdout.index("logs.events`") < done.stdout.index("logs.requests`")


def test_sql_of_a_linked_dataset_names_it_once_and_no_table_of_a_sink() -> None:
    said = usage("sql", "--source", "my-project.request_logs").stdout
    assert said.count("`my-project.request_logs._AllLogs`") == 1
    assert "stdout" not in said
    assert len([one for one in sqlglot.parse(said, read="bigquery") if one]) == 12


def test_nothing_from_a_line_steers_the_terminal() -> None:
    table = Table("x", ["client", "calls"], [("\x1b[2Jevil\r\n", 1)])
    assert "\x1b" not in table_text(table)
    assert table_text(table).count("\n") == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.5, "0.5"),
        (2.0, "2"),
        (0.0, "0"),
        (1234.56789, "1,234.5679"),
        (datetime(2026, 11, 23, 9, 5, 7, tzinfo=UTC), "2026-11-23 09:05:07"),
    ],
)
def test_values_as_people_read_them(value: Any, expected: str) -> None:
    assert shown(value) == expected
