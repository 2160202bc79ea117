"""Who is expected to be late: against times computed by hand, and of a real engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.pace import Pace
from serve_app.engine.protocol import (
    EngineRequest,
    Failed,
    Finished,
    GenerationSettings,
    TooLateError,
)
from serve_app.engine.queue import Entry
from serve_app.engine.work import Tally
from tests.texts import texts
from tests.unit.conftest import Direct
from tests.unit.test_reference_engine import until


def entry(deadline: float | None = None, *, made: int = 0, tokens: int = 5, **said: int) -> Entry:
    settings = GenerationSettings(**{"max_new_tokens": 512, **said})
    one = Entry(EngineRequest("one", [1] * tokens, settings, deadline), arrived=0.0)
    one.made = made
    return one


def paced(slots: int = 4, step_s: float = 0.01, computing: float = 1.0) -> Pace:
    """An engine that took 1 ms a token, `step_s` a full step and 10 steps a document; at 1 s."""
    pace, tally = Pace(slots), Tally()
    pace.stepped(tally, now=0.0)
    tally.encoded(2_000, 2.0)
    for _ in range(100):
        tally.stepped(slots, slots, slots, step_s)
    tally.finished = 100 * slots / 10
    tally.cpu_s = computing * (2.0 + 100 * step_s)
    pace.stepped(tally, now=1.0)
    return pace


def test_rows_are_taken_as_they_become_free() -> None:
    # Rows are free after 2, 4, 10 and 10 steps. Those ahead take them at 2 and 4 and leave at 12
    # and 14; the third begins at 10, as the last one does, which ends with 20 steps of 10 ms. A
    # third of the time is for steps.
    running = [entry(made=8), entry(made=6), entry(), entry()]
    ahead = [entry(), entry(), entry()]
    expected = paced().expected_s(entry(), running, ahead, now=1.0)
    assert expected == pytest.approx(20 * 0.01 * 3)


def test_beams_wait_for_as_many_rows_and_lengths_are_kept_to() -> None:
    running = [entry(made=8), entry(made=6), entry(), entry()]
    # Three rows are free after 10 steps; 3 steps at most.
    short = entry(num_beams=3, max_new_tokens=3)
    assert paced().expected_s(short, running, [], now=1.0) == pytest.approx(13 * 0.01 * 3)
    # One after 2; 30 steps at least.
    long = entry(min_new_tokens=30)
    assert paced().expected_s(long, running, [], now=1.0) == pytest.approx(32 * 0.01 * 3)


def test_a_row_is_free_at_its_deadline_at_the_latest() -> None:
    # In 0.06 s, of which a third is for two steps of 10 ms; then 10 of its own.
    running = [entry(1.0 + 0.06, min_new_tokens=500), *[entry(min_new_tokens=500)] * 3]
    expected = paced().expected_s(entry(), running, [], now=1.0)
    assert expected == pytest.approx(12 * 0.01 * 3)


def test_who_is_expected_after_three_quarters_of_its_time_is_late() -> None:
    running = [entry()] * 4  # 10 steps, and 10 of its own: 0.6 s
    late = paced().late_s(entry(1.0 + 0.7), running, [], now=1.0)
    assert late == pytest.approx(0.6 - 0.525)
    assert paced().late_s(entry(1.0 + 0.81), running, [], now=1.0) is None
    assert paced().late_s(entry(None), running, [entry()] * 100, now=1.0) is None


def test_who_would_be_in_time_in_a_batch_of_few_rows_only_is_not_let_in_to_wait() -> None:
    # One row is used, and kept alone by its deadline. Behind two others there would be time for
    # 10 steps of one row, after 30; not for 10 of the four rows that its own time allows.
    alone, last = entry(1.0 + 0.15), entry(1.0 + 1.5)
    expected = paced().expected_s(last, [alone], [entry(), entry()], now=1.0)
    assert expected == pytest.approx((30 * 0.0025 + 10 * 0.01) * 3)


def test_who_begins_at_once_is_never_late() -> None:
    pace = paced(step_s=100.0)
    for deadline in (1.0, 1.001, 2.0):
        assert pace.late_s(entry(deadline), [], [], now=1.0) is None
        assert pace.late_s(entry(deadline), [entry(), entry()], [entry()], now=1.0) is None
    assert pace.late_s(entry(1.001), [entry()] * 4, [], now=1.0) is not None


def test_a_batch_is_no_fuller_than_lets_those_in_it_end_in_time() -> None:
    # A row takes 2.5 ms of a step, and two thirds of the time are for encoding. Of 0.3 s 0.21 are
    # counted on, 0.07 of them for 10 steps.
    pace = paced()
    step_s = pace.step_s(entry(1.0 + 0.3), now=1.0)
    assert step_s == pytest.approx(0.007)
    assert pace.rows([step_s], used=0) == pace.rows([step_s, 1.0], used=2) == 2
    # With three in it, it is late anyway.
    assert pace.rows([step_s], used=3) == 4
    assert pace.rows([pace.step_s(entry(None), now=1.0)], used=0) == 4
    # Two rows that one with time for two steps of two rows uses: who comes third waits for one.
    # It then has time for steps of all four.
    running = [entry(1.0 + 0.3), entry(1.0 + 0.3)]
    expected = pace.expected_s(entry(100.0), running, [], now=1.0)
    assert expected == pytest.approx((10 * 0.005 + 10 * 0.01) * 3)
    assert pace.expected_s(entry(100.0), running[:1], [], now=1.0) is None


def test_what_was_measured_long_ago_refuses_nobody() -> None:
    pace, full = paced(step_s=100.0), [entry()] * 4
    assert pace.late_s(entry(2.0), full, [], now=5.9) is not None
    assert pace.late_s(entry(8.0), full, [], now=6.1) is None
    # Nor does it count when there are steps again.
    pace.stepped(Tally(), now=60.0)
    assert pace.late_s(entry(61.0), full, [], now=60.0) is None


def test_a_bad_minute_refuses_those_who_cannot_wait_for_its_end() -> None:
    # Steps of a second, of which the engine had a processor for a twentieth: 20 times too long.
    # 64 wait in front: 17 rounds of 10 steps.
    pace = paced(step_s=1.0, computing=0.05)
    full, ahead = [entry()] * 4, [entry()] * 64
    assert pace.late_s(entry(1.0 + 10), full, ahead, now=1.0) is not None
    assert pace.late_s(entry(1.0 + 230), full, ahead, now=1.0) is None
    # An engine that computes all the time is as slow as that.
    slow = paced(step_s=2.0)
    assert slow.late_s(entry(1.0 + 230), full, ahead, now=1.0) is not None


@asynccontextmanager
async def running(checkpoint: Checkpoint, **options: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(lambda emit: ContinuousEngine(checkpoint, emit, threads=1, **options))
    try:
        yield client
    finally:
        await asyncio.to_thread(client.close)


@pytest.mark.anyio
async def test_an_engine_refuses_who_would_be_late_and_nobody_else(
    checkpoint: Checkpoint, direct: Direct
) -> None:
    ids = [direct.ids(text) for text in texts(40)]
    short = GenerationSettings(min_new_tokens=8, max_new_tokens=8)
    endless = GenerationSettings(min_new_tokens=8_000, max_new_tokens=8_000)
    async with running(checkpoint, max_batch_size=2, speculation=False) as client:

        def request(name: str, settings: GenerationSettings, left_s: float | None) -> EngineRequest:
            deadline = None if left_s is None else time.monotonic() + left_s
            return EngineRequest(name, ids[0], settings, deadline)

        # It must have seen what a token costs, and for longer than it takes to look.
        began = time.monotonic()
        count = 0
        while count < 40 or time.monotonic() - began < 2:
            name = f"short{count}"
            await client.run(EngineRequest(name, ids[count % 40], short, None))
            count += 1
        busy = [asyncio.create_task(client.run(request(f"busy{i}", endless, None))) for i in "ab"]
        await until(lambda: client.load().running_requests == 2, "both rows are taken")
        steps = client.load().steps
        await until(lambda: client.load().steps > steps + 20, "it steps")

        async def refused(number: int) -> TooLateError | None:
            try:
                await client.run(request(f"hopeless{number}", endless, 0.5))
            except TooLateError as error:
                return error
            return None  # this machine has just stood still for seconds, as busy ones do

        refusals = [error for number in range(20) if (error := await refused(number))]
        assert refusals
        assert all(error.retry_after_s > 0 for error in refusals)
        assert client.load().waiting_requests == 0
        waits = asyncio.create_task(client.run(request("waits", short, 3_600)))
        await until(lambda: client.load().waiting_requests == 1, "it waits")
        for task in busy:
            task.cancel()
        assert isinstance(await waits, Finished)
        # Nobody is in front now: it may try, however little time it has.
        assert isinstance(await client.run(request("tries", endless, 0.2)), Failed)
