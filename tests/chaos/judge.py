"""What must hold of every request around a fault, whatever the fault was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.chaos.load import Request

# A request is under way a little before and after its client's clock says so.
_MARGIN_S = 2.0
_EXPECTED = {
    "late": {"200", "408 deadline"},
    "invalid": {"422 invalid"},
    "stranger": {"401 unauthorized"},
}


@dataclass(frozen=True)
class Window:
    """A fault from its beginning until the service had recovered, `time.monotonic()` seconds."""

    began: float
    ended: float
    allowed: frozenset[str]
    loses_events: bool

    def has(self, request: Request) -> bool:
        """Whether the request was under way then."""
        return request.sent <= self.ended + _MARGIN_S and request.done >= self.began - _MARGIN_S


def label(request: Request) -> str:
    """How it ended: `200`, `closed`, `refused` (nobody listened), `hung`, `left`, status and
    problem, or what is wrong.

    `200 PROBLEM` is a stream that ended with an error, or a batch one of whose texts did. `500 by
    Serve` is Ray Serve's own answer where a replica died, which is no problem document.
    """
    if request.ending != "answered":
        return "refused" if request.said == "ConnectError" else request.ending
    if request.fault and request.status == 500:
        return "500 by Serve"
    if request.fault:
        return f"ill-formed: {request.fault}"
    return f"{request.status} {request.said}".strip()


def as_ever(request: Request) -> bool:
    """Whether it ended as it does without any fault."""
    said = label(request)
    if said in _EXPECTED.get(request.kind, {"200"}):
        return True
    if said in ("408 deadline", "200 deadline"):  # a machine may be too slow; never too early
        return request.done - request.sent >= request.timeout_s
    return said == "left" and request.kind.startswith("leaves")


def lost(requests: Iterable[Request]) -> list[Request]:
    """Those that did not end as they do without a fault."""
    return [request for request in requests if not as_ever(request)]


def violations(
    requests: Sequence[Request], events: Sequence[Mapping[str, Any]], window: Window
) -> list[str]:
    """Every promise that was broken, one line each.

    Args:
        requests: all that were sent around the fault, each over.
        events: usage events, of these requests among others.
        window: the fault.
    """
    found = []
    for request in lost(requests):
        said = label(request)
        if not (said in window.allowed and window.has(request)):
            where = f"{request.sent - window.began:+.1f} to {request.done - window.began:+.1f} s"
            found.append(f"{request.kind} request ended with {said} ({where} of the fault)")
    told: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        told.setdefault(str(event["request_id"]), []).append(event)
    for request in requests:
        mine = told.get(request.id, [])
        if len(mine) > 1:
            found.append(f"{request.kind} request has {len(mine)} usage events")
        elif not mine and _must_be_told(request, window):
            found.append(f"{request.kind} request answered with {label(request)} has no event")
        elif mine and request.ending == "answered" and mine[0]["status"] != request.status:
            status = mine[0]["status"]
            if not window.has(request):
                found.append(f"event says {status} of an answer with {request.status}")
    return found


def _must_be_told(request: Request, window: Window) -> bool:
    """A client that leaves may do so before the service has the request."""
    return request.ending == "answered" and not (window.loses_events and window.has(request))


def counts(requests: Iterable[Request]) -> str:
    """How they ended, for a table."""
    found = Counter(map(label, requests))
    return ", ".join(f"{name}: {count}" for name, count in sorted(found.items()))
