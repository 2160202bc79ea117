"""What is counted, before Ray gets it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from monitoring.docs import PAGE, updated
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.protocol import (
    BatchRan,
    EngineRequest,
    Failed,
    FailureReason,
    Finished,
    GenerationSettings,
)
from serve_app.engine.reference import ReferenceEngine
from serve_app.metrics.clients import Clients
from serve_app.metrics.series import API_SERIES, ENGINE_SERIES, LATENCY_MS, Kind
from tests.unit import conftest
from tests.unit.conftest import Direct
from tests.unit.local import local_app
from tests.unit.test_reference_engine import until

pytestmark = pytest.mark.anyio

TEXT = "A small program that shows the weather. It asks a server every hour and keeps the answers."


def test_names_are_unique_and_boundaries_rise() -> None:
    series = (*API_SERIES, *ENGINE_SERIES)
    assert len({one.name for one in series}) == len(series)
    for one in series:
        assert bool(one.boundaries) == (one.kind is Kind.HISTOGRAM), one.name
        assert list(one.boundaries) == sorted(set(one.boundaries)), one.name
        assert not one.name.endswith(("_total", "_bucket", "_count", "_sum")), one.name


def test_the_timeouts_are_boundaries() -> None:
    # `limits.default_timeout_s` and `limits.timeout_s`: what is late stands out.
    assert {120_000, 300_000} < set(LATENCY_MS)


def test_clients_beyond_the_bound_are_counted_together() -> None:
    clients = Clients(most=2)
    for name in ("a", "b", "c", "d", "a"):
        clients.entered(name)
    assert dict(clients.in_flight) == {"a": 2, "b": 1, "other": 2}
    assert [clients.left(name) for name in ("a", "c", "b")] == ["a", "other", "b"]
    assert dict(clients.in_flight) == {"a": 1, "b": 0, "other": 1}
    # A name once counted keeps its label, idle or not.
    clients.entered("b")
    assert clients.left("b") == "b"


async def test_each_request_of_a_client_enters_and_leaves(
    checkpoint: Any, clients: conftest.Clients
) -> None:
    async with local_app(checkpoint, clients()) as app:
        good = await app.http.post("/v1/summarize", json={"text": TEXT, "max_new_tokens": 8})
        await app.http.post("/v1/summarize", json={"text": ""})
        await app.http.get("/healthz")
        usage = good.json()["usage"]
        assert app.telemetry.bills == [
            ("tester", 200, usage["input_tokens"], usage["output_tokens"]),
            ("tester", 422, 0, 0),
        ]
        assert app.telemetry.in_flight["tester"] == 0
        assert app.telemetry.failures == ["invalid"]


async def test_every_shed_text_of_a_batch_is_counted(
    checkpoint: Any, clients: conftest.Clients
) -> None:
    client = clients(max_waiting_requests=1, max_batch_size=1)
    async with local_app(checkpoint, client) as app:
        body = {"texts": [TEXT] * 6, "max_new_tokens": 8}
        answer = await app.http.post("/v1/summarize/batch", json=body)
        shed = [item for item in answer.json()["results"] if "error" in item]
        assert shed
        assert app.telemetry.failures == ["overloaded"] * len(shed)


class Seen(list[BatchRan | Finished | Failed]):
    """Events of an engine."""

    @property
    def batches(self) -> list[BatchRan]:
        return [event for event in self if isinstance(event, BatchRan)]


@pytest.mark.parametrize("engine", [ContinuousEngine, ReferenceEngine])
async def test_slots_and_progress_are_told(
    checkpoint: Any, direct: Direct, engine: Callable[..., Any]
) -> None:
    seen = Seen()
    client = EngineClient(
        lambda emit: engine(checkpoint, emit, threads=1, max_batch_size=4), seen.append
    )
    try:
        idle = client.load()
        assert (idle.slots, idle.slots_used, idle.no_progress_s) == (4, 0, 0.0)
        settings = GenerationSettings(max_new_tokens=400, min_new_tokens=400)
        requests = [EngineRequest(f"r{i}", direct.ids(TEXT), settings) for i in range(5)]
        running = [asyncio.create_task(client.run(request)) for request in requests]
        await until(
            lambda: client.load().waiting_requests > 0 and client.load().slots_used > 0,
            "some run, and some wait",
        )
        load = client.load()
        assert 0 < load.slots_used <= 4
        assert load.running_requests == load.slots_used
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await until(
            lambda: len([one for one in seen if isinstance(one, Failed)]) == 5, "all have ended"
        )
        await until(lambda: client.load().slots_used == 0, "the slots are free")
    finally:
        client.close()
    # Nobody waited for them any more; what they had cost is known all the same.
    failed = [event for event in seen if isinstance(event, Failed)]
    assert {event.reason for event in failed} == {FailureReason.CANCELLED}
    computed = sorted(event.usage.compute_ms for event in failed)
    assert computed[0] == 0  # one never left the queue
    assert computed[-1] > 0


async def test_encoding_has_its_share_of_a_step(checkpoint: Any, direct: Direct) -> None:
    seen = Seen()
    client = EngineClient(lambda emit: ContinuousEngine(checkpoint, emit, threads=1), seen.append)
    try:
        settings = GenerationSettings(max_new_tokens=6, min_new_tokens=6)
        await client.run(EngineRequest("one", direct.ids(TEXT), settings))
    finally:
        client.close()
    first, *others = seen.batches
    assert 0 < first.encode_seconds < first.seconds
    assert others
    assert {batch.encode_seconds for batch in others} == {0.0}


def test_the_page_lists_the_series_that_there_are() -> None:
    page = PAGE.read_text()
    assert page == updated(page), "run `python -m monitoring`, or `make chart`"
    for one in (*API_SERIES, *ENGINE_SERIES):
        assert f"| `{one.exported}` |" in page
