"""Rate limits that let clients go on as they have: from their calls to the chart's values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Limits are for people to read: 1, 2, 5, 10, 20, 50 …
_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True, order=True, slots=True)
class Limit:
    """Of requests: `rate` a minute, and `burst` more at once, as NGINX counts (`nodelay`).

    Of tokens: `rate` a minute, and `burst` at once.
    """

    rate: int
    burst: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call. Times in seconds.

    `asked` are the tokens it was weighed by when it came, `used` those it had used when it ended.
    """

    came: float
    ended: float
    asked: int
    used: int


def burst_needed(arrivals: Sequence[float], rate: int) -> int:
    """The least burst with which no call is refused at `rate` calls a minute.

    NGINX's leaky bucket (`ngx_http_limit_req_module`): a call is refused when it would put more
    than `burst` above the rate into the bucket; the first never is.

    Args:
        arrivals: seconds, in order.
    """
    level = most = 0.0
    for before, now in pairwise(arrivals):
        level = max(level - (now - before) * rate / 60 + 1, 0)
        most = max(most, level)
    # Not a call more for what is only the error of floating point.
    return math.ceil(most - 1e-6)


def tokens_needed(calls: Sequence[Call], rate: int) -> int:
    """The least bucket of tokens, refilled at `rate` a minute, with which no call is refused.

    As the service counts: what a call weighs must be in the bucket when it comes, and what it used
    beyond that is taken, or what it did not use given back, when it ends.
    """
    changes = [(call.came, 0, call.asked) for call in calls]
    changes += [(call.ended, 1, call.used - call.asked) for call in calls]
    missing = most = last = 0.0
    for at, ends, tokens in sorted(changes):
        missing = max(missing - (at - last) * rate / 60, 0.0)
        missing, last = max(missing + tokens, 0.0), at
        if not ends:
            most = max(most, missing)
    return math.ceil(most - 1e-6)


def limit_for(arrivals: Sequence[float], headroom: float) -> Limit:
    """A limit that fits one client's calls, with room above: `headroom` 1.5 is half as much again.

    The rate covers 19 of 20 minutes in which it called; what goes beyond is for the burst.
    """
    rate = round_up(_usual(Counter(math.floor(at / 60) for at in arrivals)) * headroom)
    return Limit(rate, round_up(max(burst_needed(arrivals, rate) * headroom, 1)))


def tokens_for(calls: Sequence[Call], headroom: float) -> Limit:
    """The same for what its calls use, in tokens."""
    minutes: Counter[int] = Counter()
    for call in calls:
        minutes[math.floor(call.came / 60)] += max(call.asked, call.used)
    rate = round_up(max(_usual(minutes) * headroom, 1))
    return Limit(rate, round_up(max(tokens_needed(calls, rate) * headroom, 1)))


def round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 and so on."""
    power = 10 ** int(math.log10(max(value, 1)))
    return next(int(step * power) for step in _STEPS if step * power >= value - 1e-9)


def values(
    arrivals: Mapping[str, Sequence[float]], work: Mapping[str, Sequence[Call]], headroom: float
) -> str:
    """The chart's `ingress.rateLimit` and `rate_limits` as YAML, with what they follow from.

    The default is the middle one of the clients' limits. What a client needs above it, in rate or
    burst, is a tier: one for all clients of the same limit. Clients yet to come get the default.

    Raises:
        ValueError: there are no calls.
    """
    requests = {client: limit_for(times, headroom) for client, times in arrivals.items() if times}
    if not requests:
        raise ValueError("no calls of any client: nothing to conclude limits from")
    lines = ["# Client, calls seen, limit that fits them:"]
    for client, limit in _greediest(requests):
        seen = f"{len(arrivals[client]):,} calls"
        lines.append(f"#   {client}: {seen}, {limit.rate}r/m and {limit.burst} more at once")
    lines += ["ingress:", "  rateLimit:", "    enabled: true"]
    lines += _limits(requests, "    ", "rate: {}r/m", "burst: {}", "r")
    tokens = {client: tokens_for(calls, headroom) for client, calls in work.items() if calls}
    if not tokens:
        return "\n".join([*lines, "# No tokens were seen: none can be limited.", ""])
    lines.append("# Client, tokens seen, limit that fits them:")
    for client, limit in _greediest(tokens):
        seen = f"{sum(call.used for call in work[client]):,} tokens"
        lines.append(f"#   {client}: {seen}, {limit.rate:,} a minute and {limit.burst:,} at once")
    lines += ["rate_limits:", "  enabled: true"]
    lines += _limits(tokens, "  ", "tokens_per_minute: {}", "burst_tokens: {}", "t")
    return "\n".join([*lines, ""])


def _usual(minutes: Counter[int]) -> float:
    """What 19 of 20 active minutes do not go beyond."""
    ordered = sorted(minutes.values())
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


def _greediest(limits: Mapping[str, Limit]) -> list[tuple[str, Limit]]:
    return sorted(limits.items(), key=lambda item: item[1], reverse=True)


def _limits(
    limits: Mapping[str, Limit], indent: str, rate: str, burst: str, letter: str
) -> list[str]:
    """Default and tiers as lines of YAML; `rate` and `burst` are how such a value is written."""
    default = sorted(limits.values())[(len(limits) - 1) // 2]
    tiers: dict[Limit, list[str]] = {}
    for client, limit in sorted(limits.items()):
        if limit.rate > default.rate or limit.burst > default.burst:
            tiers.setdefault(limit, []).append(client)
    lines = [
        f"{indent}{rate.format(default.rate)}",
        f"{indent}{burst.format(default.burst)}",
        f"{indent}tiers:" if tiers else f"{indent}tiers: []",
    ]
    for limit, clients in sorted(tiers.items()):
        # A point is the one character of a client's name that means something else in a pattern.
        match = "|".join(client.replace(".", "[.]") for client in clients)
        said = f"{rate.format(limit.rate)}, {burst.format(limit.burst)}"
        name = f"{letter}{limit.rate}-b{limit.burst}"
        lines.append(f'{indent}  - {{name: {name}, match: "{match}", {said}}}')
    return lines
