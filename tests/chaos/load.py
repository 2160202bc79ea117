"""Clients of all kinds at work all the time, and what became of each request.

Closed loop: a client sends its next request when the last one is over, so a slow machine has fewer
requests and not a longer queue. One seed gives each client one sequence of requests; when they are
sent is the machine's.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import httpx

from tests.texts import docstrings, long_text

GRACE_S = 60.0  # beyond its deadline, before a request counts as hung: a loaded machine stalls
_TIMEOUT_S = 60.0
_REFUSED_S = 0.25  # between two tries to connect where nobody listens
# How often each kind is sent, of all.
KINDS = {
    "short": 6,
    "beams": 2,
    "long": 2,
    "stream": 4,
    "batch": 2,
    "late": 2,
    "leaves": 2,
    "leaves-stream": 2,
    "invalid": 1,
    "stranger": 1,
}
Ending = Literal["answered", "closed", "left", "hung"]


@dataclass
class Request:
    """One request and its end.

    Attributes:
        kind: a key of `KINDS`.
        sent, done: `time.monotonic()` seconds.
        ending: `answered`; `closed`: the connection broke, or there was none; `left`: by the client
            itself, as planned; `hung`: no answer within deadline and grace.
        status: of the answer, 0 without one.
        fault: what is wrong with the form of the answer, or "".
        said: kind of the problem document, or how the connection broke.
    """

    kind: str
    id: str
    timeout_s: float
    sent: float = 0.0
    done: float = 0.0
    ending: Ending = "closed"
    status: int = 0
    fault: str = ""
    said: str = ""


@dataclass(frozen=True)
class Plan:
    """What a client is about to do. It leaves after `leave_s` seconds or `leave_events` events."""

    kind: str
    path: str
    body: dict[str, Any]
    timeout_s: float = _TIMEOUT_S
    authorized: bool = True
    leave_s: float | None = None
    leave_events: int | None = None


def plans(seed: str) -> Iterator[Plan]:
    """A client's requests, without end."""
    chance = random.Random(seed)
    texts = docstrings()
    while True:
        [kind] = chance.choices(list(KINDS), list(KINDS.values()))
        text = chance.choice(texts)
        body: dict[str, Any] = {"text": text, "max_new_tokens": chance.randint(10, 60)}
        path, timeout_s = "/v1/summarize", _TIMEOUT_S
        leave_s: float | None = None
        leave_events: int | None = None
        if kind == "beams":
            body["num_beams"] = chance.choice([2, 4])
        elif kind == "long":
            body["text"] = long_text(chance.randint(300, 900))
        elif kind in ("stream", "leaves-stream"):
            tokens = chance.randint(40, 120)
            body |= {"stream": True, "min_new_tokens": tokens, "max_new_tokens": tokens}
            if kind == "leaves-stream":
                leave_events = chance.randint(1, 20)
        elif kind == "batch":
            path = "/v1/summarize/batch"
            del body["text"]
            body["texts"] = chance.sample(texts, chance.randint(2, 5))
        elif kind == "late":
            timeout_s = chance.uniform(0.02, 0.4)
            body |= {"min_new_tokens": 400, "max_new_tokens": 400}
        elif kind == "leaves":
            leave_s = chance.uniform(0.0, 0.5)
            body |= {"min_new_tokens": 400, "max_new_tokens": 400}
        elif kind == "invalid":
            body["num_beams"] = 0
        body["timeout_s"] = timeout_s
        yield Plan(kind, path, body, timeout_s, kind != "stranger", leave_s, leave_events)


@dataclass
class Load:
    """Clients in a thread of their own, until the block ends; then their last requests end.

    Args:
        url: of the service.
        token: of a client.
        seed: of all clients' sequences.
        clients: at work at once.
    """

    url: str
    token: str
    seed: str
    clients: int = 6
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        # A connection for each request: one that is kept may break before a request is sent, and
        # that says nothing of the request.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self.url, limits=limits, timeout=None, trust_env=False
        ) as http:
            await asyncio.gather(*(self._client(http, n) for n in range(self.clients)))

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        for plan in plans(f"{self.seed}/{number}"):
            if self._stop.is_set():
                return
            request = await self._one(http, plan)
            self.requests.append(request)
            if request.said == "ConnectError":
                await asyncio.sleep(_REFUSED_S)

    async def _one(self, http: httpx.AsyncClient, plan: Plan) -> Request:
        request = Request(plan.kind, uuid.uuid4().hex, plan.timeout_s, time.monotonic())
        token = self.token if plan.authorized else "t5s_nobody"
        headers = {"Authorization": f"Bearer {token}", "X-Request-Id": request.id}
        try:
            async with (
                asyncio.timeout(plan.timeout_s + GRACE_S),
                asyncio.timeout(plan.leave_s) as patience,
                http.stream("POST", plan.path, json=plan.body, headers=headers) as answer,
            ):
                await _read(answer, plan, request)
        except TimeoutError:
            request.ending = "left" if patience.expired() else "hung"
        except httpx.HTTPError as error:
            request.said = type(error).__name__
        request.done = time.monotonic()
        return request


async def _read(answer: httpx.Response, plan: Plan, request: Request) -> None:
    request.status = answer.status_code
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        content = await answer.aread()
        request.ending = "answered"
        request.fault, request.said = whole(answer, content, request.id)
        return
    events: list[tuple[str, dict[str, Any]]] = []
    name = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            events.append((name, json.loads(line.removeprefix("data: "))))
            if plan.leave_events is not None and len(events) > plan.leave_events:
                request.ending = "left"
                return
    request.fault, request.said = whole_stream(events)
    # Without its last event the stream was cut, whatever the framing says.
    request.ending = "answered" if events and events[-1][0] in ("done", "error") else "closed"


def whole(answer: httpx.Response, content: bytes, request_id: str) -> tuple[str, str]:
    """What is wrong with the form of an answer, and the kind of problem that it tells."""
    kind = answer.headers.get("content-type", "").partition(";")[0]
    shown = f"{answer.status_code} {kind} {content[:80]!r}"
    if answer.headers.get("x-request-id") != request_id:
        return f"another request's id: {shown}", ""
    try:
        document = json.loads(content)
    except ValueError:
        return f"not JSON: {shown}", ""
    if answer.status_code == 200:
        items = document.get("results", [{"result": document}])
        failed = [_kind(item["error"]) for item in items if "error" in item]
        good = all(_summary(item["result"]) for item in items if "error" not in item)
        return ("" if good else f"no summary: {shown}"), failed[0] if failed else ""
    good = (
        kind == "application/problem+json"
        and document["status"] == answer.status_code
        and document["request_id"] == request_id
    )
    return ("" if good else f"no problem document: {shown}"), _kind(document)


def whole_stream(events: Sequence[tuple[str, dict[str, Any]]]) -> tuple[str, str]:
    """The same of a stream's events: names and data."""
    names = [name for name, _ in events]
    if not names:
        return "no event", ""
    if names[0] != "start" or set(names[1:-1]) - {"chunk", "delta"}:
        return f"events out of order: {names}", ""
    name, last = events[-1]
    if name == "error":
        return "", _kind(last)
    said = "".join(data["text"] for one, data in events if one == "delta")
    if name == "done" and said != last["summary"]:
        return f"deltas {said[:80]!r} are not the summary {last['summary'][:80]!r}", ""
    return "", ""


def _summary(document: dict[str, Any]) -> bool:
    return isinstance(document["summary"], str) and document["usage"]["input_tokens"] > 0


def _kind(problem: dict[str, Any]) -> str:
    return str(problem.get("type", "")).rpartition(":")[2]
