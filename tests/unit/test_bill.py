"""What a request has used is on its bill, however it ends."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any

import pytest

from serve_app.api.bill import Bill, Waits
from serve_app.api.service import SummaryService
from serve_app.calls import Call, Probe
from serve_app.config import ApiSettings, Limits
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.protocol import (
    EngineRequest,
    Failed,
    FailureReason,
    Finished,
    FinishReason,
    GenerationSettings,
    Tokens,
    Usage,
)
from serve_app.errors import DeadlineError, EngineError, ServiceError, UnavailableError
from tests.texts import long_text, texts
from tests.unit.conftest import Clients
from tests.unit.local import local_app

GREEDY = GenerationSettings(max_new_tokens=50)


def call(tokens: int) -> Call:
    return Call("c", list(range(tokens)), GREEDY, 60)


def test_a_stage_adds_up_tokens_and_has_the_longest_of_times() -> None:
    bill = Bill()
    for tokens, ms in ((10, 5.0), (20, 3.0)):
        with bill.stage() as stage:
            for factor in (1, 2):
                with stage.call(call(tokens)) as meter:
                    meter.usage = Usage(tokens, factor, ms * factor, ms * factor * 10)
    assert (bill.input_tokens, bill.output_tokens) == (2 * 10 + 2 * 20, 6)
    assert (bill.queue_ms, bill.compute_ms) == (10.0 + 6.0, 100.0 + 60.0)
    assert not bill.estimated


def test_what_the_engine_says_of_a_failed_call_counts() -> None:
    bill = Bill()
    error = DeadlineError("late")
    error.usage = Usage(10, 4, 2.0, 30.0)
    with pytest.raises(DeadlineError), bill.stage() as stage, stage.call(call(10)):
        raise error
    assert (bill.input_tokens, bill.output_tokens) == (10, 4)
    assert (bill.queue_ms, bill.compute_ms, bill.estimated) == (2.0, 30.0, False)


def test_a_call_that_was_refused_costs_nothing() -> None:
    bill = Bill()
    with pytest.raises(UnavailableError), bill.stage() as stage, stage.call(call(10)):
        raise UnavailableError("no replica")
    assert (bill.input_tokens, bill.queue_ms, bill.compute_ms) == (0, 0.0, 0.0)
    assert not bill.estimated


@pytest.mark.parametrize(("waited_ms", "begun"), [(0.0, True), (1e9, False)])
def test_who_does_not_answer_is_estimated(waited_ms: float, begun: bool) -> None:
    bill, began = Bill(Waits(waited_ms)), time.monotonic()

    def given_up() -> None:
        with bill.stage() as stage, stage.call(call(10)):
            time.sleep(0.01)
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        given_up()
    most_ms = (time.monotonic() - began) * 1e3
    assert bill.estimated
    assert 10 <= bill.queue_ms + bill.compute_ms <= most_ms
    # All of the time is compute, or all of it the wait that others had.
    assert (bill.compute_ms > 0, bill.queue_ms > 0) == (begun, not begun)
    assert bill.input_tokens == (10 if begun else 0)


# What the engines say


async def outcome(client: Any, request: EngineRequest, cancel_after: int | None = None) -> Failed:
    """How a request ends that cannot succeed; cancelled after so many of its tokens."""
    seen = 0
    async for event in client.events(request):
        if isinstance(event, Tokens):
            seen += len(event.ids)
            if cancel_after is not None and seen >= cancel_after:
                client._engine.cancel(request.id)
        else:
            assert isinstance(event, Failed)
            return event
    raise AssertionError("no end")


@pytest.fixture(params=["reference", "continuous"])
def make(
    request: pytest.FixtureRequest, clients: Clients, checkpoint: Checkpoint
) -> Iterator[Callable[..., EngineClient]]:
    if request.param == "reference":
        yield clients
        return
    made: list[EngineClient] = []

    def build(**options: Any) -> EngineClient:
        made.append(
            EngineClient(lambda emit: ContinuousEngine(checkpoint, emit, threads=1, **options))
        )
        return made[-1]

    yield build
    for client in made:
        client.close()


@pytest.mark.anyio
async def test_an_engine_says_what_a_cancelled_request_had_used(make: Any, direct: Any) -> None:
    client = make(speculation=False)
    settings = GenerationSettings(min_new_tokens=400, max_new_tokens=400)
    ids = direct.ids(texts(1)[0])
    request = EngineRequest("a", ids, settings, stream=True)
    failed = await outcome(client, request, cancel_after=3)
    assert failed.reason is FailureReason.CANCELLED
    assert failed.usage.input_tokens == len(ids)
    assert 3 <= failed.usage.output_tokens < 400
    assert failed.usage.compute_ms > 0
    assert failed.usage.queue_ms >= 0


@pytest.mark.anyio
async def test_who_never_left_the_queue_has_only_waited(make: Any, direct: Any) -> None:
    client = make(max_batch_size=1, speculation=False)
    long = GenerationSettings(min_new_tokens=200, max_new_tokens=200)
    ids = direct.ids(texts(1)[0])
    first = asyncio.create_task(client.run(EngineRequest("first", ids, long)))
    while not client.load().running_requests:  # noqa: ASYNC110  # an engine has no event for it
        await asyncio.sleep(0.001)
    late = EngineRequest("late", ids, long, time.monotonic() + 0.01)
    failed = await outcome(client, late)
    assert failed.reason is FailureReason.DEADLINE
    assert (failed.usage.input_tokens, failed.usage.output_tokens) == (0, 0)
    assert failed.usage.compute_ms == 0
    assert failed.usage.queue_ms > 5  # of 10, less what it took to get there
    await first


# Through the application, over a backend that does as it is told


class Scripted:
    """`Backend` whose calls end as `ends` says, in the order in which they come."""

    def __init__(self, ends: Callable[[int, Call], Any]) -> None:
        self._ends = ends
        self._numbers = itertools.count()

    async def run(self, call: Call) -> Finished:
        end = self._ends(next(self._numbers), call)
        if asyncio.iscoroutine(end):
            end = await end
        if isinstance(end, ServiceError):
            raise end
        assert isinstance(end, Finished)
        return end

    def stream(self, call: Call) -> AsyncGenerator[Tokens | Finished]:
        raise AssertionError("nothing streams here")

    async def probe(self, max_age_s: float) -> Probe:
        raise AssertionError("nothing probes here")


class Sink:
    def __init__(self) -> None:
        self.events: list[Mapping[str, Any]] = []

    def record(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)


def served(call: Call) -> Finished:
    usage = Usage(len(call.input_ids), 2, 1.0, 10.0)
    return Finished(call.id, [3, 4], FinishReason.STOP, usage)


async def ask(checkpoint: Checkpoint, clients: Clients, backend: Scripted, body: Any) -> Any:
    sink = Sink()
    async with local_app(checkpoint, clients(), max_input_tokens=96, usage=sink) as local:
        service = SummaryService(checkpoint, backend, Limits(), ApiSettings(), 96)
        local.app.state.service = service
        path = "/v1/summarize/batch" if "texts" in body else "/v1/summarize"
        answer = await local.http.post(path, json=body)
    [event] = sink.events
    return answer, event


@pytest.mark.anyio
async def test_parts_that_were_done_count_when_another_fails(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    sizes: list[int] = []

    def ends(number: int, call: Call) -> Any:
        sizes.append(len(call.input_ids))
        if number < 2:
            return served(call)
        error = EngineError("broken")
        error.usage = Usage(len(call.input_ids), 1, 4.0, 20.0)
        return error if number == 2 else asyncio.sleep(60)

    answer, event = await ask(checkpoint, clients, Scripted(ends), {"text": long_text(400)})
    assert (answer.status_code, event["error_type"]) == (500, "engine")
    assert len(sizes) > 4
    # Two are done, one failed; the rest were running when it did.
    assert event["asked_tokens"] == sum(sizes)
    assert sum(sizes[:3]) <= event["input_tokens"] <= sum(sizes)
    assert event["output_tokens"] == 2 + 2 + 1
    assert event["compute_ms"] >= 20.0
    assert event["estimated"] is True
    assert event["chunks"] == len(sizes)


@pytest.mark.anyio
async def test_a_replica_that_died_leaves_an_estimate(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    def ends(number: int, call: Call) -> Any:
        error = UnavailableError("died")
        error.usage = None
        return error

    answer, event = await ask(checkpoint, clients, Scripted(ends), {"text": "One text."})
    assert answer.status_code == 503
    assert event["input_tokens"] == event["asked_tokens"] > 0
    assert event["estimated"] is True


@pytest.mark.anyio
async def test_a_batch_has_the_bills_of_all_its_texts(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    sizes: list[int] = []

    def ends(number: int, call: Call) -> Any:
        sizes.append(len(call.input_ids))
        if number != 1:
            return served(call)
        error = DeadlineError("late")
        error.usage = Usage(len(call.input_ids), 1, 5.0, 7.0)
        return error

    body = {"texts": ["One text.", "Another text, longer.", "", "A third."]}
    answer, event = await ask(checkpoint, clients, Scripted(ends), body)
    results = answer.json()["results"]
    assert [item.get("error", {}).get("status") for item in results] == [None, 408, 422, None]
    assert event["input_tokens"] == sum(sizes)
    assert (event["output_tokens"], event["queue_ms"], event["compute_ms"]) == (5, 7.0, 27.0)
    assert "estimated" not in event


@pytest.mark.anyio
async def test_a_late_answer_of_the_engine_is_waited_for(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    def ends(number: int, call: Call) -> Any:
        async def late() -> ServiceError:
            await asyncio.sleep(call.timeout_s + 0.05)
            error = DeadlineError("late")
            error.usage = Usage(7, 3, 1.0, 49.0)
            return error

        return late()

    body = {"text": "One text.", "timeout_s": 0.05}
    answer, event = await ask(checkpoint, clients, Scripted(ends), body)
    assert answer.status_code == 408
    assert (event["input_tokens"], event["output_tokens"]) == (7, 3)
    assert (event["queue_ms"], event["compute_ms"]) == (1.0, 49.0)


@pytest.mark.anyio
async def test_an_engine_that_does_not_answer_is_not_waited_for_long(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    body = {"text": "One text.", "timeout_s": 0.05}
    backend = Scripted(lambda number, call: asyncio.sleep(3600))
    answer, event = await ask(checkpoint, clients, backend, body)
    assert (answer.status_code, event["error_type"]) == (408, "deadline")
    assert event["estimated"] is True
    assert event["compute_ms"] >= 50
