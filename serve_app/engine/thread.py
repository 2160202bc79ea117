"""What all engines share: a thread, a bounded queue, cancellation, deadlines, load figures."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.faults import let_go, out_of_memory, poisoned
from serve_app.engine.pace import Pace
from serve_app.engine.protocol import (
    Emit,
    EngineLoad,
    EngineRequest,
    EngineStoppedError,
    Event,
    Failed,
    FailureReason,
    Finished,
    QueueFullError,
    Stopped,
    TooLateError,
)
from serve_app.engine.queue import Entry, FairQueue
from serve_app.engine.work import Meter, Tally, Work

logger = logging.getLogger(__name__)

_RATE_SMOOTHING = 0.3  # weight of the newest sample in the drain rate


class EngineThread:
    """Base of the engines. Subclasses say what one unit of `_work` is.

    Starts working when it is made, once the model is loaded.

    Args:
        checkpoint: the model to load.
        emit: called on the engine's thread with the events of each unit of work.
        device: torch device, e.g. `"cpu"` or `"cuda"`.
        dtype: torch dtype name of the weights, e.g. `"float32"`.
        threads: intra-op threads on the CPU; 0 keeps torch's choice.
        max_batch_size: bound of the batch; 0: what suits engine and device.
        max_batch_tokens: most padded encoder tokens encoded at once.
        max_waiting_requests: bound of the queue.
        max_waiting_tokens: bound of the queue in encoder tokens.
        speculation: whether greedy requests may be advanced by lookup, where the engine can.

    Raises:
        Exception: whatever loading the model raised.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        emit: Emit,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 0,
        max_batch_size: int = 0,
        max_batch_tokens: int = 4_096,
        max_waiting_requests: int = 512,
        max_waiting_tokens: int = 262_144,
        speculation: bool = True,
    ) -> None:
        self._checkpoint = checkpoint
        self._emit = emit
        self._device = device
        self._dtype = dtype
        self._threads = threads
        self._speculation = speculation
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._max_waiting_requests = max_waiting_requests
        self._max_waiting_tokens = max_waiting_tokens
        self._lock = threading.Condition()
        self._waiting = FairQueue()
        self._running: list[Entry] = []
        self._by_id: dict[str, Entry] = {}
        self._closing = False
        self._broken: str | None = None  # why the engine has stopped
        self._drain_rate: float | None = None
        self._steps = 0
        self._last_step: float | None = None
        self._busy_since: float | None = None
        self._slots = 0  # rows of the running batch
        self._slots_used = 0
        self._tally = Tally()
        self._meter: Meter | None = None
        self._sweep_at = math.inf  # when the first request that waits may be late
        self._opened = threading.Event()
        self._open_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="t5-engine", daemon=True)
        self._thread.start()
        self._opened.wait()
        if self._open_error is not None:
            raise self._open_error

    def submit(self, request: EngineRequest) -> None:
        """See `Engine.submit`."""
        with self._lock:
            if self._broken is not None:
                raise EngineStoppedError(self._broken)
            if self._closing or not self._thread.is_alive():
                raise EngineStoppedError("the engine has stopped")
            if request.id in self._by_id:
                raise ValueError(f"request id {request.id!r} is already in the engine")
            entry = Entry(request, arrived=time.monotonic())
            bounds = self._max_waiting_requests, self._max_waiting_tokens
            if (bound := self._waiting.full(entry, *bounds)) is not None:
                raise QueueFullError(f"the queue is full: {bound}", self._load())
            self._refuse_late(entry)
            self._by_id[request.id] = entry
            self._waiting.push(entry)
            if request.deadline is not None:
                self._sweep_at = min(self._sweep_at, request.deadline)
            self._lock.notify()

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""
        with self._lock:
            if (entry := self._by_id.get(request_id)) is not None:
                entry.cancelled = True
                self._sweep_at = 0
                self._lock.notify()

    def load(self) -> EngineLoad:
        """See `Engine.load`."""
        with self._lock:
            return self._load()

    def work(self) -> Work | None:
        """See `Engine.work`."""
        with self._lock:
            if self._meter is None:
                self._meter = Meter(self._slots)
            self._meter.read(self._tally)
            waiting, running = [0.0, 0.0], [0.0, 0.0]
            for entry in self._by_id.values():
                total = running if entry.started else waiting
                total[0] += 0 if entry.encoded else entry.tokens
                total[1] += self._row_steps(entry, self._meter)
            return self._meter.work((waiting[0], waiting[1]), (running[0], running[1]))

    def stalled(self, limit_s: float) -> str | None:
        """See `Engine.stalled`."""
        with self._lock:
            if self._broken is not None:
                return self._broken
            if not self._thread.is_alive():
                return "the engine thread has died"
            age = self._no_progress_s()
            return f"no step for {age:.0f} s while busy" if age > limit_s else None

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            self._closing = True
            for entry in self._by_id.values():
                entry.cancelled = True
            self._sweep_at = 0
            self._lock.notify()
        self._thread.join(timeout=30)

    # The engine's thread from here on.

    def _open(self) -> None:
        """Load the model.

        On this thread, and nothing of torch on any other: each thread that computes gets an OpenMP
        team of its own, and with more threads in teams than there are CPUs, libgomp puts waiting
        threads to sleep at once. That cost a decode step of 14 ms another 10 ms.
        """
        raise NotImplementedError

    def _work(self) -> None:
        """Do one unit of work: something waits, or runs."""
        raise NotImplementedError

    def _run(self) -> None:
        try:
            if self._threads:
                torch.set_num_threads(self._threads)
            self._open()
            self._pace = Pace(self._slots)
        except Exception as error:
            self._open_error = error
            return
        finally:
            self._opened.set()
        try:
            while self._turn():
                self._check()
        except Exception as error:
            self._break_down(error)

    def _turn(self) -> bool:
        """Wait for work and do one unit of it; false once the engine is closed and empty."""
        with self._lock:
            while not (len(self._waiting) or self._running or self._closing):
                self._busy_since = None
                self._lock.wait()
            now = time.monotonic()
            # Cancelled and late requests leave the queue before they cost compute.
            dead = self._sweep(now) if now >= self._sweep_at else []
            stop = self._closing and not self._running and not len(self._waiting)
            if self._busy_since is None:
                self._busy_since = now
        self._finish([failed for entry in dead if (failed := failure(entry, now=now))])
        if not stop and (len(self._waiting) or self._running):
            self._work()
        return not stop

    def _check(self) -> None:
        """Assert that every request is in the queue or in the batch, and nothing else is.

        Always on: what leaks here starves the service without a word.
        """
        with self._lock:
            waiting, running, known = len(self._waiting), len(self._running), len(self._by_id)
        if waiting + running != known:
            raise AssertionError(f"{known} requests, but {waiting} wait and {running} run")

    def _break_down(self, error: Exception) -> None:
        """End with an error that is no single request's: all fail, and none gets in any more."""
        message = f"the engine has stopped: {type(error).__name__}: {error}"
        with self._lock:
            self._broken = message
            lost = list(self._by_id.values())
            self._by_id.clear()
            self._waiting = FairQueue()
            self._running, self._slots_used = [], 0
        ids = [entry.origin for entry in lost]
        logger.critical("the engine has stopped", exc_info=error, extra={"request_ids": ids})
        events: list[Event] = []
        now = time.monotonic()
        for entry in lost:
            usage = entry.usage(now)
            events.append(Failed(entry.request.id, FailureReason.STOPPED, message, usage))
        self._emit([*events, Stopped(message)])

    def _sweep(self, now: float) -> list[Entry]:
        """Take from the queue whom nobody waits for any more, and see who will be next."""
        dead = self._waiting.take(partial(failure, now=now))
        deadlines = (entry.request.deadline for entry in self._waiting)
        self._sweep_at = min((d for d in deadlines if d is not None), default=math.inf)
        return dead

    def _finish(self, events: Sequence[Event]) -> None:
        """Forget the requests these events end, then hand the events out."""
        with self._lock:
            for event in events:
                if isinstance(event, Finished | Failed):
                    entry = self._by_id.pop(event.id, None)
                    if entry is not None:
                        entry.over = True
        if events:
            self._emit(list(events))

    def _isolate(
        self, batch: list[Entry], error: Exception, work: Callable[[list[Entry]], None]
    ) -> None:
        """Called when `work` failed on a batch: one bad request must not take the others with it.

        Halves the batch until the bad one stands alone, and fails that.

        Raises:
            Exception: `error`, if nothing can be done on the device any more.
        """
        if poisoned(error):
            raise error
        ids = [entry.origin for entry in batch]
        logger.error(
            "%d requests failed together", len(batch), exc_info=error, extra={"request_ids": ids}
        )
        let_go(error)
        if len(batch) == 1:
            self._finish([broken(batch[0], error)])
            return
        middle = len(batch) // 2
        work(batch[:middle])
        work(batch[middle:])

    def _drained(self, input_tokens: int, seconds: float) -> None:
        """Measure: requests of so many input tokens were done in so many seconds of work."""
        rate = input_tokens / max(seconds, 1e-6)
        with self._lock:
            old = self._drain_rate
            self._drain_rate = rate if old is None else old + _RATE_SMOOTHING * (rate - old)

    def _stepped(self) -> None:
        with self._lock:
            self._steps += 1
            self._last_step = time.monotonic()

    def _load(self) -> EngineLoad:
        age = None if self._last_step is None else time.monotonic() - self._last_step
        return EngineLoad(
            waiting_requests=len(self._waiting),
            waiting_tokens=self._waiting.tokens,
            running_requests=len(self._running),
            steps=self._steps,
            drain_tokens_per_s=self._drain_rate,
            last_step_age_s=age,
            no_progress_s=self._no_progress_s(),
            slots=self._slots,
            slots_used=self._slots_used,
        )

    @staticmethod
    def _row_steps(entry: Entry, meter: Meter) -> float:
        """Rows times steps until it will be done, if it becomes as long as others."""
        settings = entry.request.settings
        most = settings.max_new_tokens / meter.made_per_step
        steps = most if meter.steps is None else min(most, meter.steps)
        return settings.num_beams * max(steps - entry.made / meter.made_per_step, 1.0)

    def _refuse_late(self, entry: Entry) -> None:
        """Raise `TooLateError` for a request that would only wait to be late."""
        running = [one for one in self._by_id.values() if one.started]
        ahead = self._waiting.before(entry.request.share)
        late_s = self._pace.late_s(entry, running, ahead, entry.arrived)
        if late_s is not None:
            raise TooLateError(late_s, self._load())

    def _no_progress_s(self) -> float:
        if self._busy_since is None:
            return 0.0
        return time.monotonic() - max(self._last_step or 0.0, self._busy_since)


def padded(batch: Sequence[Entry], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Input ids, int64, and mask, true for real tokens, both (requests, longest)."""
    rows = [list(entry.request.input_ids) for entry in batch]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def broken(entry: Entry, error: Exception) -> Failed:
    """The end of a request that the engine failed on."""
    message = f"{type(error).__name__}: {error}"
    if out_of_memory(error):
        settings = entry.request.settings
        message = (
            f"out of memory, even alone, with {entry.tokens} input tokens, "
            f"num_beams {settings.num_beams}, max_new_tokens {settings.max_new_tokens}: {message}"
        )
    usage = entry.usage(time.monotonic())
    return Failed(entry.request.id, FailureReason.ERROR, message, usage)


def failure(entry: Entry, now: float) -> Failed | None:
    """Why nobody waits for this request any more, or None."""
    if entry.cancelled:
        reason, message = FailureReason.CANCELLED, "cancelled"
    elif entry.late(now):
        reason, message = FailureReason.DEADLINE, "the deadline has passed"
    else:
        return None
    return Failed(entry.request.id, reason, message, entry.usage(now))
