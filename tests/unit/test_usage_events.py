"""What is recorded of a request, and what never is."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.auth import authenticator
from serve_app.api.schemas import known_fields
from serve_app.config import AuthSettings
from serve_app.engine.checkpoint import Checkpoint
from serve_app.tokens import create
from serve_app.usage.events import FACTS, SCHEMA_VERSION, trace_id, usage_event
from serve_app.usage.folder import segments
from serve_app.usage.writer import UsageWriter
from tests.texts import long_text
from tests.unit.conftest import Clients
from tests.unit.local import Local, local_app

SECRET = "Quixotic zebras draw maps of the harbour."
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def event(**more: Any) -> dict[str, Any]:
    given_: dict[str, Any] = {
        "request_id": "r", "traceparent": "", "method": "POST", "route": "/v1/summarize",
        "status": 200, "total_ms": 12.3456, "request_bytes": 10, "response_bytes": 20,
        "facts": {},
    }  # fmt: skip
    return usage_event(**{**given_, **more})


def test_an_event_names_its_schema_its_time_and_what_cloud_logging_wants() -> None:
    now = datetime(2026, 11, 23, 12, 0, 0, 1000, tzinfo=timezone(timedelta(hours=2)))
    assert event(now=now.astimezone(UTC)) == {
        "time": "2026-11-23T10:00:00.001Z",
        "severity": "INFO",
        "message": "request",
        "schema_version": SCHEMA_VERSION,
        "source": "service",
        "request_id": "r",
        "method": "POST",
        "route": "/v1/summarize",
        "status": 200,
        "total_ms": 12.35,
        "request_bytes": 10,
        "response_bytes": 20,
    }


@pytest.mark.parametrize("facts", [{"text": "x"}, {"num_beams": "4"}, {"client": None}])
def test_what_the_schema_does_not_have_is_refused(facts: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(facts))):
        event(facts=facts)


def test_names_survive_the_export_to_bigquery() -> None:
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in [*FACTS, *event()])


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        (f"01-{TRACE}-00f067aa0ba902b7-01-more", TRACE),  # a later version may append
        (f"ff-{TRACE}-00f067aa0ba902b7-01", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", None),
        ("", None),
        (SECRET, None),
    ],
)
def test_trace_ids(header: str, expected: str | None) -> None:
    assert trace_id(header) == expected


@given(st.text())
def test_no_header_gives_anything_but_a_trace_id(header: str) -> None:
    assert re.fullmatch("[0-9a-f]{32}", trace_id(header) or "0" * 32)


def test_field_names_that_a_client_made_up_are_not_recorded() -> None:
    assert known_fields(["text", "length.words", "texts.3", SECRET]) == [
        "length",
        "other",
        "text",
        "texts",
    ]


# Through the application


class Recorded:
    """The application with its usage events and real tokens."""

    def __init__(self, local: Local, writer: UsageWriter, folder: Path, token: str) -> None:
        self.http = local.http
        self.token = token
        self._writer = writer
        self._folder = folder

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    async def post(self, body: Any, path: str = "/v1/summarize", **headers: str) -> int:
        answer = await self.http.post(path, json=body, headers={**self.headers, **headers})
        return answer.status_code

    def text(self) -> str:
        """All that has been written."""
        self._writer.close()
        return "".join(path.read_text() for path in segments(self._folder))

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
async def app(checkpoint: Checkpoint, clients: Clients, tmp_path: Path) -> AsyncIterator[Recorded]:
    tokens = tmp_path / "tokens.json"
    _, token = create(tokens, "web-shop", None)
    folder = tmp_path / "usage"
    writer = UsageWriter(
        folder, max_bytes=1 << 20, keep=4, queue_size=1000, common={"replica": "a"}
    )
    check = authenticator(AuthSettings(tokens_file=tokens))
    async with local_app(
        checkpoint, clients(), authenticate=check, max_input_tokens=96, usage=writer
    ) as local:
        yield Recorded(local, writer, folder, token)
    writer.close()


@pytest.mark.anyio
async def test_a_request_is_one_event(app: Recorded) -> None:
    body = {"text": SECRET, "num_beams": 2, "max_new_tokens": 20, "length": {"words": 9}}
    trace = f"00-{TRACE}-00f067aa0ba902b7-01"
    assert await app.post(body, **{"X-Request-Id": "mine", "traceparent": trace}) == 200
    [found] = app.events()
    assert {name: found[name] for name in found if name not in ("time", "total_ms")} == {
        "severity": "INFO", "message": "request", "schema_version": 2, "source": "service",
        "request_id": "mine", "trace_id": TRACE, "client": "web-shop", "method": "POST",
        "route": "/v1/summarize", "status": 200, "model": "demo",
        "model_revision": found["model_revision"], "num_beams": 2, "max_new_tokens": 20,
        "length_words": 9, "stream": False, "on_overflow": "map_reduce", "texts": 1,
        "characters": len(SECRET), "asked_tokens": found["input_tokens"],
        "input_tokens": found["input_tokens"],
        "output_tokens": found["output_tokens"], "chunks": 1, "truncated": 0, "cached": 0,
        "queue_ms": found["queue_ms"], "compute_ms": found["compute_ms"], "replica": "a",
        "request_bytes": len(json.dumps(body, separators=(",", ":"))),
        "response_bytes": found["response_bytes"],
    }  # fmt: skip
    assert found["input_tokens"] > 5
    assert found["total_ms"] >= found["compute_ms"] > 0
    assert found["response_bytes"] > 100


@pytest.mark.anyio
async def test_the_event_has_what_the_answer_says(app: Recorded) -> None:
    answer = await app.http.post(
        "/v1/summarize", json={"text": long_text(300)}, headers=app.headers
    )
    cut = {"text": long_text(300), "on_overflow": "truncate"}
    assert await app.post(cut) == 200
    whole, truncated = app.events()
    usage = answer.json()["usage"]
    for name in ("input_tokens", "output_tokens", "chunks", "queue_ms", "compute_ms"):
        assert whole[name] == usage[name], name
    assert whole["chunks"] > 1
    assert whole["response_bytes"] == len(answer.content)
    assert (whole["truncated"], truncated["truncated"]) == (0, 1)


@pytest.mark.anyio
async def test_batches_are_summed_and_streams_marked(app: Recorded) -> None:
    texts = [SECRET, SECRET + " Again."]
    answer = await app.http.post("/v1/summarize/batch", json={"texts": texts}, headers=app.headers)
    assert await app.post({"text": SECRET, "stream": True}) == 200
    batch, stream = app.events()
    used = [item["result"]["usage"] for item in answer.json()["results"]]
    assert (batch["texts"], batch["characters"]) == (2, sum(map(len, texts)))
    assert batch["input_tokens"] == sum(one["input_tokens"] for one in used)
    # Each is rounded to a hundredth.
    total = sum(one["compute_ms"] for one in used)
    assert batch["compute_ms"] == pytest.approx(total, abs=0.011 * len(used))
    assert (batch["stream"], stream["stream"]) == (False, True)
    assert stream["output_tokens"] > 0


@pytest.mark.anyio
async def test_a_reader_that_leaves_its_stream_is_told_from_one_that_stays(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    events: list[Mapping[str, Any]] = []

    class Sink:
        def record(self, event: Mapping[str, Any]) -> None:
            events.append(event)

    async def ask(app: Any, leaves: bool) -> None:
        body = json.dumps({"text": long_text(300), "stream": True}).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if leaves and message["type"] == "http.response.body":
                left.set()

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/summarize", "raw_path": b"/v1/summarize", "query_string": b"",
            "root_path": "", "headers": headers, "scheme": "http", "server": ("test", 80),
        }  # fmt: skip
        await app(scope, receive, send)

    async with local_app(checkpoint, clients(), max_input_tokens=96, usage=Sink()) as local:
        for leaves in (True, False):
            await ask(local.app, leaves)
    assert [(one["status"], one.get("error_type")) for one in events] == [
        (200, "client-closed"),
        (200, None),
    ]
    left, stayed = events
    assert left["input_tokens"] > 0
    assert left["compute_ms"] > 0
    assert left["output_tokens"] < stayed["output_tokens"]


@pytest.mark.anyio
async def test_errors_are_named(app: Recorded) -> None:
    assert await app.post({"text": ""}) == 422
    assert await app.post({"text": "x", SECRET: 1}) == 422
    assert (await app.http.post("/v1/summarize", json={"text": "x"})).status_code == 401
    assert (await app.http.get("/nowhere")).status_code == 404
    long = {"text": long_text(3000), "stream": True, "timeout_s": 0.001}
    status = await app.post(long)
    blank, made_up, nobody, nowhere, late = app.events()
    assert (blank["error_type"], blank["error_fields"]) == ("invalid", ["text"])
    assert made_up["error_fields"] == ["other"]
    assert nobody["error_type"] == "unauthorized"
    assert "client" not in nobody
    assert (nowhere["route"], nowhere["error_type"]) == ("unmatched", "not-found")
    # Whether the deadline passes before or after the status line, the event says it.
    assert (late["status"], late["error_type"]) == (status, "deadline")


@pytest.mark.anyio
async def test_health_checks_leave_no_events_and_the_page_does(app: Recorded) -> None:
    for path in ("/healthz", "/readyz", "/"):
        assert (await app.http.get(path)).status_code == 200
    assert [one["route"] for one in app.events()] == ["/"]


@pytest.mark.anyio
async def test_neither_text_nor_token_is_ever_written(app: Recorded) -> None:
    words = set(re.findall(r"[A-Za-z]{6,}", SECRET))
    bodies: list[tuple[str, Any]] = [
        ("/v1/summarize", {"text": SECRET}),
        ("/v1/summarize", {"text": SECRET, "stream": True}),
        ("/v1/summarize", {"text": SECRET, SECRET: SECRET}),
        ("/v1/summarize", {"text": SECRET, "on_overflow": SECRET}),
        ("/v1/summarize", {"text": SECRET + "\0"}),
        ("/v1/summarize", SECRET),
        ("/v1/summarize/batch", {"texts": [SECRET, ""]}),
        ("/hf/summarization", {"inputs": SECRET, "parameters": {SECRET: 1}}),
        (f"/v1/{SECRET}", {"text": SECRET}),
        (f"/v1/summarize?{SECRET}={SECRET}", {"text": SECRET}),
    ]
    summaries: list[str] = []
    for path, body in bodies:
        answer = await app.http.post(path, json=body, headers=app.headers)
        if path == "/v1/summarize" and answer.headers["content-type"] == "application/json":
            summaries.append(answer.json()["summary"])
    await app.post({"text": SECRET}, **{"X-Request-Id": SECRET})
    await app.post({"text": SECRET}, traceparent=SECRET, **{"User-Agent": SECRET})
    wrong = {"Authorization": f"Bearer {app.token}x"}
    await app.http.post("/v1/summarize", json={"text": SECRET}, headers=wrong)
    plain = {**app.headers, "Content-Type": "text/plain"}
    await app.http.post("/v1/summarize", content=SECRET, headers=plain)
    told = app.text()
    assert len(told.splitlines()) == len(bodies) + 4
    assert summaries
    for unwanted in (*words, app.token, "t5s_", "Bearer", *summaries):
        assert unwanted not in told, unwanted


@pytest.mark.anyio
async def test_a_full_disk_costs_no_request(
    checkpoint: Checkpoint, clients: Clients, tmp_path: Path
) -> None:
    (tmp_path / "usage").write_text("a file where the folder should be")
    counted = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_drop(_count: int) -> None:
        loop.call_soon_threadsafe(counted.set)

    writer = UsageWriter(
        tmp_path / "usage",
        max_bytes=65_536,
        keep=2,
        queue_size=10,
        on_drop=on_drop,
    )
    async with local_app(checkpoint, clients(), usage=writer) as local:
        answer = await local.http.post("/v1/summarize", json={"text": SECRET})
        assert answer.status_code == 200
        await counted.wait()
    writer.close()
