"""A recorded load: when requests came and how large they were, from usage events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from serve_app.tuning.arrivals import Floats
from serve_app.tuning.sizes import Ints
from serve_app.usage.reader import Line

# Lines are input: of one request, no more than any service allows.
_TEXTS, _CHARACTERS, _DAY_MS = 1_024, 10_000_000, 86_400_000


class TraceError(Exception):
    """There is no load in what was read; the message says why, in one line."""


@dataclass(frozen=True)
class Trace:
    """One entry per text, in the order of arrival; of a batch's texts each has an equal part.

    Attributes:
        at: seconds since the first.
        characters, input_tokens, output_tokens: of the text; tokens are 0 where it got no answer.
        parts: encoder inputs it was split into.
        beams: beam width; 0: the model's own.
        left_out: requests whose event does not say how large they were: refused ones, mostly.
    """

    at: Floats
    characters: Ints
    input_tokens: Ints
    output_tokens: Ints
    parts: Ints
    beams: Ints
    left_out: int = 0

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last, and one mean gap."""
        return float(self.at[-1]) * len(self.at) / max(len(self.at) - 1, 1) or 1.0


def read_trace(lines: Iterable[Line]) -> Trace:
    """The load in the service's usage events; NGINX's lines are passed over.

    Raises:
        TraceError: no event tells a size.
    """
    rows: list[tuple[float, int, int, int, int, int]] = []
    left_out = 0
    for line in lines:
        event = json.loads(line.payload)
        if event.get("message") != "request" or event.get("method") != "POST":
            continue
        characters, total_ms = event.get("characters"), event.get("total_ms")
        if not _within(characters, 1, _CHARACTERS) or not _within(total_ms, 0, _DAY_MS):
            left_out += 1
            continue
        # The event's time is when the answer ended.
        came = line.time.timestamp() - total_ms / 1e3
        texts = min(_count(event, "texts", 1), _TEXTS)
        each = (
            max(round(characters / texts), 1),
            round(_count(event, "input_tokens", 0) / texts),
            round(_count(event, "output_tokens", 0) / texts),
            max(round(_count(event, "chunks", 1) / texts), 1),
            _count(event, "num_beams", 0),
        )
        rows += [(came, *each)] * texts
    if not rows:
        told = f": {left_out} requests, none of known size" if left_out else ""
        raise TraceError(f"no usage event tells the size of a text{told}")
    rows.sort()
    at = np.array([row[0] for row in rows])
    sizes = np.array([row[1:] for row in rows], dtype=np.int64).T
    return Trace(at - at[0], sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], left_out)


def _within(value: object, low: int, high: int) -> bool:
    return isinstance(value, int | float) and low <= value <= high


def _count(event: dict[str, object], name: str, default: int) -> int:
    value = event.get(name)
    return value if isinstance(value, int) and 0 < value <= 10_000_000 else default
