"""Which text is refused when replicas die under it, and which is not."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from serve_app.api.suspects import REMEMBERED_S, Suspects, Trial
from serve_app.calls import Call
from serve_app.engine.protocol import GenerationSettings
from serve_app.errors import PoisonError

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def call(*ids: int, name: str = "c") -> Call:
    return Call(name, ids, GenerationSettings(), 60)


async def ends(suspects: Suspects, one: Call, *deaths: str) -> str:
    """How a call ends whose attempts die like this: `again` if it is tried once more, or `last`."""
    try:
        async with suspects.trial(one) as trial:
            for death in deaths:
                trial.died(last=death == "last")
            if "last" in deaths:
                return "lost"
            trial.succeeded()
            return "done"
    except PoisonError:
        return "refused"


async def refused(suspects: Suspects, one: Call) -> bool:
    return await ends(suspects, one) == "refused"


async def test_the_second_death_of_a_text_alone_is_its_last() -> None:
    clock = Clock()
    suspects = Suspects(clock)
    assert await ends(suspects, call(1, 2), "again") == "done"
    assert await ends(suspects, call(1, 2), "again", "last") == "refused"
    assert await refused(suspects, call(1, 2, name="another"))
    assert not await refused(suspects, call(1, 2, 3))
    clock.now += REMEMBERED_S - 1
    assert await refused(suspects, call(1, 2))
    clock.now += 1
    assert not await refused(suspects, call(1, 2))


async def crowd(suspects: Suspects, *calls: Call) -> None:
    """Calls that lost two replicas together."""
    async with AsyncExitStack() as stack:
        trials: list[Trial] = [
            await stack.enter_async_context(suspects.trial(one)) for one in calls
        ]
        for last in (False, True):
            for trial in trials:
                trial.died(last=last)


async def test_texts_that_lost_two_replicas_together_are_told_apart_when_they_come_again() -> None:
    suspects = Suspects()
    guilty, innocent, absent = call(1), call(2), call(3)
    await crowd(suspects, guilty, innocent, absent)
    assert await ends(suspects, innocent) == "done"
    assert await ends(suspects, guilty, "again") == "refused"
    # It is no suspect any more: one death is not its fault.
    assert await ends(suspects, innocent, "again") == "done"
    assert await refused(suspects, guilty)
    assert not await refused(suspects, innocent)


async def test_who_was_alone_at_last_had_company_all_the_same() -> None:
    suspects = Suspects()
    async with suspects.trial(call(1)) as first:
        first.died(last=False)
        async with suspects.trial(call(2)) as second:
            second.died(last=False)
        first.died(last=True)  # no error: the second's replica may have been the first's
    assert not await refused(suspects, call(1))


async def test_a_death_under_a_stream_makes_a_suspect() -> None:
    suspects = Suspects()
    assert (
        await ends(suspects, call(1), "last") == "lost"
    )  # what has been read cannot be taken back
    assert await ends(suspects, call(1), "last") == "refused"


async def test_suspects_run_one_at_a_time_and_nobody_waits_for_them() -> None:
    suspects = Suspects()
    await crowd(suspects, call(1), call(2))
    entered = asyncio.Event()

    async def second() -> None:
        async with suspects.trial(call(2)):
            entered.set()

    async with suspects.trial(call(1)):
        waiting = asyncio.create_task(second())
        async with suspects.trial(call(3)):
            pass
        for _ in range(10):
            await asyncio.sleep(0)
        assert not entered.is_set()
    await waiting
    assert entered.is_set()


async def test_who_waited_behind_itself_is_refused_with_it() -> None:
    suspects = Suspects()
    await crowd(suspects, call(1), call(2))

    async def copy() -> str:
        return await ends(suspects, call(1, name="copy"))

    async with suspects.trial(call(1)) as trial:
        waiting = asyncio.create_task(copy())
        await asyncio.sleep(0)
        with pytest.raises(PoisonError):
            trial.died(last=False)
    assert await waiting == "refused"


async def test_only_so_many_texts_are_remembered() -> None:
    suspects = Suspects()
    for index in range(1_001):
        assert await ends(suspects, call(index), "again", "last") == "refused"
    assert not await refused(suspects, call(0))
    assert await refused(suspects, call(1))
