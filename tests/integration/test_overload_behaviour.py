"""More than the service can do: who would be late is told at once, and no client has it all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import httpx
import pytest

from tests.integration.conftest import Deploy, Service, until
from tests.texts import long_text, texts

STEPS = 8_000  # more than any machine does within a test
ROWS = 4
SHORT = {"text": texts(1)[0], "max_new_tokens": 8, "timeout_s": 300}
ENDLESS = {**SHORT, "min_new_tokens": STEPS, "max_new_tokens": STEPS}


@pytest.fixture(scope="module")
def crowded(deploy: Deploy) -> Service:
    """A service of few rows, whose clients name themselves."""
    return deploy(
        "crowded",
        "/crowded",
        auth={"mode": "trusted-header"},
        engine={"max_batch_size": ROWS, "speculation": False},
        limits={"max_new_tokens": STEPS, "full_status": 429},
    )


def ask(service: Service, body: dict[str, Any], client: str = "light") -> httpx.Response:
    headers = {"X-Api-Client": client}
    return httpx.post(f"{service.url}/v1/summarize", json=body, headers=headers, timeout=300)


def warm(service: Service) -> None:
    """Let the engine see what its work costs, for longer than it takes it to look."""
    began, count = time.monotonic(), 0
    while count < 40 or time.monotonic() - began < 2:
        assert ask(service, {**SHORT, "text": texts(40)[count % 40]}).status_code == 200
        count += 1


def test_an_idle_service_refuses_nobody_for_lateness(crowded: Service) -> None:
    warm(crowded)
    # Never done within a second; but nobody is in front, and it is tried.
    assert ask(crowded, {**ENDLESS, "timeout_s": 1}).status_code == 408
    assert ask(crowded, SHORT).status_code == 200


@contextmanager
def heavy(service: Service, count: int, body: dict[str, Any]) -> Iterator[list[Future[None]]]:
    """So many requests of a heavy client, as streams that it leaves at the end."""
    leave = Event()

    def stay() -> None:
        headers = {"X-Api-Client": "heavy"}
        streamed = {**body, "stream": True}
        url = f"{service.url}/v1/summarize"
        with httpx.stream("POST", url, json=streamed, headers=headers, timeout=300) as answer:
            answer.raise_for_status()
            for _ in answer.iter_bytes():
                if leave.is_set():
                    return

    with ThreadPoolExecutor(count) as pool:
        busy = [pool.submit(stay) for _ in range(count)]
        try:
            yield busy
        finally:
            leave.set()
        for one in busy:
            one.result()


def test_who_would_be_late_is_refused_at_once_and_the_others_are_served(crowded: Service) -> None:
    warm(crowded)
    with ThreadPoolExecutor(1) as pool:
        with heavy(crowded, ROWS, ENDLESS):
            until(lambda: crowded.probe().load.running_requests == ROWS, "all rows are taken")

            def refused() -> httpx.Response | None:
                # Unless the machine has stood still for seconds: then it may try, and is late.
                answer = ask(crowded, {**ENDLESS, "timeout_s": 2})
                assert answer.status_code in (408, 429), answer.text
                return answer if answer.status_code == 429 else None

            answer = until(refused, "a request that would be late is refused")
            document = answer.json()
            assert document["type"] == "urn:t5-serve:problem:overloaded"
            assert "late" in document["detail"]
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            waits = pool.submit(ask, crowded, SHORT)  # it has time: it is let in, and waits
            until(lambda: crowded.probe().load.waiting_requests == 1, "it waits")
        assert waits.result().status_code == 200
    late = {"application": crowded.name, "outcome": "too_late"}
    until(lambda: crowded.cluster.series("ray_t5_engine_requests_total", **late) >= 1, "counted")


def test_short_texts_are_answered_beside_documents_of_another_client(crowded: Service) -> None:
    document = {"text": long_text(60_000), "timeout_s": 300}  # more parts than are sent at once
    with heavy(crowded, 3, document) as documents:
        until(lambda: crowded.probe().load.waiting_requests >= 150, "documents fill the queue")
        for text in texts(5):
            assert ask(crowded, {**SHORT, "text": text}).status_code == 200
        assert crowded.probe().load.waiting_requests >= 50
        assert not any(one.done() for one in documents)
    crowded.idle()
