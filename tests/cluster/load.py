"""Constant load through the Service, as clients send it, and what became of it."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType

import httpx

TEXT = (
    "nginx is a small and fast HTTP server that many sites use. It serves static files, balances "
    "load over several servers and keeps the answers of slow ones. This package has its manual."
)


@dataclass
class Answer:
    """`status` 0: the connection failed; times in seconds since the load began."""

    request_id: str
    sent: float
    done: float
    status: int
    detail: str


@dataclass
class Load:
    """Requests at a fixed rate, from a thread of its own, until the block ends.

    Args:
        url: of the service.
        token: bearer token.
        rate: requests per second.
        host: to send in place of the URL's.
        timeout_s: deadline of a request; longer where a machine has more to do than processors.
    """

    url: str
    token: str
    rate: float
    host: str | None = None
    timeout_s: float = 50
    answers: list[Answer] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def now(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._began

    @property
    def failed(self) -> list[Answer]:
        """Those without a summary."""
        return [a for a in self.answers if a.status != 200]

    def gap(self, since: float = 0.0) -> float:
        """The longest time after `since` in which no request was answered well, in seconds."""
        done = sorted(a.done for a in self.answers if a.status == 200 and a.done >= since)
        edges = [since, *done]
        return max((b - a for a, b in pairwise(edges)), default=0.0)

    def summary(self) -> str:
        """For the report."""
        kinds = sorted({f"{a.status} {a.detail}".strip() for a in self.failed})
        told = f"{len(self.failed)} of {len(self.answers)} failed"
        return told + (f" ({'; '.join(kinds)[:300]})" if kinds else "")

    async def _run(self) -> None:
        # A connection for each request: else all would stay with the pods they began with.
        limits = httpx.Limits(max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {self.token}"}
        if self.host:
            headers["Host"] = self.host
        pending: set[asyncio.Task[None]] = set()
        async with httpx.AsyncClient(
            limits=limits, timeout=self.timeout_s + 10, headers=headers
        ) as client:
            number = 0
            while not self._stop.is_set():
                task = asyncio.create_task(self._one(client))
                pending.add(task)
                task.add_done_callback(pending.discard)
                number += 1
                await asyncio.sleep(max(0.0, number / self.rate - self.now()))
            await asyncio.gather(*pending)

    async def _one(self, client: httpx.AsyncClient) -> None:
        sent, request_id = self.now(), uuid.uuid4().hex
        try:
            answer = await client.post(
                f"{self.url}/v1/summarize",
                json={"text": TEXT, "timeout_s": self.timeout_s},
                headers={"X-Request-Id": request_id},
            )
            status = answer.status_code
            detail = "" if status == 200 else answer.text[:160]
        except httpx.HTTPError as error:
            status, detail = 0, type(error).__name__
        self.answers.append(Answer(request_id, sent, self.now(), status, detail))
