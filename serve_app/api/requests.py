"""From a request's body and options to a plan of work: reading, checking, limits, defaults."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from serve_app.api.schemas import (
    HfGenerateParameters,
    HfRequest,
    Length,
    SummarizeOptions,
    SummarizeRequest,
)
from serve_app.config import Limits
from serve_app.engine.protocol import GenerationSettings
from serve_app.errors import (
    BadRequestError,
    BodyTooLargeError,
    DeadlineError,
    FieldError,
    InvalidError,
    UnsupportedMediaTypeError,
    invalid,
)

Body = TypeVar("Body", bound=BaseModel)

_TOKENS_PER_WORD = 2  # T5's vocabularies need about 1.4 for English, more for other languages
_SPARE_TOKENS = 16
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_CONSTRAINTS = ("ge", "gt", "le", "lt", "max_length", "min_length", "expected", "multiple_of")


async def read_json(request: Request, model: type[Body], limits: Limits) -> Body:
    """The JSON body, of at most `limits.body_bytes`, as `model`.

    Raises:
        UnsupportedMediaTypeError, BodyTooLargeError, BadRequestError, InvalidError: what was
            wrong, by field.
        DeadlineError: it took longer to arrive than `limits.timeout_s`.
    """
    _check_encoding(request)
    if _media_type(request) != "application/json":
        _refuse_type(request, "application/json")
    return parse(model, _load_json(await _read_body(request, limits)))


async def read_summarize(request: Request, limits: Limits) -> SummarizeRequest:
    """The body of `POST /v1/summarize`: JSON, or plain text with the options in the query."""
    media_type = _media_type(request)
    if media_type == "application/json":
        return await read_json(request, SummarizeRequest, limits)
    _check_encoding(request)
    if media_type != "text/plain":
        _refuse_type(request, "application/json or text/plain")
    charset = _charset(request)
    try:
        text = (await _read_body(request, limits)).decode(charset)
    except UnicodeDecodeError as error:
        raise BadRequestError(f"body: not {charset} at byte {error.start}") from None
    return parse(SummarizeRequest, {**_query_options(request), "text": text})


def parse(model: type[Body], content: Any) -> Body:
    """Validate `content`; every broken rule becomes a field error with limit and value."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        errors = [_field_error(detail) for detail in error.errors(include_url=False)]
        first = errors[0]
        raise InvalidError(f"{first.field}: {first.message}", errors) from None


def check_text(field: str, text: str) -> None:
    """Refuse texts that cannot be summarized.

    Raises:
        InvalidError: the text is blank, or holds NUL or lone surrogates.
    """
    if not text.strip():
        raise invalid(field, "must not be empty or only white space", limit=1, value=text)
    if (position := text.find("\0")) >= 0:
        message = f"holds NUL at character {position}: is it binary, or UTF-16?"
        raise invalid(field, message, value=text[position : position + 10])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = f"holds a lone surrogate at character {error.start}"
        raise invalid(field, message, value=text[error.start : error.end]) from None


@dataclass(frozen=True, slots=True)
class Job:
    """One text with all of its settings decided."""

    text: str
    settings: GenerationSettings
    part_settings: GenerationSettings  # for parts of a long text, whatever length was asked for
    length: Length | None
    on_overflow: str
    timeout_s: float
    share: str  # who waits for whom in the engine's queue


def decide(
    text: str,
    options: SummarizeOptions,
    defaults: GenerationSettings,
    limits: Limits,
    field: str = "text",
    share: str = "",
) -> Job:
    """Combine what was asked for with the model's defaults, within the limits.

    Raises:
        InvalidError: names the field, the limit and the value.
    """
    check_text(field, text)
    for name, limit in (
        ("num_beams", limits.num_beams),
        ("max_new_tokens", limits.max_new_tokens),
        ("min_new_tokens", limits.max_new_tokens),
        ("timeout_s", limits.timeout_s),
    ):
        value = getattr(options, name)
        if value is not None and value > limit:
            raise invalid(name, f"must be at most {limit}, is {value}", limit=limit, value=value)

    said = options.model_dump(include=set(GenerationSettings.__slots__), exclude_none=True)
    base = replace(defaults, max_new_tokens=min(defaults.max_new_tokens, limits.max_new_tokens))
    settings = replace(base, **said)
    if options.length is not None and options.length.words is not None:
        # Tokens enough for that many words; the text is then kept to the bound exactly.
        room = options.length.words * _TOKENS_PER_WORD + _SPARE_TOKENS
        if options.max_new_tokens is None:
            settings = replace(settings, max_new_tokens=min(room, limits.max_new_tokens))
        if options.min_new_tokens is None:
            least = min(settings.min_new_tokens, options.length.words)
            settings = replace(settings, min_new_tokens=least)
    if options.min_new_tokens is None:
        least = min(settings.min_new_tokens, settings.max_new_tokens)
        settings = replace(settings, min_new_tokens=least)
    if settings.min_new_tokens > settings.max_new_tokens:
        raise invalid(
            "min_new_tokens",
            f"must be at most max_new_tokens ({settings.max_new_tokens}), "
            f"is {settings.min_new_tokens}",
            limit=settings.max_new_tokens,
            value=settings.min_new_tokens,
        )
    part_settings = replace(
        settings, min_new_tokens=base.min_new_tokens, max_new_tokens=base.max_new_tokens
    )
    timeout_s = options.timeout_s or min(limits.default_timeout_s, limits.timeout_s)
    return Job(text, settings, part_settings, options.length, options.on_overflow, timeout_s, share)


def from_hf(body: HfRequest) -> SummarizeRequest:
    """The Hugging Face task's parameters in our own terms."""
    parameters = body.parameters
    content: dict[str, Any] = {"text": body.inputs}
    if parameters is None:
        return SummarizeRequest(**content)
    if parameters.truncation is not None:
        cuts = parameters.truncation != "do_not_truncate"
        content["on_overflow"] = "truncate" if cuts else "error"
    asked = parameters.generate_parameters or HfGenerateParameters()
    said = asked.model_dump(exclude_none=True)
    # *_length counts the decoder's start token, *_new_tokens does not.
    if (longest := said.pop("max_length", None)) is not None:
        said.setdefault("max_new_tokens", longest - 1)
    if (shortest := said.pop("min_length", None)) is not None:
        said.setdefault("min_new_tokens", max(shortest - 1, 0))
    return parse(SummarizeRequest, {**said, **content})


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The body, read no further than the limit and waited for no longer than any deadline."""
    limit = limits.body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit, int(declared))
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.timeout_s):
            async for piece in request.stream():
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise _too_large(limit, f"more than {limit}")
    except TimeoutError:
        raise DeadlineError(
            f"body: must arrive within {limits.timeout_s:g} s, {size} bytes have"
        ) from None
    return b"".join(pieces)


def _too_large(limit: int, value: int | str) -> BodyTooLargeError:
    message = f"must have at most {limit} bytes, has {value}"
    return BodyTooLargeError(f"body: {message}", [FieldError("body", message, limit, value)])


def _load_json(body: bytes) -> Any:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        if _SURROGATE.search(body):
            # JSON allows lone surrogates (RFC 8259, section 8.2), this parser does not. Let the
            # validation that follows say which field holds one.
            with suppress(ValueError, RecursionError):
                return json.loads(body)
        raise BadRequestError(f"body: not JSON: {error}") from None


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _refuse_type(request: Request, expected: str) -> None:
    got = request.headers.get("content-type", "")
    error = FieldError("Content-Type", f"must be {expected}", expected, got)
    raise UnsupportedMediaTypeError(f"Content-Type: must be {expected}, is {got!r}", [error])


def _check_encoding(request: Request) -> None:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        error = FieldError("Content-Encoding", "must be identity", "identity", coding)
        raise UnsupportedMediaTypeError(
            f"Content-Encoding: must be identity, is {coding!r}", [error]
        )


def _charset(request: Request) -> str:
    parameters = request.headers.get("content-type", "").split(";")[1:]
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip('"').lower()
            if charset not in ("utf-8", "utf8", "us-ascii", "iso-8859-1"):
                expected = "utf-8, us-ascii or iso-8859-1"
                error = FieldError("Content-Type", f"charset must be {expected}", expected, charset)
                raise UnsupportedMediaTypeError(error.message, [error])
            return charset
    return "utf-8"


def _query_options(request: Request) -> dict[str, Any]:
    """Options from the query string, where everything is text, turned into JSON values."""
    options: dict[str, Any] = {}
    for name, value in request.query_params.items():
        if name == "text":
            raise invalid("text", "is the body of a text/plain request, not a query parameter")
        try:
            parsed = from_json(value, allow_inf_nan=False)
        except ValueError:
            parsed = value
        if name in ("words", "sentences"):
            options.setdefault("length", {})[name] = parsed
        else:
            options[name] = parsed
    return options


def _field_error(detail: Any) -> FieldError:
    field = ".".join(str(part) for part in detail["loc"]) or "body"
    context = detail.get("ctx") or {}
    limit = next((context[name] for name in _CONSTRAINTS if name in context), None)
    if detail["type"] == "missing":
        return FieldError(field, "is required")
    if detail["type"] == "string_unicode":
        return FieldError(field, "holds a lone surrogate, which no text can", None, detail["input"])
    message = detail["msg"].removeprefix("Value error, ")
    return FieldError(field, message, limit, detail["input"])
