"""An engine seen from asyncio: events of its thread handed to the coroutines that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from serve_app.engine.protocol import (
    BatchRan,
    Emit,
    Engine,
    EngineLoad,
    EngineRequest,
    EngineStoppedError,
    Event,
    Failed,
    Finished,
    Stopped,
    Tokens,
)
from serve_app.engine.work import Work

MakeEngine = Callable[[Emit], Engine]


class EngineClient:
    """Owns an engine and serves any number of coroutines of one event loop.

    Args:
        make_engine: builds the engine around the callback it is given.
        on_event: called on the loop for every batch that went through the model, for the end of
            every request, whether anyone still waits for it or not, and when the engine stops.
    """

    def __init__(
        self,
        make_engine: MakeEngine,
        on_event: Callable[[BatchRan | Finished | Failed | Stopped], None] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._inboxes: dict[str, asyncio.Queue[Event]] = {}
        self._on_event = on_event
        self._engine = make_engine(self._emit)

    def load(self) -> EngineLoad:
        """Load figures of the engine."""
        return self._engine.load()

    def work(self) -> Work | None:
        """The engine's work; see `Engine.work`."""
        return self._engine.work()

    def stalled(self, limit_s: float) -> str | None:
        """Why the engine makes no progress, or None."""
        return self._engine.stalled(limit_s)

    async def events(self, request: EngineRequest) -> AsyncGenerator[Tokens | Finished | Failed]:
        """Run a request; the last event is `Finished` or `Failed`.

        `Tokens` that piled up while the reader was busy come as one. Leaving the iterator early,
        by `aclose()` or cancellation, cancels the request in the engine.

        Raises:
            QueueFullError, EngineStoppedError: from `Engine.submit`.
            ValueError: the id is in use.
        """
        if request.id in self._inboxes:
            raise ValueError(f"request id {request.id!r} is already in the engine")
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._inboxes[request.id] = inbox
        over = False
        try:
            self._engine.submit(request)
            while not over:
                batch = [await inbox.get()]
                while not inbox.empty():
                    batch.append(inbox.get_nowait())
                ids = [i for event in batch if isinstance(event, Tokens) for i in event.ids]
                last = batch[-1]
                over = isinstance(last, Finished | Failed)
                if ids:
                    yield Tokens(request.id, ids)
                if isinstance(last, Finished | Failed):
                    yield last
        finally:
            del self._inboxes[request.id]
            if not over:
                self._engine.cancel(request.id)

    async def run(self, request: EngineRequest) -> Finished | Failed:
        """Run a request to its end. Raises as `events` does."""
        async for event in self.events(request):
            if isinstance(event, Finished | Failed):
                return event
        raise EngineStoppedError("the engine ended the request without a result")

    def close(self) -> None:
        """Stop the engine. Blocks until its thread has ended."""
        self._engine.close()

    def _emit(self, events: list[Event]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._deliver, events)
        except RuntimeError:  # the loop is closed: nobody is left to read
            return

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if self._on_event is not None and not isinstance(event, Tokens):
                self._on_event(event)
            if (inbox := self._inboxes.get(event.id)) is not None:
                inbox.put_nowait(event)
