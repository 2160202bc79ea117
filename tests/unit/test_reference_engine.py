"""The reference engine: exact, batched when busy, bounded, stoppable."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict

import pytest

from serve_app.engine.client import EngineClient
from serve_app.engine.protocol import (
    EngineRequest,
    EngineStoppedError,
    Failed,
    FailureReason,
    Finished,
    FinishReason,
    GenerationSettings,
    QueueFullError,
    Tokens,
)
from tests.texts import texts
from tests.unit.conftest import Clients, Direct

pytestmark = pytest.mark.anyio

GREEDY = GenerationSettings(max_new_tokens=24, no_repeat_ngram_size=3)
BEAMS = GenerationSettings(
    num_beams=4, max_new_tokens=20, min_new_tokens=3, length_penalty=0.8, early_stopping=True
)
ENDLESS = GenerationSettings(min_new_tokens=2_000, max_new_tokens=2_000)  # some ten seconds


async def until(condition, what: str) -> None:
    """Wait for something that must come; the bound only ends a broken test."""
    for _ in range(3_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never happened: {what}")


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
async def test_a_batch_gives_what_generate_gives_for_each_text_alone(
    clients: Clients, direct: Direct, settings: GenerationSettings
) -> None:
    client = clients(max_batch_size=8)
    inputs = [direct.ids(text) for text in texts(17)]
    requests = [EngineRequest(f"r{i}", ids, settings) for i, ids in enumerate(inputs)]
    outcomes = await asyncio.gather(*map(client.run, requests))

    asked = {name: value for name, value in asdict(settings).items() if value}
    if settings.num_beams == 1:
        asked.pop("length_penalty")
    for ids, outcome in zip(inputs, outcomes, strict=True):
        assert isinstance(outcome, Finished)
        assert list(outcome.ids) == direct.generate(ids, **asked)
        assert outcome.usage.input_tokens == len(ids)
        assert outcome.usage.output_tokens == len(outcome.ids)
    assert max(batch.requests for batch in clients.batches) == 8
    assert sum(batch.requests for batch in clients.batches) == 17


async def test_streamed_tokens_are_the_result_and_come_in_several_steps(
    clients: Clients, direct: Direct
) -> None:
    client = clients()
    settings = GenerationSettings(min_new_tokens=12, max_new_tokens=12)
    request = EngineRequest("r", direct.ids(texts(1)[0]), settings, stream=True)
    events = [event async for event in client.events(request)]
    *tokens, last = events
    assert isinstance(last, Finished)
    assert all(isinstance(event, Tokens) for event in tokens)
    assert len(tokens) > 3
    assert [i for event in tokens for i in event.ids] == list(last.ids)
    assert last.reason is FinishReason.MAX_NEW_TOKENS


async def test_requests_with_other_settings_wait_for_their_own_batch(
    clients: Clients, direct: Direct
) -> None:
    client = clients()
    ids = direct.ids(texts(1)[0])
    first = asyncio.create_task(client.run(EngineRequest("first", ids, GREEDY)))
    await until(lambda: client.load().running_requests == 1, "the first batch runs")
    others = [
        EngineRequest(f"{name}{i}", ids, settings)
        for i in range(3)
        for name, settings in (("greedy", GREEDY), ("beams", BEAMS))
    ]
    await asyncio.gather(first, *map(client.run, others))
    assert [batch.requests for batch in clients.batches] == [1, 3, 3]


async def test_the_queue_is_bounded_in_requests_and_says_when_to_come_back(
    clients: Clients, direct: Direct
) -> None:
    client = clients(max_waiting_requests=2)
    ids = direct.ids(texts(1)[0])
    await client.run(EngineRequest("measured", ids, GREEDY))
    running = await occupied(client, ids)
    waiting = [asyncio.create_task(client.run(EngineRequest(f"w{i}", ids, GREEDY))) for i in (1, 2)]
    await until(lambda: client.load().waiting_requests == 2, "two wait")
    with pytest.raises(QueueFullError, match="2 requests") as caught:
        await client.run(EngineRequest("one too many", ids, GREEDY))
    load = caught.value.load
    assert load.waiting_tokens == 2 * len(ids)
    assert load.drain_tokens_per_s is not None
    assert load.retry_after_s() == pytest.approx(2 * len(ids) / load.drain_tokens_per_s)
    running.cancel()
    assert all(isinstance(outcome, Finished) for outcome in await asyncio.gather(*waiting))


async def test_the_queue_is_bounded_in_tokens(clients: Clients, direct: Direct) -> None:
    ids = direct.ids(texts(1)[0])
    client = clients(max_waiting_tokens=len(ids) + 1)
    running = await occupied(client, ids)
    waiting = asyncio.create_task(client.run(EngineRequest("w", ids, GREEDY)))
    await until(lambda: client.load().waiting_requests == 1, "one waits")
    with pytest.raises(QueueFullError, match=f"{len(ids) + 1} tokens"):
        await client.run(EngineRequest("one too many", ids, GREEDY))
    running.cancel()
    await waiting


async def test_whoever_leaves_stops_the_compute(clients: Clients, direct: Direct) -> None:
    client = clients()
    task = await occupied(client, direct.ids(texts(1)[0]))
    task.cancel()
    await until(lambda: client.load().running_requests == 0, "the engine is free again")
    stopped_at = client.load().steps
    assert stopped_at < ENDLESS.max_new_tokens
    await asyncio.sleep(0.2)
    assert client.load().steps == stopped_at


async def test_one_who_leaves_does_not_disturb_the_rest_of_the_batch(
    clients: Clients, direct: Direct
) -> None:
    client = clients()
    inputs = [direct.ids(text) for text in texts(3)]
    settings = GenerationSettings(min_new_tokens=40, max_new_tokens=40)
    blocker = await occupied(client, inputs[0])
    tasks = [
        asyncio.create_task(client.run(EngineRequest(f"r{i}", ids, settings)))
        for i, ids in enumerate(inputs)
    ]
    await until(lambda: client.load().waiting_requests == 3, "all wait")
    blocker.cancel()
    await until(lambda: client.load().running_requests == 3, "all run")
    tasks[1].cancel()
    for index in (0, 2):
        outcome = await tasks[index]
        assert isinstance(outcome, Finished)
        expected = direct.generate(inputs[index], min_new_tokens=40, max_new_tokens=40)
        assert list(outcome.ids) == expected


async def test_a_deadline_ends_a_running_request(clients: Clients, direct: Direct) -> None:
    client = clients()
    request = EngineRequest("r", direct.ids(texts(1)[0]), ENDLESS, time.monotonic() + 0.3)
    outcome = await client.run(request)
    assert isinstance(outcome, Failed)
    assert outcome.reason is FailureReason.DEADLINE
    await until(lambda: client.load().running_requests == 0, "the engine is free again")
    assert client.load().steps < ENDLESS.max_new_tokens


async def test_a_late_request_never_reaches_the_model(clients: Clients, direct: Direct) -> None:
    client = clients()
    ids = direct.ids(texts(1)[0])
    running = await occupied(client, ids)
    late = asyncio.create_task(
        client.run(EngineRequest("late", ids, GREEDY, deadline=time.monotonic()))
    )
    await until(lambda: client.load().waiting_requests == 1, "it waits")
    running.cancel()
    outcome = await late
    assert isinstance(outcome, Failed)
    assert outcome.reason is FailureReason.DEADLINE
    assert sum(batch.requests for batch in clients.batches) <= 1


async def test_a_text_that_breaks_the_model_fails_alone(
    clients: Clients, direct: Direct, caplog: pytest.LogCaptureFixture
) -> None:
    client = clients()
    ids = direct.ids(texts(1)[0])
    poison = [direct.model.config.vocab_size + 7, 1]  # outside the embedding: a real failure
    blocker = await occupied(client, ids)
    tasks = [
        asyncio.create_task(client.run(EngineRequest(f"r{i}", row, GREEDY, origin=f"origin-{i}")))
        for i, row in enumerate([ids, ids, poison, ids, ids])
    ]
    await until(lambda: client.load().waiting_requests == 5, "all wait")
    blocker.cancel()
    outcomes = await asyncio.gather(*tasks)
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [Finished, Finished, Failed, Finished, Finished]
    assert outcomes[2].reason is FailureReason.ERROR
    assert "IndexError" in outcomes[2].message
    # The log says whose they were; the last line is of the one that was to blame.
    said = [record for record in caplog.records if "failed together" in record.message]
    assert all("origin-2" in vars(record)["request_ids"] for record in said)
    assert vars(said[-1])["request_ids"] == ["origin-2"]


async def test_closing_fails_what_is_inside_and_refuses_what_comes(
    clients: Clients, direct: Direct
) -> None:
    client = clients()
    ids = direct.ids(texts(1)[0])
    running = await occupied(client, ids)
    waiting = asyncio.create_task(client.run(EngineRequest("w", ids, GREEDY)))
    await until(lambda: client.load().waiting_requests == 1, "one waits")
    await asyncio.to_thread(client.close)
    for task in (running, waiting):
        outcome = await task
        assert isinstance(outcome, Failed)
        assert outcome.reason is FailureReason.CANCELLED
    with pytest.raises(EngineStoppedError):
        await client.run(EngineRequest("later", ids, GREEDY))
    assert client.stalled(1e9) == "the engine thread has died"


async def test_a_stalled_engine_is_seen(clients: Clients, direct: Direct) -> None:
    client = clients()
    assert client.stalled(0.0) is None  # idle is not stalled
    running = await occupied(client, direct.ids(texts(1)[0]))
    assert client.stalled(60) is None
    assert "no step" in str(client.stalled(-1.0))
    running.cancel()


async def test_an_id_is_used_once(clients: Clients, direct: Direct) -> None:
    client = clients()
    running = await occupied(client, direct.ids(texts(1)[0]))
    with pytest.raises(ValueError, match="already"):
        await client.run(EngineRequest("busy", [1], GREEDY))
    running.cancel()


async def occupied(client: EngineClient, ids: list[int]) -> asyncio.Task[Finished | Failed]:
    """Give the engine work for many seconds; cancel the task to free it."""
    before = client.load().steps
    task = asyncio.create_task(client.run(EngineRequest("busy", ids, ENDLESS)))

    def runs() -> bool:
        load = client.load()
        return load.steps > before and load.waiting_requests == 0

    await until(runs, "it runs")
    return task
