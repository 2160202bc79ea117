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
    """`rate` calls a minute, and `burst` more at once, as NGINX's `limit_req … nodelay` counts."""

    rate: int
    burst: int


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


def limit_for(arrivals: Sequence[float], headroom: float) -> Limit:
    """A limit that fits one client's calls, with room above: `headroom` 1.5 is half as much again.

    The rate covers 19 of 20 minutes in which it called; what goes beyond is for the burst.
    """
    minutes = sorted(Counter(math.floor(at / 60) for at in arrivals).values())
    usual = minutes[math.ceil(0.95 * len(minutes)) - 1]
    rate = round_up(usual * headroom)
    return Limit(rate, round_up(max(burst_needed(arrivals, rate) * headroom, 1)))


def round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 and so on."""
    power = 10 ** int(math.log10(max(value, 1)))
    return next(int(step * power) for step in _STEPS if step * power >= value - 1e-9)


def values(arrivals: Mapping[str, Sequence[float]], headroom: float) -> str:
    """The chart's `ingress.rateLimit` as YAML, with what it follows from as comments.

    The default is the middle one of the clients' limits. What a client needs above it, in rate or
    burst, is a tier: one for all clients of the same limit. Clients yet to come get the default.

    Raises:
        ValueError: there are no calls.
    """
    limits = {client: limit_for(times, headroom) for client, times in arrivals.items() if times}
    if not limits:
        raise ValueError("no calls of any client: nothing to conclude limits from")
    default = sorted(limits.values())[(len(limits) - 1) // 2]
    tiers: dict[Limit, list[str]] = {}
    for client, limit in sorted(limits.items()):
        if limit.rate > default.rate or limit.burst > default.burst:
            tiers.setdefault(limit, []).append(client)
    lines = ["# Client, calls seen, limit that fits them:"]
    for client, limit in sorted(limits.items(), key=lambda item: item[1], reverse=True):
        seen = f"{len(arrivals[client]):,} calls"
        lines.append(f"#   {client}: {seen}, {limit.rate}r/m and {limit.burst} more at once")
    lines += [
        "ingress:",
        "  rateLimit:",
        "    enabled: true",
        f"    rate: {default.rate}r/m",
        f"    burst: {default.burst}",
        "    tiers:" if tiers else "    tiers: []",
    ]
    for limit, clients in sorted(tiers.items()):
        # A point is the one character of a client's name that means something else in a pattern.
        match = "|".join(client.replace(".", "[.]") for client in clients)
        lines.append(
            f'      - {{name: r{limit.rate}-b{limit.burst}, match: "{match}", '
            f"rate: {limit.rate}r/m, burst: {limit.burst}}}"
        )
    return "\n".join(lines) + "\n"
