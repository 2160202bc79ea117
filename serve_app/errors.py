"""Errors a caller is told of. Each knows its HTTP status and its RFC 9457 problem document."""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from serve_app.engine.protocol import Usage

_VALUE_CHARACTERS = 100  # of an offending value, in an error


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field: its dotted name, the limit it broke, the value it had."""

    field: str
    message: str
    limit: int | float | str | None = None
    value: Any = None

    def as_dict(self) -> dict[str, Any]:
        """JSON form; absent members are left out and long values shortened."""
        said: dict[str, Any] = {"field": self.field, "message": self.message}
        if self.limit is not None:
            said["limit"] = self.limit
        if self.value is not None:
            said["value"] = shorten(self.value)
        return said


class ServiceError(Exception):
    """Base of all errors with an HTTP answer (RFC 9457, Problem Details)."""

    # What the engine had spent on it; None: it could not say.
    usage: Usage | None = Usage()
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    kind = "internal"
    title = "Internal error"

    def __init__(self, detail: str, errors: list[FieldError] | None = None, **headers: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors or []
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def problem(self, request_id: str) -> dict[str, Any]:
        """The `application/problem+json` document."""
        document: dict[str, Any] = {
            "type": f"urn:t5-serve:problem:{self.kind}",
            "title": self.title,
            "status": int(self.status),
            "detail": self.detail,
            "request_id": request_id,
        }
        if self.errors:
            document["errors"] = [error.as_dict() for error in self.errors]
        return document


class BadRequestError(ServiceError):
    """The body cannot be read as what it says it is."""

    status, kind, title = HTTPStatus.BAD_REQUEST, "bad-request", "Bad request"


class UnauthorizedError(ServiceError):
    """No token, or one that is not known (RFC 6750)."""

    status, kind, title = HTTPStatus.UNAUTHORIZED, "unauthorized", "Unauthorized"


class NotFoundError(ServiceError):
    """No such path."""

    status, kind, title = HTTPStatus.NOT_FOUND, "not-found", "Not found"


class MethodNotAllowedError(ServiceError):
    """The path exists, not with this method."""

    status = HTTPStatus.METHOD_NOT_ALLOWED
    kind, title = "method-not-allowed", "Method not allowed"


class DeadlineError(ServiceError):
    """The request's own deadline passed first."""

    status, kind, title = HTTPStatus.REQUEST_TIMEOUT, "deadline", "Deadline exceeded"


class BodyTooLargeError(ServiceError):
    """More body bytes than the limit."""

    status, kind, title = HTTPStatus(413), "body-too-large", "Body too large"


class UnsupportedMediaTypeError(ServiceError):
    """A content type or encoding that is not understood."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    kind, title = "unsupported-media-type", "Unsupported media type"


class InvalidError(ServiceError):
    """Well-formed, but a field breaks a rule or a limit."""

    status, kind, title = HTTPStatus(422), "invalid", "Invalid request"


class PoisonError(ServiceError):
    """Replicas died on this text one after the other: it is not tried again for a while."""

    status, kind, title = HTTPStatus(422), "poison", "Text refused"

    def __init__(self, seconds: float) -> None:
        minutes = max(math.ceil(seconds / 60), 1)
        super().__init__(
            "the engine died on this text more than once; "
            f"it is refused for {minutes} minute{'s' if minutes > 1 else ''}"
        )


class OverloadedError(ServiceError):
    """The queue is full; `Retry-After` is computed from it."""

    status, kind, title = HTTPStatus.SERVICE_UNAVAILABLE, "overloaded", "Overloaded"

    def __init__(self, detail: str, status: int, retry_after_s: float, most_s: int) -> None:
        seconds = min(max(math.ceil(retry_after_s), 1), most_s)
        super().__init__(detail, Retry_After=str(seconds))
        self.status = HTTPStatus(status)


class RateLimitedError(ServiceError):
    """The client is over a limit of its own; `Retry-After` is when it no longer is."""

    status, kind, title = HTTPStatus.TOO_MANY_REQUESTS, "rate-limited", "Rate limited"

    def __init__(self, error: FieldError, retry_after_s: float) -> None:
        seconds = max(math.ceil(retry_after_s), 1)
        super().__init__(f"{error.field}: {error.message}", [error], Retry_After=str(seconds))


class UnavailableError(ServiceError):
    """No replica could answer."""

    status, kind, title = HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", "Unavailable"


class LostError(UnavailableError):
    """The replica's engine broke down, with all that were in it."""


class EngineError(ServiceError):
    """The engine failed on this text."""

    status, kind, title = HTTPStatus.INTERNAL_SERVER_ERROR, "engine", "The engine failed"


def invalid(
    field: str, message: str, *, limit: int | float | str | None = None, value: Any = None
) -> InvalidError:
    """An `InvalidError` about one field; its detail names field, limit and value."""
    error = FieldError(field, message, limit, value)
    return InvalidError(f"{field}: {message}", [error])


def shorten(value: Any) -> Any:
    """A value fit for an error document: JSON, and short."""
    if isinstance(value, bool | int | float) or value is None:
        if isinstance(value, int) and value.bit_length() > 64:
            return f"an integer of {value.bit_length()} bits"
        return value if not isinstance(value, float) or math.isfinite(value) else str(value)
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= _VALUE_CHARACTERS:
        return text
    return f"{text[:_VALUE_CHARACTERS]}… ({len(text)} characters)"
