"""A day of calls by several clients, through a real NGINX to the real service, and their log lines.

The calls are made within seconds; `time` in the lines is then what the plan says, a day long.
What is expected of the reports is what the clients saw. Only what no client can see (how long the
service says it took, what a failed call had used) is read from the lines, as they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from tests.chart.conftest import INGRESS, Helm, tool
from tests.chart.test_nginx import configuration, installed, running
from tests.integration.conftest import Service, free_port, until
from tests.texts import long_text, texts

MONDAY = datetime(2026, 11, 23, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[2]
CLIENTS = ("web-shop", "nightly", "reader", "offender", "bursty")
TOKENS = {name: f"t5s_{name}" for name in CLIENTS}
BODY_BYTES = 65_536
WAITING = 6  # requests that may wait in the engine
ENDLESS = {"min_new_tokens": 8_000, "max_new_tokens": 8_000}

# What the service is to be like for this day.
SETTINGS: dict[str, Any] = {
    "auth": {"mode": "trusted-header"},
    "engine": {"max_batch_size": 1, "max_waiting_requests": WAITING, "speculation": False},
    "limits": {"max_new_tokens": 8_000, "body_bytes": BODY_BYTES},
    "rate_limits": {
        "enabled": True,
        "tokens_per_minute": 0,
        "tiers": [{"name": "o", "match": "offender", "tokens_per_minute": 1, "burst_tokens": 200}],
    },
}
EDGE = {
    "ingress": {
        **INGRESS["ingress"],
        "rateLimit": {
            "rate": "100r/s",
            "burst": 1000,
            "tiers": [{"name": "b", "match": "bursty", "rate": "1r/m", "burst": 1}],
        },
    },
    "limits": {"body_bytes": BODY_BYTES},
}


@dataclass
class Seen:
    """One request as its client saw it."""

    request_id: str
    at: datetime
    client: str | None
    path: str
    texts: int = 1
    status: int = 0
    usage: list[dict[str, Any]] = field(default_factory=list)  # of its answers
    kind: str | None = None  # what went wrong


class Day:
    """Makes the calls and remembers them. `seen` is by request id."""

    def __init__(self, url: str, service: Service) -> None:
        self.seen: dict[str, Seen] = {}
        self._service = service
        self._lock = threading.Lock()
        self._http = httpx.Client(
            base_url=url, headers={"Host": "summarize.example.com"}, timeout=120
        )
        text = texts(1)[0]
        self._short = {"text": text, "max_new_tokens": 8}
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(run) for run in (self._web_shop, self._nightly, self._reader)]:
                done.result()
        self._refused()
        self._full()
        self._http.close()

    def _new(self, hour: float, client: str | None, path: str, count: int = 1) -> Seen:
        with self._lock:
            name = f"{client or 'nobody'}-{len(self.seen)}"
            seen = Seen(name, MONDAY + timedelta(hours=hour), client, path, count)
            self.seen[name] = seen
        return seen

    def _call(
        self, hour: float, client: str | None, body: Any, path: str = "/v1/summarize", **more: Any
    ) -> Seen:
        seen = self._new(hour, client, path, len(body.get("texts", "1")))
        headers = {"X-Request-Id": seen.request_id}
        token = more.get("token") or (TOKENS[client] if client else None)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        answer = self._http.post(path, json=body, headers=headers)
        seen.status = answer.status_code
        assert answer.headers["x-request-id"] == seen.request_id
        told = answer.json()
        if seen.status != 200:
            seen.kind = told["type"].rpartition(":")[2]
        elif path == "/v1/summarize":
            seen.usage = [told["usage"]]
        elif path.endswith("batch"):
            seen.usage = [item["result"]["usage"] for item in told["results"] if "result" in item]
        return seen

    def _web_shop(self) -> None:
        for number in range(6):
            # The last two of them in one minute.
            self._call(9 + min(number, 4), "web-shop", self._short)
        for _ in range(2):
            assert self._call(14, "web-shop", {"text": ""}).kind == "invalid"
        self._call(15, "web-shop", {"inputs": self._short["text"]}, "/hf/summarization")
        late = {"text": self._short["text"], "timeout_s": 1.0, **ENDLESS}
        assert self._call(16, "web-shop", late).kind == "deadline"
        page = self._new(16, None, "/")
        headers = {"X-Request-Id": page.request_id}
        page.status = self._http.get("/", headers=headers).status_code

    def _nightly(self) -> None:
        body = {"texts": texts(3), "max_new_tokens": 8}
        for minute in range(4):
            self._call(2 + minute / 60, "nightly", body, "/v1/summarize/batch")
        long = {"text": long_text(900), "max_new_tokens": 8}
        cut = self._call(3, "nightly", {**long, "on_overflow": "truncate"})
        assert cut.usage[0]["chunks"] == 1
        whole = self._call(23.999, "nightly", long)
        assert whole.usage[0]["chunks"] > 1

    def _reader(self) -> None:
        """Streams: to the end, and left in the middle."""
        for number, settings in enumerate(({"max_new_tokens": 8}, ENDLESS)):
            seen = self._new(20 + number, "reader", "/v1/summarize")
            headers = {
                "X-Request-Id": seen.request_id,
                "Authorization": f"Bearer {TOKENS['reader']}",
            }
            body = {"text": self._short["text"], "stream": True, **settings}
            with self._http.stream("POST", seen.path, json=body, headers=headers) as answer:
                seen.status, event = answer.status_code, ""
                for line in answer.iter_lines():
                    event = line.removeprefix("event: ") if line.startswith("event: ") else event
                    if settings is ENDLESS and event == "delta":
                        seen.kind = "client-closed"
                        break
                    if line.startswith("data: ") and event == "done":
                        seen.usage = [json.loads(line.removeprefix("data: "))["usage"]]

    def _refused(self) -> None:
        for number in range(5):
            self._call(4, None, self._short, token="t5s_wrong" if number < 2 else None)
        too_large = self._call(5, None, {"text": "x" * (BODY_BYTES + 1)}, token=TOKENS["reader"])
        assert too_large.kind == "body-too-large"
        assert [self._call(6, "bursty", self._short).status for _ in range(4)] == [
            200, 200, 429, 429,
        ]  # fmt: skip
        offences = [self._call(7, "offender", self._short).kind for _ in range(6)]
        assert offences[0] is None
        assert offences[-1] == "rate-limited"

    def _full(self) -> None:
        """One runs until it is late, others wait until none of their client more may."""
        runs = {"text": self._short["text"], **ENDLESS, "timeout_s": 9.0}
        waits = {**self._short, "timeout_s": 120.0}
        with ThreadPoolExecutor(WAITING + 1) as pool:
            calls = [pool.submit(self._call, 18, "nightly", runs)]
            until(lambda: self._service.probe().load.running_requests, "one runs")
            calls += [pool.submit(self._call, 18, "nightly", waits) for _ in range(WAITING)]
            until(
                lambda: self._service.probe().load.waiting_requests == WAITING, "the queue is full"
            )
            assert self._call(18, "nightly", waits).kind == "overloaded"
        assert [call.result().kind for call in calls] == ["deadline", *[None] * WAITING]


@contextmanager
def edge(service: Service, folder: Path) -> Iterator[tuple[str, Path]]:
    """NGINX in front of the service; its URL and its log."""
    program, module = installed()
    port, behind = free_port(), httpx.URL(service.url).port
    assert behind is not None
    keys = {f"{name}.0123abcd": token for name, token in TOKENS.items()}
    release = Helm(tool("helm")).render(EDGE)
    text = configuration(release, port, behind, folder, module, keys)
    # The tests' applications share Serve's port, each under a path of its own.
    upstream = f"proxy_pass http://127.0.0.1:{behind}"
    prefix = httpx.URL(service.url).path.rstrip("/")
    text = text.replace(f"{upstream};", f"{upstream}{prefix}$request_uri;")
    with running(program, text, port, folder) as log:
        yield f"http://127.0.0.1:{port}", log


def shipped(folder: Path) -> list[dict[str, Any]]:
    """The events as the sidecar passes them on."""
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.cli.main", "usage", "tail", "--folder", str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def logged(log: Path) -> list[dict[str, Any]]:
    """NGINX's access log."""
    lines = log.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]
