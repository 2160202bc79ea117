"""One request from decided job to summary: tokenize, split, map, reduce, stream."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from serve_app.api.bill import Bill, Waits
from serve_app.api.lengths import TextStream, trim
from serve_app.api.requests import Job
from serve_app.api.schemas import Chunk, ModelRef, SummarizeResponse
from serve_app.api.splitting import Span, split
from serve_app.calls import Backend, Call
from serve_app.config import ApiSettings, Limits
from serve_app.engine.checkpoint import Checkpoint
from serve_app.engine.protocol import Finished, FinishReason, GenerationSettings
from serve_app.engine.tokenizer import Encoded, Tokenizer
from serve_app.errors import DeadlineError, invalid

_INLINE_CHARACTERS = 4096  # longer texts are tokenized off the event loop
# Longer ones take seconds, and so must leave threads to the others. So many at once may be split.
_LONG_CHARACTERS, _LONG_AT_ONCE = 65_536, 2
_T = TypeVar("_T")

# How much longer than the deadline an engine's answer is waited for: a decode step or an encoding
# of many tokens may have to end first.
_ANSWER_S = 1.0

_SPLIT_SLACK = 4  # tokens a part may gain when it is tokenized on its own


@dataclass(frozen=True, slots=True)
class Started:
    """Work begins; the text goes through in `chunks` parts."""

    id: str
    model: ModelRef
    chunks: int


@dataclass(frozen=True, slots=True)
class PartDone:
    """A part of a long document has its summary."""

    chunk: Chunk
    chunks: int


@dataclass(frozen=True, slots=True)
class Delta:
    """More of the summary's text."""

    text: str


ServiceEvent = Started | PartDone | Delta | SummarizeResponse


@dataclass(frozen=True, slots=True)
class _Part:
    span: Span
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Work:
    """A job whose text has been tokenized and split: what admission weighs and `events` does."""

    job: Job
    parts: list[_Part]
    truncated: bool
    deadline: _Deadline
    bill: Bill

    @property
    def tokens(self) -> int:
        """Input tokens of its parts. Passes over the parts' summaries come on top."""
        return sum(len(part.ids) for part in self.parts)


class SummaryService:
    """Summarizes texts with a model behind a `Backend`. Knows nothing of HTTP."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        limits: Limits,
        api: ApiSettings,
        max_input_tokens: int | None = None,
    ) -> None:
        self.model = ModelRef(name=checkpoint.name, revision=checkpoint.revision)
        self.defaults = checkpoint.defaults
        self.limits = limits
        self.backend = backend
        self.max_input_tokens = max_input_tokens or checkpoint.max_input_tokens
        self._tokenizer = Tokenizer(checkpoint)
        self._prefix = checkpoint.prefix
        self._waits = Waits()
        self._parts_in_flight = api.parts_in_flight
        self._long = asyncio.Semaphore(_LONG_AT_ONCE)
        prefix_tokens = len(self._tokenizer.encode(self._prefix).ids)
        self._part_budget = self.max_input_tokens - 1 - prefix_tokens - _SPLIT_SLACK

    async def plan(self, job: Job) -> Work:
        """Tokenize and split the text of a job; its deadline and its bill begin here.

        Raises:
            InvalidError: the text has more tokens than the limit, or than one pass takes with
                `on_overflow: error`.
            DeadlineError: the job's own deadline passed.
        """
        bill = Bill(self._waits)
        deadline = _Deadline(job.timeout_s, job.share)
        parts, truncated = await deadline.wait(self._plan(job))
        return Work(job, parts, truncated, deadline, bill)

    async def summarize(self, work: Work) -> SummarizeResponse:
        """The summary of a job. Raises as `events` does."""
        async with aclosing(self.events(work, stream=False)) as events:
            async for event in events:
                if isinstance(event, SummarizeResponse):
                    return event
        raise AssertionError("events() ends with the response")

    async def events(self, work: Work, *, stream: bool) -> AsyncGenerator[ServiceEvent]:
        """Run a job; the response is the last event, and `Delta`s concatenate to its summary.

        However it ends, `work.bill` has what it used.

        Raises:
            DeadlineError: the job's own deadline passed.
            OverloadedError, UnavailableError, EngineError: from the backend.
        """
        job, parts, truncated = work.job, work.parts, work.truncated
        deadline, bill = work.deadline, work.bill
        response_id = f"sum-{uuid.uuid4().hex}"
        yield Started(response_id, self.model, len(parts))
        chunks: list[Chunk] = []
        final = parts[0].ids
        if len(parts) > 1:
            async with aclosing(self._map(parts, job.part_settings, deadline, bill, "map")) as done:
                async for chunk in done:
                    chunks.append(chunk)
                    yield PartDone(chunk, len(parts))
            chunks.sort(key=lambda chunk: chunk.index)
            final, cut = await self._reduce(chunks, job.part_settings, deadline, bill)
            truncated = truncated or cut

        text = TextStream(self._tokenizer.decode, job.length)
        call = deadline.call(final, job.settings)
        output: Finished | None = None
        with bill.stage() as stage, stage.call(call) as meter:
            if stream and job.settings.num_beams == 1:
                async with aclosing(self.backend.stream(call)) as events:
                    while output is None:
                        event = await deadline.answer(anext(events))
                        if isinstance(event, Finished):
                            output = event
                            continue
                        meter.output_tokens += len(event.ids)
                        if delta := text.push(event.ids):
                            yield Delta(delta)
            else:
                output = await deadline.answer(self.backend.run(call))
            meter.usage = output.usage

        whole = self._tokenizer.decode(list(output.ids)).strip()
        summary = trim(whole, job.length) if job.length else whole
        if delta := text.finish(summary):
            yield Delta(delta)
        cut_short = job.length is not None and text.text != whole
        yield SummarizeResponse(
            id=response_id,
            model=self.model,
            summary=text.text,
            truncated=truncated,
            finish_reason="length" if cut_short else _reason(output.reason),
            chunks=chunks,
            usage=bill.body(len(parts)),
        )

    async def _plan(self, job: Job) -> tuple[list[_Part], bool]:
        if len(job.text) <= _INLINE_CHARACTERS:
            return self._parts(job)
        if len(job.text) <= _LONG_CHARACTERS:
            return await asyncio.to_thread(self._parts, job)
        async with self._long:
            return await asyncio.to_thread(self._parts, job)

    def _parts(self, job: Job) -> tuple[list[_Part], bool]:
        """Encoder inputs for the text, and whether part of it was left out."""
        ids, overflows = self._tokenizer.model_input(self._prefix + job.text, self.max_input_tokens)
        whole = [_Part(Span(0, len(job.text)), ids)]
        if not overflows:
            return whole, False
        encoded = self._tokenizer.encode(job.text)
        count = len(encoded.ids)
        limit = self.limits.input_tokens
        if count > limit:
            message = f"must have at most {limit} tokens, has {count}"
            raise invalid("text", message, limit=limit, value=count)
        if job.on_overflow == "error":
            most = self._part_budget + _SPLIT_SLACK
            message = (
                f"must have at most {most} tokens, has {count}; "
                "on_overflow can be truncate or map_reduce instead"
            )
            raise invalid("text", message, limit=most, value=count)
        if job.on_overflow == "truncate":
            return whole, True
        return self._split(job.text, encoded), False

    def _split(self, text: str, encoded: Encoded) -> list[_Part]:
        """Parts of a long text, each checked to fit when tokenized on its own."""
        budget = self._part_budget
        while True:
            parts: list[_Part] = []
            fits = True
            for span in split(text, encoded, budget):
                part = self._prefix + text[span.start : span.end]
                ids, overflows = self._tokenizer.model_input(part, self.max_input_tokens)
                fits = fits and not overflows
                parts.append(_Part(span, ids))
            if fits or budget <= 1:
                return parts
            budget = budget * 3 // 4

    async def _map(
        self,
        parts: list[_Part],
        settings: GenerationSettings,
        deadline: _Deadline,
        bill: Bill,
        stage: str,
    ) -> AsyncGenerator[Chunk]:
        """Summarize parts side by side, in the batch they share with everyone else's."""
        # A part's summary must be shorter than the part, or reducing would not end.
        most = max(self._part_budget // 2, 1)
        settings = replace(
            settings,
            max_new_tokens=min(settings.max_new_tokens, most),
            min_new_tokens=min(settings.min_new_tokens, most),
        )
        slots = asyncio.Semaphore(self._parts_in_flight)
        with bill.stage() as meters:

            async def run(index: int, part: _Part) -> tuple[int, Finished]:
                async with slots:
                    call = deadline.call(part.ids, settings, stage)
                    with meters.call(call) as meter:
                        output = await self.backend.run(call)
                        meter.usage = output.usage
                    return index, output

            tasks = [asyncio.create_task(run(index, part)) for index, part in enumerate(parts)]
            try:
                for next_done in asyncio.as_completed(tasks):
                    index, output = await deadline.answer(next_done)
                    span = parts[index].span
                    summary = self._tokenizer.decode(list(output.ids)).strip()
                    yield Chunk(index=index, start=span.start, end=span.end, summary=summary)
            finally:
                for task in tasks:
                    task.cancel()
                # Wait, so that no task outlives its request, and each is on the bill; what they
                # raise has been seen or is moot.
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _reduce(
        self, chunks: list[Chunk], settings: GenerationSettings, deadline: _Deadline, bill: Bill
    ) -> tuple[list[int], bool]:
        """Encoder input of the final pass: the parts' summaries, themselves reduced until they fit.

        The second value tells whether some of them had to be left out, which takes a document so
        long that the most rounds allowed did not get it down.
        """
        summaries = [chunk.summary for chunk in chunks]
        for round_ in range(self.limits.reduce_rounds + 1):
            text = "\n".join(summary for summary in summaries if summary.strip()) or "."
            ids, overflows = await asyncio.to_thread(
                self._tokenizer.model_input, self._prefix + text, self.max_input_tokens
            )
            if not overflows or round_ == self.limits.reduce_rounds:
                return ids, overflows
            encoded = await asyncio.to_thread(self._tokenizer.encode, text)
            parts = await asyncio.to_thread(self._split, text, encoded)
            async with aclosing(self._map(parts, settings, deadline, bill, "reduce")) as done:
                reduced = [chunk async for chunk in done]
            summaries = [chunk.summary for chunk in sorted(reduced, key=lambda chunk: chunk.index)]
        raise AssertionError("unreachable")


class _Deadline:
    """The request's own deadline, for calls (the engine drops late work) and for waits."""

    def __init__(self, timeout_s: float, share: str) -> None:
        self._timeout_s = timeout_s
        self._share = share
        self._at = time.monotonic() + timeout_s

    def call(self, ids: list[int], settings: GenerationSettings, stage: str = "final") -> Call:
        """A call with what is left of the time.

        Raises:
            DeadlineError: nothing is: it would cost an engine, and nobody waits for it.
        """
        left = self._at - time.monotonic()
        if left <= 0:
            raise self._late()
        return Call(uuid.uuid4().hex, ids, settings, left, self._share, stage)

    async def answer(self, awaitable: Awaitable[_T]) -> _T:
        """Wait for an engine, which ends late calls by itself and then tells what they cost."""
        return await self.wait(awaitable, _ANSWER_S)

    async def wait(self, awaitable: Awaitable[_T], beyond_s: float = 0.0) -> _T:
        # Around single waits, never around a `yield`: a timeout must not fire in the reader.
        try:
            async with asyncio.timeout(self._at + beyond_s - time.monotonic()):
                return await awaitable
        except TimeoutError:
            late = self._late()
            late.usage = None
            raise late from None

    def _late(self) -> DeadlineError:
        return DeadlineError(
            f"the deadline (timeout_s: {self._timeout_s:g}) passed before the summary was done"
        )


def _reason(reason: FinishReason) -> Literal["stop", "max_new_tokens"]:
    return "stop" if reason is FinishReason.STOP else "max_new_tokens"
