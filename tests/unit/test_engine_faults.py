"""What an engine does when something breaks in it, with faults put in around the real runners."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

import pytest
import torch

from serve_app.engine import native
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.client import EngineClient
from serve_app.engine.continuous import ContinuousEngine
from serve_app.engine.cpu import state
from serve_app.engine.cpu.runner import CpuRunner
from serve_app.engine.faults import out_of_memory, poisoned
from serve_app.engine.gpu import slots
from serve_app.engine.gpu.runner import TorchRunner
from serve_app.engine.protocol import (
    BatchRan,
    EngineRequest,
    EngineStoppedError,
    Failed,
    FailureReason,
    Finished,
    GenerationSettings,
    Stopped,
    Tokens,
)
from serve_app.engine.queue import Entry
from serve_app.engine.reference import ReferenceEngine
from serve_app.engine.runner import Advance, Plan, Runner
from tests.texts import texts
from tests.unit.conftest import Direct
from tests.unit.test_reference_engine import until

pytestmark = pytest.mark.anyio

GREEDY = GenerationSettings(min_new_tokens=30, max_new_tokens=30)
BEAMS = GenerationSettings(num_beams=2, min_new_tokens=30, max_new_tokens=30)
LONG = GenerationSettings(min_new_tokens=4_000, max_new_tokens=4_000)  # cancelled, or fails
CUDA = "CUDA error: an illegal memory access was encountered"
CPU_MEMORY = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
RUNNERS = [*native.supported()[:1], "torch"]


class FaultyRunner:
    """A runner in front of which faults stand; no step begins while the gate is closed."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.on_step: Callable[[list[Entry]], None] = lambda entries: None
        self.on_admit: Callable[[Sequence[Entry], list[Entry]], None] = lambda new, there: None
        self.leaks = False
        self.most_seen = 0  # documents in a step
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def admit(self, entries: Sequence[Entry]) -> None:
        self.on_admit(entries, self._runner.entries)
        self._runner.admit(entries)

    def leave(self, entries: Sequence[Entry]) -> None:
        if not self.leaks:
            self._runner.leave(entries)

    def step(self, only: Sequence[Entry] | None = None) -> list[Advance]:
        self.gate.wait(timeout=60)
        self.most_seen = max(self.most_seen, len(self._runner.entries))
        self.on_step(self._runner.entries)
        return self._runner.step(only)


class Seen(list[Any]):
    """All that an engine told, besides tokens."""

    @property
    def preempted(self) -> int:
        return sum(one.preempted for one in self if isinstance(one, BatchRan))

    @property
    def stopped(self) -> list[Stopped]:
        return [one for one in self if isinstance(one, Stopped)]


@asynccontextmanager
async def broken(
    checkpoint: Checkpoint, runner: str = RUNNERS[0], **options: Any
) -> AsyncIterator[tuple[EngineClient, FaultyRunner, Seen]]:
    made: list[FaultyRunner] = []

    class Engine(ContinuousEngine):
        @staticmethod
        def _make_runner(checkpoint: Checkpoint, plan: Plan) -> Any:
            kernels = None if runner == "torch" else native.open_library(runner)
            made.append(
                FaultyRunner(
                    TorchRunner(checkpoint, plan)
                    if kernels is None
                    else CpuRunner(checkpoint, plan, kernels)
                )
            )
            return made[0]

    seen = Seen()
    client = EngineClient(lambda emit: Engine(checkpoint, emit, threads=1, **options), seen.append)
    try:
        yield client, made[0], seen
    finally:
        await asyncio.to_thread(client.close)


async def together(
    client: EngineClient, faulty: FaultyRunner, requests: list[EngineRequest]
) -> list[Finished | Failed]:
    """How requests end that come at once: all have come before the first step is done."""
    faulty.gate.clear()
    tasks = [asyncio.create_task(client.run(request)) for request in requests]

    def all_came() -> bool:
        load = client.load()
        return load.waiting_requests + load.running_requests == len(requests)

    await until(all_came, "all have come")
    faulty.gate.set()
    return await asyncio.gather(*tasks)


def once(error: Exception, when: Callable[[list[Entry]], bool]) -> Callable[[list[Entry]], None]:
    """A fault that comes the first time that the batch is like this."""
    left = [error]

    def fault(entries: list[Entry]) -> None:
        if left and when(entries):
            raise left.pop()

    return fault


@cache
def _generated(direct: Direct, ids: tuple[int, ...], settings: GenerationSettings) -> list[int]:
    said = asdict(settings)
    if settings.num_beams == 1:
        del said["length_penalty"], said["early_stopping"]
    return direct.generate(ids, **said)


def generated(direct: Direct, ids: list[int], settings: GenerationSettings) -> list[int]:
    return _generated(direct, tuple(ids), settings)


@pytest.fixture(scope="module")
def inputs(direct: Direct) -> list[list[int]]:
    return [direct.ids(text) for text in texts(8)]


@pytest.fixture(params=["continuous", "reference"])
def poison(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Exception], tuple[EngineClient, Seen]]]:
    """Makes an engine whose every step fails with this."""
    made: list[EngineClient] = []

    def make(error: Exception) -> tuple[EngineClient, Seen]:
        def fail(*_: Any) -> Any:
            raise error

        seen = Seen()
        kind: Any = ReferenceEngine if request.param == "reference" else ContinuousEngine
        if request.param == "reference":
            monkeypatch.setattr(ReferenceEngine, "_forward", fail)
        client = EngineClient(lambda emit: kind(checkpoint, emit, threads=1), seen.append)
        if request.param == "continuous":
            client._engine._runner.step = fail  # type: ignore[attr-defined]
        made.append(client)
        return client, seen

    yield make
    for client in made:
        client.close()


# What breaks the engine


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError(CUDA), RuntimeError(CUDA)],
    ids=lambda error: type(error).__name__,
)
async def test_a_poisoned_device_ends_the_engine_with_all_in_it(
    poison: Any, inputs: list[list[int]], error: Exception
) -> None:
    client, seen = poison(error)
    requests = [EngineRequest(f"r{i}", ids, GREEDY) for i, ids in enumerate(inputs)]
    outcomes = await asyncio.gather(*map(client.run, requests), return_exceptions=True)
    failed = [one for one in outcomes if isinstance(one, Failed)]
    # Those that had not come in by then are refused.
    assert {type(one) for one in outcomes} <= {Failed, EngineStoppedError}
    assert failed
    assert {one.reason for one in failed} == {FailureReason.STOPPED}
    assert all("illegal memory access" in one.message for one in failed)
    [stopped] = seen.stopped
    assert seen[-1] is stopped
    assert client.stalled(1e9) == stopped.message
    with pytest.raises(EngineStoppedError, match="illegal memory access"):
        await client.run(EngineRequest("later", inputs[0], GREEDY))


async def test_an_error_in_the_scheduler_fails_who_runs_and_who_waits(
    checkpoint: Checkpoint, inputs: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    async with broken(checkpoint, max_batch_size=2) as (client, _, seen):
        long = [
            asyncio.create_task(client.run(EngineRequest(f"r{i}", ids, LONG, origin=f"o{i}")))
            for i, ids in enumerate(inputs)
        ]
        await until(lambda: client.load().waiting_requests == len(inputs) - 2, "two run")

        def pull() -> Any:
            raise KeyError("in the scheduler")

        client._engine._admit = pull  # type: ignore[attr-defined]
        outcomes = await asyncio.gather(*long)
        assert {one.reason for one in outcomes} == {FailureReason.STOPPED}
        # Who ran has used something, who waited has not.
        assert sum(one.usage.compute_ms > 0 for one in outcomes) == 2
        assert "in the scheduler" in str(client.stalled(1e9))
        load = client.load()
        assert (load.running_requests, load.waiting_requests, load.slots_used) == (0, 0, 0)
    [said] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert sorted(vars(said)["request_ids"]) == [f"o{i}" for i in range(len(inputs))]
    assert len(seen.stopped) == 1


@pytest.mark.parametrize("runner", RUNNERS)
async def test_a_slot_that_leaks_ends_the_engine(
    checkpoint: Checkpoint, inputs: list[list[int]], runner: str
) -> None:
    async with broken(checkpoint, runner) as (client, faulty, seen):
        faulty.leaks = True
        outcome = await client.run(EngineRequest("r", inputs[0], GREEDY))
        assert isinstance(outcome, Finished)  # it was done before anybody could know
        await until(lambda: seen.stopped, "the engine stops")
        assert "1 rows are taken" in seen.stopped[0].message or "1 run" in seen.stopped[0].message


async def test_a_request_that_nobody_holds_ends_the_engine(
    checkpoint: Checkpoint, inputs: list[list[int]]
) -> None:
    async with broken(checkpoint, max_batch_size=1) as (client, _, seen):
        engine: Any = client._engine
        running = asyncio.create_task(client.run(EngineRequest("runs", inputs[0], LONG)))
        await until(lambda: client.load().running_requests == 1, "one runs")
        waiting = asyncio.create_task(client.run(EngineRequest("waits", inputs[1], GREEDY)))
        await until(lambda: client.load().waiting_requests == 1, "one waits")
        with engine._lock:
            engine._waiting.pop()
        outcomes = [await running, await waiting]
        assert {one.reason for one in outcomes} == {FailureReason.STOPPED}
        assert "2 requests, but 0 wait and 1 run" in seen.stopped[0].message


# Out of memory


@pytest.mark.parametrize(
    ("runner", "error", "settings"),
    [
        (RUNNERS[0], MemoryError(), GREEDY),
        (RUNNERS[0], CPU_MEMORY, BEAMS),
        ("torch", torch.OutOfMemoryError("CUDA out of memory."), GREEDY),
        ("torch", torch.OutOfMemoryError("CUDA out of memory."), BEAMS),
    ],
    ids=["cpu-greedy", "cpu-beams", "torch-greedy", "torch-beams"],
)
async def test_out_of_memory_in_a_step_half_of_the_documents_start_again(
    checkpoint: Checkpoint,
    direct: Direct,
    inputs: list[list[int]],
    runner: str,
    error: Exception,
    settings: GenerationSettings,
) -> None:
    async with broken(checkpoint, runner, speculation=False) as (client, faulty, seen):
        # In the middle of their work, so that what they have so far is lost.
        faulty.on_step = once(
            error, lambda entries: len(entries) == 8 and all(one.made >= 10 for one in entries)
        )
        requests = [EngineRequest(f"r{i}", ids, settings) for i, ids in enumerate(inputs)]
        outcomes = await together(client, faulty, requests)
        for ids, outcome in zip(inputs, outcomes, strict=True):
            assert isinstance(outcome, Finished), outcome
            assert list(outcome.ids) == generated(direct, ids, settings)
            # The tokens that were made twice count once.
            assert outcome.usage.output_tokens == len(outcome.ids)
        assert seen.preempted == 4
        assert not seen.stopped
        load = client.load()
        assert (load.running_requests, load.waiting_requests, load.slots_used) == (0, 0, 0)


async def test_nobody_reads_a_token_twice_when_a_stream_starts_again(
    checkpoint: Checkpoint, direct: Direct, inputs: list[list[int]]
) -> None:
    async with broken(checkpoint, speculation=False) as (client, faulty, seen):
        faulty.on_step = once(
            MemoryError(), lambda all_: len(all_) == 4 and all(one.streamed > 5 for one in all_)
        )

        async def read(index: int) -> tuple[list[int], Finished]:
            ids: list[int] = []
            request = EngineRequest(f"r{index}", inputs[index], GREEDY, stream=True)
            async for event in client.events(request):
                if isinstance(event, Tokens):
                    ids.extend(event.ids)
                else:
                    assert isinstance(event, Finished)
                    return ids, event
            raise AssertionError("no end")

        faulty.gate.clear()
        reading = asyncio.gather(*map(read, range(4)))
        await until(
            lambda: client.load().waiting_requests + client.load().running_requests == 4, "all came"
        )
        faulty.gate.set()
        for index, (ids, end) in enumerate(await reading):
            assert ids == list(end.ids) == generated(direct, inputs[index], GREEDY)
        assert seen.preempted == 2


async def test_who_has_streamed_goes_on_when_others_can_start_again(
    checkpoint: Checkpoint, inputs: list[list[int]]
) -> None:
    put_back: list[str] = []
    async with broken(checkpoint, speculation=False) as (client, faulty, seen):
        engine: Any = client._engine
        really = engine._put_back

        def record(entries: list[Entry], error: Exception) -> None:
            put_back.extend(entry.request.id for entry in entries)
            really(entries, error)

        engine._put_back = record
        faulty.on_step = once(MemoryError(), lambda all_: len(all_) == 4)
        quiet = [
            asyncio.create_task(client.run(EngineRequest(f"quiet{i}", inputs[i], LONG)))
            for i in range(2)
        ]
        await until(lambda: client.load().running_requests == 2, "two run")
        early = client.events(EngineRequest("early", inputs[2], LONG, stream=True))
        assert isinstance(await anext(early), Tokens)
        # With the fourth comes the fault. It streams as well, but nothing has come of it yet.
        late = client.events(EngineRequest("late", inputs[3], LONG, stream=True))
        reading = asyncio.create_task(anext(late))
        await until(lambda: seen.preempted, "some are put back")
        for task in (*quiet, reading):
            task.cancel()
        await asyncio.gather(*quiet, reading, return_exceptions=True)
        await early.aclose()
    assert put_back == ["late", "quiet1"]


async def test_rows_are_fewer_for_a_while(checkpoint: Checkpoint, inputs: list[list[int]]) -> None:
    short = GenerationSettings(min_new_tokens=2, max_new_tokens=2)
    async with broken(checkpoint, max_batch_size=8, speculation=False) as (client, faulty, seen):

        async def most() -> int:
            """Most documents in a step, of 24 that come at once."""
            faulty.most_seen = 0
            requests = [EngineRequest(f"r{i}", inputs[i % 8], short) for i in range(24)]
            outcomes = await together(client, faulty, requests)
            assert {type(one) for one in outcomes} == {Finished}
            return faulty.most_seen

        faulty.on_step = once(MemoryError(), lambda entries: len(entries) == 8)
        assert await most() == 8
        assert seen.preempted == 4
        assert await most() == 4
        # Twice as many rows after 256 steps without a fault; so far there were a few dozen.
        long = GenerationSettings(min_new_tokens=260, max_new_tokens=260)
        assert isinstance(await client.run(EngineRequest("s", inputs[0], long)), Finished)
        assert await most() == 8


async def test_out_of_memory_in_encoding_the_batch_is_halved(
    checkpoint: Checkpoint, direct: Direct, inputs: list[list[int]]
) -> None:
    sizes: list[int] = []

    def two_at_most(new: Sequence[Entry], there: list[Entry]) -> None:
        sizes.append(len(new))
        if len(new) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    async with broken(checkpoint) as (client, faulty, _):
        faulty.on_admit = two_at_most
        requests = [EngineRequest(f"r{i}", ids, GREEDY) for i, ids in enumerate(inputs)]
        outcomes = await together(client, faulty, requests)
        assert max(sizes) > 2
        for ids, outcome in zip(inputs, outcomes, strict=True):
            assert isinstance(outcome, Finished)
            assert list(outcome.ids) == generated(direct, ids, GREEDY)


async def test_a_document_too_large_for_what_is_free_waits_and_for_what_there_is_fails(
    checkpoint: Checkpoint, inputs: list[list[int]]
) -> None:
    def room(new: Sequence[Entry], there: list[Entry]) -> None:
        large = any(one.request.id.startswith("large") for one in new)
        if any(one.request.id == "huge" for one in new) or (large and len(there) + len(new) > 1):
            raise MemoryError

    async with broken(checkpoint) as (client, faulty, seen):
        faulty.on_admit = room
        small = asyncio.create_task(client.run(EngineRequest("small", inputs[0], LONG)))
        await until(lambda: client.load().running_requests == 1, "one runs")
        large = asyncio.create_task(client.run(EngineRequest("large", inputs[1], GREEDY)))
        await until(lambda: seen.preempted > 0, "it has been tried")
        assert not large.done()
        small.cancel()
        assert isinstance(await large, Finished)

        huge = await client.run(EngineRequest("huge", inputs[2], BEAMS))
        assert isinstance(huge, Failed)
        assert huge.reason is FailureReason.ERROR
        assert f"out of memory, even alone, with {len(inputs[2])} input tokens" in huge.message
        assert "num_beams 2, max_new_tokens 30" in huge.message
        assert isinstance(await client.run(EngineRequest("next", inputs[3], GREEDY)), Finished)


async def test_a_document_that_is_alone_in_a_step_without_memory_fails(
    checkpoint: Checkpoint, inputs: list[list[int]]
) -> None:
    async with broken(checkpoint) as (client, faulty, seen):
        faulty.on_step = once(MemoryError(), lambda entries: True)
        outcome = await client.run(EngineRequest("r", inputs[0], GREEDY))
        assert isinstance(outcome, Failed)
        assert "out of memory, even alone" in outcome.message
        assert isinstance(await client.run(EngineRequest("s", inputs[0], GREEDY)), Finished)
        assert not seen.stopped


async def test_caches_that_could_not_grow_are_as_before(
    checkpoint: Checkpoint,
    direct: Direct,
    inputs: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels have addresses of what must grow."""
    wide = GenerationSettings(min_new_tokens=200, max_new_tokens=200)
    allocate, allocations = state.empty, 0

    def no_memory(*args: Any) -> Any:
        nonlocal allocations
        allocations += 1
        if allocations == 3:
            raise MemoryError
        return allocate(*args)

    async with broken(checkpoint, native.supported()[0]) as (client, faulty, _):
        faulty.gate.clear()
        running = asyncio.create_task(client.run(EngineRequest("r", inputs[0], GREEDY)))
        await until(lambda: client.load().running_requests == 1, "it runs")
        monkeypatch.setattr(state, "empty", no_memory)
        # More new tokens than the model's own limit: there is no room for them yet.
        wider = asyncio.create_task(client.run(EngineRequest("w", inputs[1], wide)))
        await until(lambda: client.load().waiting_requests == 1, "it waits")
        faulty.gate.set()
        outcomes = [await running, await wider]
        assert allocations > 3  # it was tried again, and could
        for ids, settings, outcome in zip(inputs, (GREEDY, wide), outcomes, strict=False):
            assert isinstance(outcome, Finished), outcome
            assert list(outcome.ids) == generated(direct, ids, settings)


async def test_documents_of_which_some_could_not_be_admitted_are_not_there(
    checkpoint: Checkpoint,
    direct: Direct,
    inputs: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch admits greedy documents and those with beams one after the other."""
    admit, left, greedy = slots.Group.admit, [MemoryError()], 0

    def fail(group: slots.Group, *args: Any) -> None:
        nonlocal greedy
        greedy += len(args[0]) if group.beams == 1 else 0
        if group.beams == 2 and greedy > 1 and left:
            raise left.pop()
        admit(group, *args)

    monkeypatch.setattr(slots.Group, "admit", fail)
    each = [GREEDY, BEAMS] * 4
    async with broken(checkpoint, "torch") as (client, faulty, _):
        requests = [
            EngineRequest(f"r{i}", ids, settings)
            for i, (ids, settings) in enumerate(zip(inputs, each, strict=True))
        ]
        outcomes = await together(client, faulty, requests)
        assert not left
        for ids, settings, outcome in zip(inputs, each, outcomes, strict=True):
            assert isinstance(outcome, Finished)
            assert list(outcome.ids) == generated(direct, ids, settings)


async def test_what_was_done_of_a_step_before_an_error_counts(
    checkpoint: Checkpoint,
    direct: Direct,
    inputs: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch steps greedy documents, then those with beams: the first cannot be done again."""
    launch, left = TorchRunner._launch, [MemoryError()]

    def fail(runner: TorchRunner, group: slots.Group) -> Any:
        if group.beams == 2 and len(runner._groups) == 2 and left and runner._groups[1].longest > 5:
            raise left.pop()
        return launch(runner, group)

    monkeypatch.setattr(TorchRunner, "_launch", fail)
    each = [GREEDY] * 4 + [BEAMS] * 4
    async with broken(checkpoint, "torch") as (client, faulty, seen):
        requests = [
            EngineRequest(f"r{i}", ids, settings)
            for i, (ids, settings) in enumerate(zip(inputs, each, strict=True))
        ]
        outcomes = await together(client, faulty, requests)
        for ids, settings, outcome in zip(inputs, each, outcomes, strict=True):
            assert isinstance(outcome, Finished)
            assert list(outcome.ids) == generated(direct, ids, settings)
        assert not left
        assert seen.preempted == 4


@pytest.mark.parametrize(
    ("error", "memory", "lost"),
    [
        (MemoryError(), True, False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (CPU_MEMORY, True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True, False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError(CUDA), False, True),
        (RuntimeError("The size of tensor a (3) must match"), False, False),
        (ValueError(CUDA), False, False),
        (IndexError("index out of range in self"), False, False),
    ],
    ids=str,
)
def test_errors_are_told_apart(error: Exception, memory: bool, lost: bool) -> None:
    assert (out_of_memory(error), poisoned(error)) == (memory, lost)
