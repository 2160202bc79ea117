"""Limits on what each client may use: tokens, in a bucket that refills, and requests at once.

A request is weighed by the input tokens of its texts, once these are known. What it uses beyond
that (output, passes over the summaries of parts) is taken from the bucket at its end, which may
leave debt; what it did not use is given back. A request that is larger than the bucket is let in
when the bucket is full, and leaves debt, too: otherwise it could never come in.

Each replica of the Api decides alone, from its own buckets, and tells the others every second what
its clients have used (`Peers`). So nothing of this waits for another process, and the buckets of
all replicas are the same but for the last second.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from serve_app.config import RateLimit, RateLimitSettings
from serve_app.errors import FieldError, RateLimitedError

# What a replica says of its clients: tokens since it last said so, and requests inside.
News = dict[str, tuple[float, int]]

TELL_EVERY_S = 1.0
_STALE_S = 5 * TELL_EVERY_S  # a replica that has not been heard for so long has no requests inside
_SMOOTHING = 0.3  # weight of the newest request's time
_EPSILON = 1e-6  # tokens; floating point


@dataclass(slots=True)
class _Client:
    """What is known of a client. Times in seconds of the limiter's clock."""

    limit: RateLimit
    level: float  # tokens in the bucket at `at`
    at: float
    running: int = 0
    untold: float = 0.0  # tokens used since the other replicas were told
    told: int = 0  # `running` as they know it
    request_s: float = 1.0
    elsewhere: dict[str, tuple[int, float]] = field(default_factory=dict)  # running, when heard

    def refill(self, now: float) -> float:
        """Tokens in the bucket now."""
        gained = (now - self.at) * self.limit.tokens_per_minute / 60
        self.level = min(self.level + gained, self.limit.burst_tokens)
        self.at = now
        return self.level

    def inside(self, now: float) -> int:
        """Requests of this client in all replicas."""
        fresh = [count for count, at in self.elsewhere.values() if now - at < _STALE_S]
        return self.running + sum(fresh)

    def seconds_to(self, tokens: float) -> float:
        """How long until the bucket holds so many."""
        return max(tokens - self.level, 0.0) * 60 / self.limit.tokens_per_minute


class RateLimiter:
    """Buckets and counts of all clients in one replica. Used on one event loop, without awaiting.

    Args:
        settings: the limits.
        on_refusal: told which limit refused a request.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        settings: RateLimitSettings,
        on_refusal: Callable[[str], None] = lambda _limit: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clients: dict[str, _Client] = {}
        self._on_refusal = on_refusal
        self._clock = clock
        self.configure(settings)

    def configure(self, settings: RateLimitSettings) -> None:
        """Go on with other limits. Buckets keep what is in them, up to their new size."""
        self._settings = settings
        self._tiers = [(re.compile(tier.match), tier) for tier in settings.tiers]
        now = self._clock()
        for name, client in self._clients.items():
            client.refill(now)
            client.limit = self._limit(name)

    def turn(self, client: str) -> Turn | None:
        """A client's request, which may now `enter`. None: there are no limits."""
        if not self._settings.enabled:
            return None
        return Turn(self._client(client), self._clock, self._on_refusal)

    def tell(self) -> News:
        """What the other replicas do not know yet."""
        now = self._clock()
        news: News = {}
        for name, client in list(self._clients.items()):
            if client.untold or client.running or client.told:
                news[name] = (client.untold, client.running)
                client.untold, client.told = 0.0, client.running
            elif client.refill(now) >= client.limit.burst_tokens and not client.inside(now):
                del self._clients[name]  # as good as unknown
        return news

    def heard(self, replica: str, news: Mapping[str, tuple[float, int]]) -> None:
        """What another replica tells."""
        if not self._settings.enabled:
            return
        now = self._clock()
        for name, (tokens, running) in news.items():
            client = self._client(name)
            client.refill(now)
            client.level -= tokens
            client.elsewhere[replica] = (running, now)

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            limit = self._limit(name)
            client = _Client(limit, limit.burst_tokens, self._clock())
            self._clients[name] = client
        return client

    def _limit(self, name: str) -> RateLimit:
        for pattern, tier in self._tiers:
            if pattern.fullmatch(name):
                return tier
        return self._settings


class Turn:
    """One request before the limits of its client: `enter`, `take`, and in any case `leave`."""

    def __init__(
        self, client: _Client, clock: Callable[[], float], on_refusal: Callable[[str], None]
    ) -> None:
        self._client = client
        self._clock = clock
        self._on_refusal = on_refusal
        self._entered: float | None = None
        self._taken = 0

    def enter(self) -> None:
        """Count the request.

        Raises:
            RateLimitedError: the client has as many inside as it may.
        """
        client, now = self._client, self._clock()
        limit, inside = client.limit.concurrent_requests, client.inside(now)
        if limit and inside >= limit:
            self._on_refusal("concurrent_requests")
            message = f"must be at most {limit} at once, would be {inside + 1}"
            error = FieldError("concurrent_requests", message, limit, inside + 1)
            # One of those inside ends after about this long.
            raise RateLimitedError(error, client.request_s / limit)
        client.running += 1
        self._entered = now

    def take(self, tokens: int) -> None:
        """Take the request's input tokens from the bucket.

        Raises:
            RateLimitedError: they are not there yet.
        """
        client, now = self._client, self._clock()
        rate, burst = client.limit.tokens_per_minute, client.limit.burst_tokens
        if not rate:
            return
        level, needed = client.refill(now), min(tokens, burst)
        if level < needed - _EPSILON:
            self._on_refusal("tokens_per_minute")
            left = math.floor(level)
            message = (
                f"this request needs {needed} tokens of the client's {burst} at once and {rate} "
                f"a minute; {f'{left} are left' if left >= 0 else f'{-left} too many are used'}"
            )
            error = FieldError("tokens_per_minute", message, rate, tokens)
            raise RateLimitedError(error, client.seconds_to(needed))
        self._spend(tokens)
        self._taken = tokens

    def leave(self, tokens: int) -> None:
        """The request is over and has used so many tokens in all. Later calls do nothing."""
        if self._entered is None:
            return
        client, now = self._client, self._clock()
        client.running -= 1
        client.request_s += _SMOOTHING * (now - self._entered - client.request_s)
        client.refill(now)
        self._spend(tokens - self._taken)
        self._entered = None

    def headers(self) -> dict[str, str]:
        """`RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers)."""
        client, now = self._client, self._clock()
        limit = client.limit
        policies, states = [], []
        if rate := limit.tokens_per_minute:
            level, burst = client.refill(now), limit.burst_tokens
            policies.append(f'"tokens";q={burst};w={math.ceil(burst * 60 / rate)};qu="tokens"')
            full_s = math.ceil(client.seconds_to(burst))
            states.append(f'"tokens";r={max(math.floor(level), 0)};t={full_s}')
        if most := limit.concurrent_requests:
            policies.append(f'"concurrency";q={most};qu="concurrent-requests"')
            states.append(f'"concurrency";r={max(most - client.inside(now), 0)}')
        if not policies:
            return {}
        return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(states)}

    def _spend(self, tokens: int) -> None:
        client = self._client
        if client.limit.tokens_per_minute:
            client.level = min(client.level - tokens, client.limit.burst_tokens)
            client.untold += tokens
