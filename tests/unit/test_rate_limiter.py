"""Limits of each client: a bucket of tokens, requests at once, and what refused ones are told."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.api.limiter import RateLimiter, Turn
from serve_app.config import RateLimitSettings
from serve_app.engine.checkpoint import Checkpoint
from serve_app.errors import RateLimitedError
from tests.texts import long_text
from tests.unit.conftest import Clients
from tests.unit.local import local_app


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limiter(clock: Clock, **changed: Any) -> RateLimiter:
    given_ = {"tokens_per_minute": 600, "burst_tokens": 1000, **changed}
    return RateLimiter(RateLimitSettings(enabled=True, **given_), clock=clock)


def enter(limits: RateLimiter, client: str = "shop") -> Turn:
    turn = limits.turn(client)
    assert turn is not None
    turn.enter()
    return turn


def call(limits: RateLimiter, tokens: int, used: int | None = None, client: str = "shop") -> None:
    """A request that is over at once. Raises what refuses it."""
    turn = enter(limits, client)
    try:
        turn.take(tokens)
    except RateLimitedError:
        turn.leave(0)
        raise
    turn.leave(tokens if used is None else used)


def refusal(run: Callable[[], object]) -> tuple[str, int]:
    """Field and `Retry-After`."""
    with pytest.raises(RateLimitedError) as caught:
        run()
    [error] = caught.value.errors
    return error.field, int(caught.value.headers["Retry-After"])


def test_a_bucket_empties_and_refills() -> None:
    clock = Clock()
    limits = limiter(clock)
    call(limits, 1000)
    # 10 tokens a second.
    assert refusal(lambda: call(limits, 25)) == ("tokens_per_minute", 3)
    clock.now += 2.4
    assert refusal(lambda: call(limits, 25)) == ("tokens_per_minute", 1)
    clock.now += 0.1
    call(limits, 25)
    call(limits, 1000, client="other")


def test_output_is_taken_at_the_end_and_leaves_debt() -> None:
    clock = Clock()
    limits = limiter(clock)
    call(limits, 1000, used=1500)
    # 500 too many, and 10 wanted: 510 tokens at 10 a second.
    assert refusal(lambda: call(limits, 10)) == ("tokens_per_minute", 51)


def test_what_was_not_used_is_given_back() -> None:
    limits = limiter(Clock())
    call(limits, 1000, used=0)
    call(limits, 1000)


def test_a_request_larger_than_the_bucket_waits_for_it_to_be_full() -> None:
    clock = Clock()
    limits = limiter(clock)
    call(limits, 1)
    assert refusal(lambda: call(limits, 5000)) == ("tokens_per_minute", 1)
    clock.now += 1
    call(limits, 5000)
    # It is in debt for 4,000 tokens then, and full again after another 1,000.
    assert refusal(lambda: call(limits, 5000)) == ("tokens_per_minute", 500)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 3000), st.integers(0, 2000)), max_size=40),
    st.integers(1, 4000),
)
def test_who_waits_as_told_gets_in_and_not_a_second_before(
    calls: list[tuple[float, int, int]], tokens: int
) -> None:
    clock = Clock()
    limits = limiter(clock)
    for after, asked, used in calls:
        clock.now += after
        try:
            call(limits, asked, used)
        except RateLimitedError:
            continue
    turn = enter(limits)
    try:
        turn.take(tokens)
    except RateLimitedError as error:
        seconds = int(error.headers["Retry-After"])
        if seconds > 1:
            clock.now += seconds - 1.001
            with pytest.raises(RateLimitedError):
                turn.take(tokens)
            clock.now += 1.001
        else:
            clock.now += 1
        turn.take(tokens)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 1000)), min_size=1, max_size=80))
def test_never_more_than_the_bucket_and_the_rate(calls: list[tuple[float, int]]) -> None:
    clock = Clock()
    limits = limiter(clock)
    began, let_in = clock.now, 0
    for after, tokens in calls:
        clock.now += after
        try:
            call(limits, tokens)
        except RateLimitedError:
            continue
        let_in += tokens
        assert let_in <= 1000 + 10 * (clock.now - began) + 1e-3


def test_requests_at_once() -> None:
    clock = Clock()
    limits = limiter(clock, concurrent_requests=2)
    first, _second = enter(limits), enter(limits)
    enter(limits, "other")
    field, seconds = refusal(lambda: enter(limits))
    assert (field, seconds) == ("concurrent_requests", 1)
    first.leave(0)
    first.leave(0)  # a second time changes nothing
    enter(limits)
    with pytest.raises(RateLimitedError):
        enter(limits)


def test_when_one_inside_ends_is_told_by_those_that_ended() -> None:
    clock = Clock()
    limits = limiter(clock, concurrent_requests=2)
    for _ in range(50):
        turn = enter(limits)
        clock.now += 30
        turn.leave(0)
    enter(limits), enter(limits)
    # Two at once, each about 30 s: one ends every 15 s.
    assert refusal(lambda: enter(limits)) == ("concurrent_requests", 15)


def test_the_first_tier_that_matches_a_whole_name_counts() -> None:
    tiers = [
        {"name": "gold", "match": "shop|job[.]x", "tokens_per_minute": 60, "burst_tokens": 50},
        {"name": "all", "match": "shop.*", "tokens_per_minute": 0, "burst_tokens": 1},
    ]
    limits = limiter(Clock(), tiers=tiers)
    for client, most in (("shop", 50), ("job.x", 50), ("jobAx", 1000), ("myshop", 1000)):
        call(limits, most, client=client)
        with pytest.raises(RateLimitedError):
            call(limits, 1, client=client)
    for _ in range(5):  # without a limit of tokens
        call(limits, 10**6, client="shop2")


def test_without_limits_there_is_no_turn() -> None:
    assert RateLimiter(RateLimitSettings()).turn("shop") is None


def test_other_limits_apply_to_what_is_in_the_bucket() -> None:
    clock = Clock()
    limits = limiter(clock)
    call(limits, 100)
    limits.configure(RateLimitSettings(enabled=True, tokens_per_minute=60, burst_tokens=10))
    assert refusal(lambda: (call(limits, 10), call(limits, 5))) == ("tokens_per_minute", 5)
    limits.configure(RateLimitSettings())
    assert limits.turn("shop") is None


@pytest.mark.parametrize(
    "tier",
    [
        {"name": "x", "match": "(", "tokens_per_minute": 1, "burst_tokens": 1},
        {"name": "x", "match": "a"},
        {"name": "X", "match": "a", "tokens_per_minute": 1, "burst_tokens": 1},
    ],
)
def test_wrong_tiers_are_refused(tier: Any) -> None:
    with pytest.raises(ValidationError, match=r"tiers\.0"):
        RateLimitSettings(tiers=[tier])


# Several replicas


def test_replicas_that_tell_each_other_are_as_one() -> None:
    clock = Clock()
    here, there = limiter(clock), limiter(clock)
    for _ in range(5):
        call(here, 100)
        call(there, 100)
        news = here.tell(), there.tell()
        there.heard("here", news[0])
        here.heard("there", news[1])
    for replica in (here, there):
        assert refusal(lambda replica=replica: call(replica, 50)) == ("tokens_per_minute", 5)
    # What was told is not told again.
    assert here.tell() == {}


def test_requests_elsewhere_count_until_their_replica_falls_silent() -> None:
    clock = Clock()
    here, there = limiter(clock, concurrent_requests=2), limiter(clock, concurrent_requests=2)
    enter(there), enter(there)
    here.heard("there", there.tell())
    assert refusal(lambda: enter(here))[0] == "concurrent_requests"
    clock.now += 4
    here.heard("there", there.tell())  # it goes on telling what is still inside
    clock.now += 4
    with pytest.raises(RateLimitedError):
        enter(here)
    clock.now += 4
    enter(here)


def test_clients_that_are_as_good_as_new_are_forgotten() -> None:
    clock = Clock()
    limits = limiter(clock)
    turn = enter(limits)
    turn.take(1000)
    assert limits.tell() == {"shop": (1000, 1)}
    turn.leave(1000)
    assert limits.tell() == {"shop": (0.0, 0)}  # the last one has left
    assert limits.tell() == {}
    clock.now += 100
    assert limits.tell() == {}
    assert limits._clients == {}


# Through the application

POLICY = re.compile(r'"tokens";q=(\d+);w=(\d+);qu="tokens", "concurrency";q=(\d+);.*')
STATE = re.compile(r'"tokens";r=(\d+);t=(\d+), "concurrency";r=(\d+)')


def numbers(pattern: re.Pattern[str], value: str) -> list[int]:
    found = pattern.fullmatch(value)
    assert found is not None, value
    return [int(one) for one in found.groups()]


@pytest.mark.anyio
async def test_answers_say_what_is_left_and_refusals_when_to_come_back(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    clock = Clock()
    limits = {"tokens_per_minute": 60, "burst_tokens": 400, "concurrent_requests": 3}
    body = {"text": long_text(150), "max_new_tokens": 8}
    events: list[Any] = []

    class Sink:
        def record(self, event: Any) -> None:
            events.append(event)

    async with local_app(
        checkpoint, clients(), rate_limits=limits, clock=clock, usage=Sink()
    ) as local:
        first = await local.http.post("/v1/summarize", json=body)
        assert first.status_code == 200
        asked = first.json()["usage"]["input_tokens"]
        made = first.json()["usage"]["output_tokens"]
        assert 200 < asked < 400
        assert numbers(POLICY, first.headers["ratelimit-policy"]) == [400, 400, 3]
        # At the head of its answer the output is not known yet.
        left = 400 - asked
        assert numbers(STATE, first.headers["ratelimit"]) == [left, asked, 2]

        refused = await local.http.post("/v1/summarize", json=body)
        missing = asked - (left - made)
        assert refused.status_code == 429
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.headers["retry-after"] == str(missing)  # one token a second
        assert numbers(STATE, refused.headers["ratelimit"])[0] == left - made
        problem = refused.json()
        assert problem["type"] == "urn:t5-serve:problem:rate-limited"
        [error] = problem["errors"]
        assert (error["field"], error["limit"], error["value"]) == ("tokens_per_minute", 60, asked)
        assert str(asked) in problem["detail"]

        batch = await local.http.post("/v1/summarize/batch", json={"texts": [body["text"], "x"]})
        stream = await local.http.post("/v1/summarize", json={**body, "stream": True})
        hf = await local.http.post("/hf/summarization", json={"inputs": body["text"]})
        assert [one.status_code for one in (batch, stream, hf)] == [429, 429, 429]
        assert local.telemetry.refusals == ["tokens_per_minute"] * 4
        # What needs no model is free.
        models = await local.http.get("/v1/models")
        assert models.status_code == 200
        assert "ratelimit" not in models.headers

        clock.now += missing
        assert (await local.http.post("/v1/summarize", json=body)).status_code == 200
    assert [one["status"] for one in events] == [200, 429, 429, 429, 429, 200, 200]
    event = events[1]
    assert (event["error_type"], event["error_fields"]) == ("rate-limited", ["tokens_per_minute"])
    assert event["asked_tokens"] == asked
    assert "input_tokens" not in event


@pytest.mark.anyio
async def test_a_request_that_never_ran_costs_nothing(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    limits = {"tokens_per_minute": 1, "burst_tokens": 100, "concurrent_requests": 1}
    async with local_app(
        checkpoint, clients(), rate_limits=limits, clock=Clock(), max_input_tokens=96
    ) as local:
        wrong: Any
        for wrong in ({"text": ""}, {"text": long_text(300), "on_overflow": "error"}):
            assert (await local.http.post("/v1/summarize", json=wrong)).status_code == 422
        # Each has left: neither its place nor its tokens are missed.
        answer = await local.http.post("/v1/summarize", json={"text": "One text."})
        assert answer.status_code == 200
        left = numbers(STATE, answer.headers["ratelimit"])[0]
        assert left == 100 - answer.json()["usage"]["input_tokens"]


@pytest.mark.anyio
async def test_the_documentation_names_the_headers(
    checkpoint: Checkpoint, clients: Clients
) -> None:
    async with local_app(checkpoint, clients()) as local:
        paths = (await local.http.get("/openapi.json")).json()["paths"]
    limits = {"RateLimit-Policy", "RateLimit"}
    for path in ("/v1/summarize", "/v1/summarize/batch", "/hf/summarization"):
        answers = paths[path]["post"]["responses"]
        assert set(answers["429"]["headers"]) == {"Retry-After", *limits}
        assert set(answers["503"]["headers"]) == {"Retry-After"}
        assert set(answers["200"]["headers"]) == limits
    assert "headers" not in paths["/v1/models"]["get"]["responses"]["200"]


def test_the_window_of_the_policy_is_the_time_to_fill_the_bucket() -> None:
    turn = limiter(Clock(), tokens_per_minute=7, burst_tokens=1000).turn("shop")
    assert turn is not None
    seconds = math.ceil(1000 / (7 / 60))
    assert turn.headers()["RateLimit-Policy"] == f'"tokens";q=1000;w={seconds};qu="tokens"'
