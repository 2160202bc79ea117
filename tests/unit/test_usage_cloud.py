"""Usage events to Cloud Logging: a local server speaks the API, by the library's own messages."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import grpc
import pytest
import sqlglot
from click.testing import CliRunner
from google.cloud.logging_v2.services.logging_service_v2 import LoggingServiceV2Client
from google.cloud.logging_v2.services.logging_service_v2.transports import (
    LoggingServiceV2GrpcTransport,
)
from google.cloud.logging_v2.types import (
    LogEntry,
    WriteLogEntriesRequest,
    WriteLogEntriesResponse,
)
from google.logging.type.log_severity_pb2 import LogSeverity
from google.protobuf.json_format import MessageToDict

from serve_app.cli.main import cli
from serve_app.usage import cloud
from serve_app.usage.cloud import CloudLogging, CloudLoggingError, severity
from serve_app.usage.events import usage_event
from serve_app.usage.tail import Tail
from serve_app.usage.views import view_sql
from serve_app.usage.writer import UsageWriter

BEGAN = datetime(2026, 11, 23, 9, tzinfo=UTC)
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Api:
    """google.logging.v2.LoggingServiceV2 on a port of this machine.

    `answers` are the next requests' status codes, OK after them. What is taken with another code is
    kept all the same if `lost_answers`: as when an answer gets lost on its way.
    """

    def __init__(self, port: int = 0) -> None:
        self.requests: list[WriteLogEntriesRequest] = []
        self.calls = 0
        self.answers: list[grpc.StatusCode] = []
        self.lost_answers = False
        self._server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        write = grpc.unary_unary_rpc_method_handler(
            self._write, WriteLogEntriesRequest.deserialize, WriteLogEntriesResponse.serialize
        )
        handlers = {"WriteLogEntries": write}
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("google.logging.v2.LoggingServiceV2", handlers)]
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    @property
    def entries(self) -> list[LogEntry]:
        return [one for request in self.requests for one in request.entries]

    @property
    def kept(self) -> dict[tuple[Any, str], LogEntry]:
        """As Cloud Logging keeps them: of entries equal in log, time and insertId, one."""
        return {(one.timestamp, one.insert_id): one for one in self.entries}

    def _write(
        self, request: WriteLogEntriesRequest, context: grpc.ServicerContext
    ) -> WriteLogEntriesResponse:
        self.calls += 1
        code = self.answers.pop(0) if self.answers else grpc.StatusCode.OK
        if code is grpc.StatusCode.OK or self.lost_answers:
            self.requests.append(request)
        if code is not grpc.StatusCode.OK:
            context.abort(code, "as the test says")
        return WriteLogEntriesResponse()


@pytest.fixture
def api() -> Iterator[Api]:
    served = Api()
    yield served
    served.stop()


def client(port: int) -> LoggingServiceV2Client:
    # A channel that tries again soon: its own waiting doubles up to two minutes.
    options = [("grpc.max_reconnect_backoff_ms", 200), ("grpc.min_reconnect_backoff_ms", 100)]
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
    return LoggingServiceV2Client(transport=LoggingServiceV2GrpcTransport(channel=channel))


class Sender:
    """A tail of a folder to an API, and what it said."""

    def __init__(self, folder: Path, port: int, *, follow: bool = False) -> None:
        self.said: list[str] = []
        self.stop = threading.Event()
        stop = self.stop if follow else None
        out = CloudLogging(client(port), "a-project", "t5-requests", stop, self.said.append)
        self.tail = Tail(folder, out)


def event(number: int, status: int = 200, **facts: Any) -> dict[str, Any]:
    return usage_event(
        request_id=f"r-{number}",
        traceparent=f"00-{TRACE}-00f067aa0ba902b7-01",
        method="POST",
        route="/v1/summarize",
        status=status,
        total_ms=12.5,
        request_bytes=10,
        response_bytes=20,
        facts={"client": "shop", **facts},
        now=BEGAN + timedelta(seconds=number),
    )


def write(folder: Path, *events: dict[str, Any]) -> None:
    writer = UsageWriter(folder, max_bytes=1 << 20, keep=16, queue_size=10_000)
    for one in events:
        writer.record(one)
    writer.close()


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def test_an_event_is_an_entry(api: Api, tmp_path: Path) -> None:
    write(tmp_path, event(1, input_tokens=40, error_fields=["text"], stream=False))
    Sender(tmp_path, api.port).tail.drain()
    [request] = api.requests
    assert request.log_name == "projects/a-project/logs/t5-requests"
    assert request.resource.type == "global"
    [entry] = request.entries
    assert entry.timestamp == BEGAN + timedelta(seconds=1)
    assert LogSeverity.Name(entry.severity) == "INFO"
    assert entry.trace == f"projects/a-project/traces/{TRACE}"
    payload = MessageToDict(LogEntry.pb(entry).json_payload)
    wanted = event(1, input_tokens=40, error_fields=["text"], stream=False)
    del wanted["time"], wanted["severity"]
    assert payload == wanted


@pytest.mark.parametrize(
    ("status", "error", "wanted"),
    [
        (200, None, "INFO"),
        (200, "client-closed", "INFO"),
        (200, "deadline", "ERROR"),
        (404, "not-found", "WARNING"),
        (429, "overloaded", "WARNING"),
        (499, None, "WARNING"),
        (500, "internal", "ERROR"),
        (503, "overloaded", "ERROR"),
    ],
)
def test_the_severity_follows_from_the_answer(status: int, error: str | None, wanted: str) -> None:
    assert severity({"status": status, "error_type": error}) == wanted


def test_every_event_arrives_though_the_api_is_away_for_a_while(tmp_path: Path) -> None:
    first = Api()
    port = first.port
    sender = Sender(tmp_path, port, follow=True)
    following = threading.Thread(target=sender.tail.follow, args=[sender.stop])
    following.start()
    write(tmp_path, *map(event, range(5)))
    until(lambda: len(first.kept) == 5, "the first events arrived")
    first.stop()
    write(tmp_path, *map(event, range(5, 1205)))
    until(lambda: any("events wait" in said for said in sender.said), "the outage was told")
    assert following.is_alive()
    second = Api(port)
    try:
        # It comes back badly: takes entries without the sender getting to know.
        second.answers = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED]
        second.lost_answers = True
        until(lambda: len(second.kept) == 1200, "the later events arrived")
        sender.stop.set()
        following.join(60)
    finally:
        second.stop()
    assert not following.is_alive()
    assert any("again" in said for said in sender.said)
    assert len(second.entries) > 1200  # repeated, but known by insertId
    found = [one.json_payload["request_id"] for one in second.kept.values()]
    assert sorted(found) == sorted(f"r-{n}" for n in range(5, 1205))


def test_equal_lines_have_one_insert_id_and_others_their_own(api: Api, tmp_path: Path) -> None:
    write(tmp_path, event(1), event(1), event(2))
    Sender(tmp_path, api.port).tail.drain()
    (tmp_path / "tail.checkpoint").unlink()  # a sender that has forgotten how far it got
    Sender(tmp_path, api.port).tail.drain()
    assert len(api.entries) == 6
    assert len(api.kept) == 2


def test_stopped_in_an_outage_the_next_run_goes_on(api: Api, tmp_path: Path) -> None:
    write(tmp_path, event(1))
    api.answers = [grpc.StatusCode.UNAVAILABLE] * 100
    sender = Sender(tmp_path, api.port, follow=True)
    sender.stop.set()
    with pytest.raises(CloudLoggingError, match="the next run goes on there"):
        sender.tail.follow(sender.stop)
    api.answers = []
    Sender(tmp_path, api.port).tail.drain()
    assert len(api.entries) == 1


def test_without_permission_it_ends_at_once(api: Api, tmp_path: Path) -> None:
    write(tmp_path, event(1))
    api.answers = [grpc.StatusCode.PERMISSION_DENIED]
    with pytest.raises(CloudLoggingError, match="as the test says"):
        Sender(tmp_path, api.port).tail.drain()
    assert api.calls == 1
    Sender(tmp_path, api.port).tail.drain()
    assert len(api.entries) == 1


def test_what_the_api_cannot_take_is_told_and_holds_nothing_back(api: Api, tmp_path: Path) -> None:
    write(tmp_path, event(1))
    (tmp_path / "usage-0.jsonl").write_text("no JSON\n[]\n")
    api.answers = [grpc.StatusCode.INVALID_ARGUMENT]
    sender = Sender(tmp_path, api.port)
    sender.tail.drain()
    write(tmp_path, event(2))
    sender.tail.drain()
    assert [one.json_payload["request_id"] for one in api.entries] == ["r-2"]
    assert sender.said[0] == "2 lines are no usage events and were left out"
    assert "refused some of 1 events" in sender.said[1]


def test_the_command(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "connect", lambda project: (client(api.port), project))
    write(tmp_path, event(1), event(2))
    command = ["usage", "tail", "--folder", str(tmp_path), "--project", "mine"]
    to_cloud = [*command, "--to", "google-cloud-logging", "--log", "summaries"]
    done = CliRunner().invoke(cli, to_cloud)
    assert (done.exit_code, done.output) == (0, "")
    assert {one.log_name for one in api.requests} == {"projects/mine/logs/summaries"}
    assert len(api.entries) == 2
    # The destinations go their own ways.
    lines = CliRunner().invoke(cli, command).output.splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == ["r-1", "r-2"]
    assert CliRunner().invoke(cli, to_cloud).exit_code == 0
    assert len(api.entries) == 2


def test_without_the_extra_the_command_says_so(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['google.cloud.logging_v2'] = None\n"
        "from serve_app.cli.main import main; main()"
    )
    arguments = ["usage", "tail", "--folder", str(tmp_path), "--to", "google-cloud-logging"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "t5-serve[gcp]" in done.stderr


def test_the_views_read_both_tables(api: Api, tmp_path: Path) -> None:
    """Rows as the export makes them: payload by name, every number a FLOAT."""
    write(tmp_path, event(1, 503, error_type="overloaded"), event(2, output_tokens=9))
    Sender(tmp_path, api.port).tail.drain()
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'; CREATE SCHEMA t5_requests")
    for table in ("stdout", "t5_requests"):
        db.execute(f"CREATE TABLE t5_requests.{table} (timestamp TIMESTAMPTZ, jsonPayload JSON)")
    for entry in api.entries:
        payload = MessageToDict(LogEntry.pb(entry).json_payload)
        numbers = {k: float(v) for k, v in payload.items() if type(v) in (int, float)}
        row = [entry.timestamp, json.dumps(payload | numbers)]
        db.execute("INSERT INTO t5_requests.t5_requests VALUES (?, ?)", row)
    line = {**event(3), "time": None}
    row = [BEGAN + timedelta(seconds=3), json.dumps(line)]
    db.execute("INSERT INTO t5_requests.stdout VALUES (?, ?)", row)
    for name in ("events", "requests"):
        text = view_sql(name, tables=["stdout", "t5_requests"])
        [statement] = sqlglot.transpile(text, read="bigquery", write="duckdb")
        db.execute(statement)
    found = db.execute(
        "SELECT request_id, time, client, status, error_type, output_tokens, trace_id "
        "FROM t5_requests.requests ORDER BY time"
    ).fetchall()
    assert found == [
        ("r-1", BEGAN + timedelta(seconds=1), "shop", 503, "overloaded", None, TRACE),
        ("r-2", BEGAN + timedelta(seconds=2), "shop", 200, None, 9, TRACE),
        ("r-3", BEGAN + timedelta(seconds=3), "shop", 200, None, None, TRACE),
    ]


def test_a_table_is_a_name(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["usage", "sql", "--table", "a-b"])
    assert done.exit_code == 2
    assert "--table: must be letters, digits and _, is 'a-b'" in done.output
    sql = CliRunner().invoke(cli, ["usage", "sql", "--dataset", "d1", "--table", "t5_requests"])
    assert "FROM `d1.t5_requests`" in sql.output
    assert "stdout" not in sql.output
