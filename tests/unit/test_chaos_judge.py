"""The judge of the chaos rounds can fail, and a seed gives one sequence."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import httpx
import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.judge import Window, label, lost, violations
from tests.chaos.load import Request, plans, whole, whole_stream
from tests.chaos.rounds import deal

WINDOW = Window(100.0, 110.0, frozenset({"closed", "500 by Serve"}), loses_events=True)


def request(**changed: Any) -> Request:
    given = {"kind": "short", "id": "r1", "timeout_s": 60.0, "sent": 10.0, "done": 11.0}
    return Request(**{**given, "ending": "answered", "status": 200, **changed})


def event(status: int = 200, request_id: str = "r1") -> dict[str, Any]:
    return {"request_id": request_id, "status": status}


def test_what_is_as_ever_breaks_no_promise() -> None:
    requests = [
        (request(), event()),
        (request(kind="invalid", status=422, said="invalid"), event(422)),
        (request(kind="stranger", status=401, said="unauthorized"), event(401)),
        (request(kind="late", status=408, said="deadline", timeout_s=0.5), event(408)),
    ]
    for one, told in requests:
        assert violations([one], [told], WINDOW) == []
    left = request(kind="leaves", ending="left", status=0)
    assert violations([left], [], WINDOW) == []


@pytest.mark.parametrize(
    ("one", "events", "said"),
    [
        (request(ending="hung", sent=101.0, done=300.0), [event()], "hung"),
        (request(ending="closed", status=0), [], "closed"),
        (request(fault="not JSON", status=500), [event(500)], "500 by Serve"),
        (request(status=503, said="overloaded"), [event(503)], "503 overloaded"),
        (request(status=408, said="deadline"), [event(408)], "408 deadline"),  # too early
        (request(said="unavailable"), [event()], "200 unavailable"),
        (request(fault="no summary"), [event()], "no summary"),
        (request(kind="short", ending="left", status=0), [], "left"),
        (request(), [], "no event"),
        (request(), [event(), event()], "2 usage events"),
        (request(), [event(503)], "event says 503"),
    ],
)
def test_a_broken_promise_is_told(one: Request, events: list[dict[str, Any]], said: str) -> None:
    [told] = violations([one], events, WINDOW)
    assert said in told


def test_a_fault_excuses_what_it_allows_while_it_lasts() -> None:
    during = request(ending="closed", status=0, sent=99.0, done=101.0)
    assert violations([during], [], WINDOW) == []
    assert lost([during]) == [during]
    after = request(ending="closed", status=0, sent=120.0, done=121.0)
    assert len(violations([after], [], WINDOW)) == 1
    quiet = Window(100.0, 110.0, frozenset(), loses_events=False)
    assert len(violations([during], [], quiet)) == 1
    # Twice is never excused: somebody would pay for it.
    assert violations([during], [event(), event()], WINDOW) == ["short request has 2 usage events"]


def answer(status: int, kind: str, content: bytes, request_id: str = "r1") -> tuple[str, str]:
    headers = {"content-type": kind, "x-request-id": request_id}
    return whole(httpx.Response(status, headers=headers), content, "r1")


def test_the_form_of_answers() -> None:
    summary = {"summary": "s", "usage": {"input_tokens": 3}}
    problem = {"type": "urn:t5-serve:problem:deadline", "status": 408, "request_id": "r1"}
    kind = "application/problem+json"
    assert answer(200, "application/json", json.dumps(summary).encode()) == ("", "")
    assert answer(408, kind, json.dumps(problem).encode()) == ("", "deadline")
    for status, kind_, document, request_id in (
        (200, "application/json", {**summary, "summary": None}, "r1"),
        (408, "application/json", problem, "r1"),
        (503, kind, problem, "r1"),
        (408, kind, {**problem, "request_id": "r2"}, "r1"),
        (408, kind, problem, "r2"),
    ):
        assert answer(status, kind_, json.dumps(document).encode(), request_id)[0]
    plain = answer(500, "text/plain", b"Internal Server Error")
    assert label(request(status=500, fault=plain[0])) == "500 by Serve"
    batch = {"results": [{"result": summary}, {"error": problem}]}
    assert answer(200, "application/json", json.dumps(batch).encode()) == ("", "deadline")


def test_the_form_of_streams() -> None:
    start: tuple[str, dict[str, Any]] = ("start", {})
    delta, done = ("delta", {"text": "a b"}), ("done", {"summary": "a b"})
    assert whole_stream([start, delta, done]) == ("", "")
    error = ("error", {"type": "urn:t5-serve:problem:unavailable"})
    assert whole_stream([start, delta, error]) == ("", "unavailable")
    for broken in ([], [delta, done], [start, done], [start, delta, delta, done]):
        assert whole_stream(broken)[0]


def test_a_seed_gives_one_sequence() -> None:
    assert deal(7, 10) == deal(7, 10) != deal(8, 10)
    assert {name for names in deal(7, 10) for name in names} == {fault.name for fault in FAULTS}
    first = list(islice(plans("7/1/0/0"), 200))
    assert first == list(islice(plans("7/1/0/0"), 200)) != list(islice(plans("7/1/0/1"), 200))
