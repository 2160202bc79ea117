"""How much work an engine says it has: against costs that are known, and of real engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.protocol import EngineRequest, GenerationSettings
from serve_app.engine.work import Meter, Tally, Work
from tests.texts import texts
from tests.unit.conftest import Clients


def metered(slots: int, *runs: tuple[int, int, float], encoded: tuple[int, float]) -> Meter:
    """Of runs of steps: how many, rows, seconds each; and of encoded tokens, seconds."""
    meter, tally = Meter(slots), Tally()
    meter.read(tally)
    tally.encoded(*encoded)
    for steps, rows, seconds in runs:
        for _ in range(steps):
            tally.stepped(rows, rows, rows, seconds)
    meter.read(tally)
    return meter


def test_work_is_what_a_full_batch_would_take() -> None:
    # 1 ms a token, 10 ms a step of all 8 rows.
    meter = metered(8, (100, 8, 0.01), encoded=(2_000, 2.0))
    work = meter.work((500, 40), (0, 80))
    assert work is not None
    assert work.waiting_s == pytest.approx(0.5 + 40 / 8 * 0.01)
    assert work.running_s == pytest.approx(80 / 8 * 0.01)
    assert work.done_s == pytest.approx(2.0 + 100 * 0.01)


def test_what_a_fuller_batch_gains_is_seen_where_rows_differ() -> None:
    # A step takes 2 ms and 1 ms a row: 10 ms for 8 rows, 1.25 ms each.
    meter = metered(8, (500, 2, 0.004), (500, 8, 0.010), encoded=(2_000, 2.0))
    assert meter.row_s == pytest.approx(0.00125, rel=0.03)
    # Where they never differ a step is taken to cost in proportion.
    assert metered(8, (500, 2, 0.004), encoded=(2_000, 2.0)).row_s == pytest.approx(0.002)


def test_a_looked_up_token_is_no_step_of_its_own() -> None:
    meter, tally = Meter(8), Tally()
    meter.read(tally)
    for _ in range(10):
        tally.stepped(4, 2, 6, 0.01)  # 2 documents of 2 beams, 3 tokens each
    tally.finished = 2
    meter.read(tally)
    assert meter.made_per_step == 3
    assert meter.steps == pytest.approx(60 / 2 / 3)


def test_costs_nobody_has_measured_are_not_made_up() -> None:
    meter = metered(8, (10, 8, 0.01), encoded=(999, 1.0))
    assert meter.work((1, 0), (0, 0)) is None
    assert meter.work((0, 0), (0, 0)) == Work(0, 0, 0, 0)


def test_the_first_look_begins() -> None:
    meter, tally = Meter(8), Tally()
    tally.encoded(5_000, 60.0)  # a warm-up
    meter.read(tally)
    assert not meter.measured
    assert meter.work((0, 0), (0, 0)) == Work(0, 0, 0, 0)


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
async def test_an_engine_has_work_until_it_is_done(make: Any, direct: Any) -> None:
    client = make(max_batch_size=2)
    assert client.work() == Work(0, 0, 0, 0)
    ids = [direct.ids(text) for text in texts(40)]
    assert sum(map(len, ids)) > 1_000
    short = GenerationSettings(max_new_tokens=4)
    await asyncio.gather(
        *(client.run(EngineRequest(str(at), one, short)) for at, one in enumerate(ids))
    )
    done = client.work()
    assert (done.waiting_s, done.running_s, done.finished) == (0, 0, 40)
    assert done.done_s > 0

    long = GenerationSettings(min_new_tokens=100, max_new_tokens=100)
    busy = [
        asyncio.create_task(client.run(EngineRequest(f"long{at}", ids[0], long))) for at in range(6)
    ]
    # For a moment the load may still have the batch before.
    while not ((load := client.load()).running_requests and load.waiting_requests):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    now = client.work()
    assert now.waiting_s > 0
    await asyncio.gather(*busy)
    after = client.work()
    assert (after.waiting_s, after.running_s, after.finished) == (0, 0, 46)
    assert after.done_s > done.done_s
