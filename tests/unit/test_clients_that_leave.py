"""Clients that leave within their body: no error of ours, and an event that says so."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from ray.exceptions import TaskCancelledError

from serve_app.engine.checkpoint import Checkpoint
from tests.unit.conftest import Clients
from tests.unit.local import local_app

Receive = Callable[[], Awaitable[dict[str, Any]]]


class Events:
    """A `UsageSink` that remembers."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def record(self, event: Any) -> None:
        self.seen.append(event)


def leaving(how: str) -> Receive:
    """Half a body, then nobody."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b'{"text": "half', "more_body": True}
    ]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        if how == "as Serve's proxy":
            raise TaskCancelledError
        return {"type": "http.disconnect"}

    return receive


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["as ASGI has it", "as Serve's proxy"])
async def test_a_client_that_leaves_within_its_body(
    checkpoint: Checkpoint, clients: Clients, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    sent: list[Any] = []
    events = Events()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/summarize",
        "raw_path": b"/v1/summarize",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    async def send(message: Any) -> None:
        sent.append(message)

    async with local_app(checkpoint, clients(), usage=events) as local:
        await local.app(scope, leaving(how), send)
    assert sent == []
    [event] = events.seen
    assert event["status"] == 499
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
