"""The routes that summarize: one text, many texts, the Hugging Face task, the model's facts."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from anyio import CancelScope
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from serve_app.api.openapi import batch_body, hf_body, summarize_body
from serve_app.api.requests import Job, decide, from_hf, read_json, read_summarize
from serve_app.api.schemas import (
    BatchItem,
    BatchRequest,
    BatchResponse,
    HfRequest,
    HfResponse,
    Problem,
    SummarizeResponse,
)
from serve_app.api.service import Delta, PartDone, ServiceEvent, Started, SummaryService, Work
from serve_app.errors import ServiceError, invalid

router = APIRouter()

_KEEPALIVE_S = 10.0
_STATUS_HELD_S = 0.25


@router.post(
    "/v1/summarize",
    summary="Summarize a text",
    tags=["summarize"],
    response_model=SummarizeResponse,
    openapi_extra=summarize_body,
)
async def summarize(request: Request) -> Response:
    """Summarize one text, at once or as server-sent events."""
    service = _service(request)
    _enter(request)
    body = await read_summarize(request, service.limits)
    job = decide(body.text, body, service.defaults, service.limits, share=request.state.client)
    stream = body.stream or _wants_events(request)
    _asked(request, service, job, [body.text], stream=stream)
    work = await service.plan(job)
    _admit(request, [work])
    if stream:
        return await _stream(request, service, work)
    response = await _run(request, service, work)
    return JSONResponse(response.model_dump())


@router.post(
    "/v1/summarize/batch",
    summary="Summarize several texts",
    tags=["summarize"],
    response_model=BatchResponse,
    openapi_extra=batch_body,
)
async def summarize_batch(request: Request) -> Response:
    """Summarize several texts; each gets a result or an error of its own, in order."""
    service = _service(request)
    _enter(request)
    body = await read_json(request, BatchRequest, service.limits)
    limit = service.limits.batch_texts
    if len(body.texts) > limit:
        message = f"must have at most {limit} texts, has {len(body.texts)}"
        raise invalid("texts", message, limit=limit, value=len(body.texts))
    # Settings are the same for all: what is wrong with them is wrong with the request.
    settled = decide("text", body, service.defaults, service.limits)
    _asked(request, service, settled, body.texts)

    async def plan(index: int, text: str) -> Work | ServiceError:
        try:
            field, share = f"texts.{index}", request.state.client
            return await service.plan(
                decide(text, body, service.defaults, service.limits, field, share)
            )
        except ServiceError as error:
            return error

    async def one(index: int, planned: Work | ServiceError) -> BatchItem:
        try:
            if isinstance(planned, ServiceError):
                raise planned
            return BatchItem(index=index, result=await service.summarize(planned))
        except ServiceError as error:
            request.app.state.telemetry.failed(error)
            problem = error.problem(request.state.request_id)
            return BatchItem(index=index, error=Problem.model_validate(problem))

    # All are weighed before any runs: limits let a request in, or not, as a whole.
    plans = await asyncio.gather(*(plan(i, text) for i, text in enumerate(body.texts)))
    works = [planned for planned in plans if isinstance(planned, Work)]
    _admit(request, works)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i, planned)) for i, planned in enumerate(plans)]
        items = [task.result() for task in tasks]
    finally:
        _bill(request, works)
    _made(request, [item.result for item in items if item.result is not None])
    answer = BatchResponse(id=f"bat-{uuid.uuid4().hex}", results=items)
    return JSONResponse(answer.model_dump(exclude_none=True))


@router.post(
    "/hf/summarization",
    summary="The Hugging Face Inference API's summarization task",
    tags=["compatibility"],
    response_model=list[HfResponse],
    openapi_extra=hf_body,
)
async def hf_summarization(request: Request) -> Response:
    """What `huggingface_hub.InferenceClient(model=URL).summarization(text)` calls."""
    service = _service(request)
    _enter(request)
    body = from_hf(await read_json(request, HfRequest, service.limits))
    share = request.state.client
    job = decide(body.text, body, service.defaults, service.limits, "inputs", share)
    _asked(request, service, job, [body.text])
    work = await service.plan(job)
    _admit(request, [work])
    response = await _run(request, service, work)
    return JSONResponse([HfResponse(summary_text=response.summary).model_dump()])


@router.get("/v1/models", summary="The model, its defaults and the limits", tags=["models"])
async def models(request: Request) -> dict[str, Any]:
    """The one model this service runs."""
    service = _service(request)
    defaults = service.defaults
    model = {
        "id": service.model.name,
        "object": "model",
        "revision": service.model.revision,
        "max_input_tokens_per_part": service.max_input_tokens,
        "defaults": {name: getattr(defaults, name) for name in defaults.__slots__},
        "limits": service.limits.model_dump(),
    }
    return {"object": "list", "data": [model]}


def _service(request: Request) -> SummaryService:
    service: SummaryService = request.app.state.service
    return service


def _enter(request: Request) -> None:
    """Count the request against its client's limits; the middleware sees to its leaving."""
    turn = request.app.state.limiter.turn(request.state.client)
    if turn is not None:
        request.state.turn = turn
        turn.enter()


def _admit(request: Request, works: list[Work]) -> None:
    """Weigh the request's texts against its client's limits.

    Raises:
        RateLimitedError: not now.
    """
    tokens = sum(work.tokens for work in works)
    _note(request, asked_tokens=tokens)
    turn = getattr(request.state, "turn", None)
    if turn is not None:
        turn.take(tokens)


async def _run(request: Request, service: SummaryService, work: Work) -> SummarizeResponse:
    try:
        response = await service.summarize(work)
    finally:
        _bill(request, [work])
    _made(request, [response])
    return response


def _wants_events(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "").lower()


async def _stream(request: Request, service: SummaryService, work: Work) -> Response:
    """Server-sent events.

    The status line is held back until the first event, and a moment longer, so that a text that
    is refused or a queue that is full still gets a status of its own.
    """
    events = service.events(work, stream=True)
    try:
        first = await anext(events)
        second = asyncio.ensure_future(anext(events))
        try:
            await asyncio.wait([second], timeout=_STATUS_HELD_S)
        except BaseException:
            second.cancel()
            raise
        if second.done() and isinstance(error := second.exception(), ServiceError):
            raise error
    except BaseException:
        await events.aclose()
        _bill(request, [work])
        raise
    # Until the end is reached: a reader that leaves may do so between any two frames.
    _note(request, error_type="client-closed")
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventSourceResponse(_frames(request, work, first, second, events), headers=headers)


async def _frames(
    request: Request,
    work: Work,
    first: ServiceEvent,
    second: asyncio.Future[ServiceEvent],
    events: AsyncGenerator[ServiceEvent],
) -> AsyncIterator[bytes]:
    pending: asyncio.Future[ServiceEvent] | None = second
    try:
        yield _frame(*_event(first))
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait([pending], timeout=_KEEPALIVE_S)
            if not done:
                yield KEEPALIVE_COMMENT
                continue
            task, pending = pending, None
            event = task.result()
            if isinstance(event, SummarizeResponse):
                _made(request, [event])
                del request.state.facts["error_type"]
            yield _frame(*_event(event))
    except StopAsyncIteration:
        return
    except ServiceError as error:
        request.app.state.telemetry.failed(error)
        _note(request, error_type=error.kind)
        yield _frame("error", error.problem(request.state.request_id))
    finally:
        # The reader may have left: stop the work behind the stream before the stream ends. The
        # response cancels whatever is awaited here, over and over, were it not for the shield.
        with CancelScope(shield=True):
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await events.aclose()
        _bill(request, [work])


def _event(event: ServiceEvent) -> tuple[str, dict[str, Any]]:
    match event:
        case Started():
            said = {"id": event.id, "model": event.model.model_dump(), "chunks": event.chunks}
            return "start", said
        case PartDone():
            return "chunk", {**event.chunk.model_dump(), "chunks": event.chunks}
        case Delta():
            return "delta", {"text": event.text}
        case SummarizeResponse():
            return "done", event.model_dump()


def _frame(name: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data, ensure_ascii=False))


def _note(request: Request, **facts: object) -> None:
    """Add facts to the request's usage event (`usage.events.FACTS`)."""
    given = {name: value for name, value in facts.items() if value is not None}
    request.state.facts = {**getattr(request.state, "facts", {}), **given}


def _asked(
    request: Request, service: SummaryService, job: Job, texts: list[str], *, stream: bool = False
) -> None:
    """Put what was asked for into the usage event: settings and sizes, never the texts."""
    length = job.length
    _note(
        request,
        model=service.model.name,
        model_revision=service.model.revision,
        num_beams=job.settings.num_beams,
        max_new_tokens=job.settings.max_new_tokens,
        length_words=length and length.words,
        length_sentences=length and length.sentences,
        on_overflow=job.on_overflow,
        stream=stream,
        texts=len(texts),
        characters=sum(map(len, texts)),
    )


def _made(request: Request, responses: list[SummarizeResponse]) -> None:
    """Put the summaries that were made into the usage event and the metrics."""
    for response in responses:
        request.app.state.telemetry.summary(
            truncated=response.truncated, chunks=response.usage.chunks
        )
    # Nothing is cached: every summary is made by the model.
    _note(request, truncated=sum(response.truncated for response in responses), cached=0)


def _bill(request: Request, works: list[Work]) -> None:
    """Put what the texts have cost into the usage event, however they ended."""
    bills = [work.bill for work in works]
    _note(
        request,
        chunks=sum(len(work.parts) for work in works),
        input_tokens=sum(bill.input_tokens for bill in bills),
        output_tokens=sum(bill.output_tokens for bill in bills),
        queue_ms=round(sum((bill.queue_ms for bill in bills), 0.0), 2),
        compute_ms=round(sum((bill.compute_ms for bill in bills), 0.0), 2),
        estimated=any(bill.estimated for bill in bills) or None,
    )
