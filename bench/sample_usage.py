"""The usage log that `t5-serve tune recommend --sample` reads: `python -m bench.sample_usage`.

Made up, and the same each time: a weekday of a service that summarizes for a newsroom (long texts,
many around the full hour), a support desk (short, office hours) and a nightly batch. Each event
stands for forty, as in a log that has one in forty. The schema is that of real events.
"""

from __future__ import annotations

import argparse
import gzip
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from serve_app.tuning.samples import SAMPLE
from serve_app.usage.events import usage_event

DAY = datetime(2026, 11, 17, tzinfo=UTC)  # a Tuesday
_MINUTES = 1_440
_PART_TOKENS = 480  # of an input that is split
_CHARACTERS = 4.6  # of a token


def _shape(low: float, begin: float, end: float) -> np.ndarray:
    """Requests by minute: little at night, a plateau from `begin` to `end` o'clock."""
    hour = np.arange(_MINUTES) / 60
    day = 1 / (1 + np.exp(-2.2 * (hour - begin))) - 1 / (1 + np.exp(-1.6 * (hour - end)))
    return low + np.maximum(day, 0)


def _callers() -> list[tuple[str, np.ndarray, dict[str, Any]]]:
    minute = np.arange(_MINUTES)
    # Agencies send on the hour; at 14:20 something happens.
    newsroom = _shape(0.12, 7.0, 20.5) * 2.4 * (1 + 0.8 * np.exp(-(minute % 60) / 8))
    newsroom += 8 * np.exp(-(((minute - 880) / 18) ** 2)) * (minute > 855)
    desk = _shape(0.04, 8.0, 17.5) * 5.0 * (1 - 0.35 * np.exp(-(((minute - 750) / 40) ** 2)))
    nightly = 2.5 * np.interp(minute, [120, 135, 195, 210], [0, 1, 1, 0])
    long = {"tokens": (700, 0.7), "steps": (140, 0.3), "beams": 4, "texts": 1}
    short = {"tokens": (210, 0.6), "steps": (80, 0.4), "beams": 4, "texts": 1}
    batch = {"tokens": (320, 0.5), "steps": (70, 0.3), "beams": 4, "texts": 12}
    return [("newsroom", newsroom, long), ("desk", desk, short), ("nightly", nightly, batch)]


def events(seed: int) -> list[dict[str, Any]]:
    """The day's events, by the time their answers ended."""
    rng = np.random.default_rng(seed)
    rows = []
    for client, rate, kind in _callers():
        counts = rng.poisson(1.55 * rate)
        at = np.repeat(np.arange(_MINUTES), counts) * 60 + rng.uniform(0, 60, counts.sum())
        median, sigma = kind["tokens"]
        steps, spread = kind["steps"]
        for came in at:
            texts = kind["texts"]
            tokens = int(np.clip(rng.lognormal(np.log(median), sigma), 12, 12_000))
            parts = -(-tokens // _PART_TOKENS)
            made = int(np.clip(rng.lognormal(np.log(steps), spread), 8, 250)) * parts
            took = 120 + tokens * 0.12 + made * 2.5 / parts * rng.uniform(0.9, 1.8)
            rows.append(
                (came + took / 1e3, client, kind["beams"], texts, tokens, made, parts, took)
            )
    rows.sort()
    return [_event(number, *row, refused=rng.random() < 0.002) for number, row in enumerate(rows)]


def _event(
    number: int,
    ended: float,
    client: str,
    beams: int,
    texts: int,
    tokens: int,
    made: int,
    parts: int,
    took: float,
    refused: bool,
) -> dict[str, Any]:
    characters = round(tokens * _CHARACTERS) * texts
    facts: dict[str, Any] = {"client": client, "num_beams": beams, "texts": texts}
    facts |= {"characters": characters, "input_tokens": tokens * texts}
    facts |= {"output_tokens": made * texts, "chunks": parts * texts}
    if refused:  # by a client's limit, unread: such an event does not tell a size
        facts = {"client": client, "error_type": "rate_limited"}
    return usage_event(
        request_id=f"made-up-{number:05}",
        traceparent="",
        method="POST",
        route="/v1/summarize/batch" if texts > 1 else "/v1/summarize",
        status=429 if refused else 200,
        total_ms=2.0 if refused else round(took),
        request_bytes=characters + 40,
        response_bytes=480 if refused else round(made * _CHARACTERS) * texts + 300,
        facts=facts,
        now=DAY + timedelta(seconds=ended),
    )


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--out", type=Path, default=SAMPLE)
    arguments = parser.parse_args()
    lines = [json.dumps(event, separators=(",", ":")) for event in events(arguments.seed)]
    packed = gzip.compress("\n".join([*lines, ""]).encode(), 9, mtime=0)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_bytes(packed)
    print(f"{arguments.out}: {len(lines):,} events, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
