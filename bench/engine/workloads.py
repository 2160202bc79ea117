"""What is asked of every engine alike: requests with fixed output lengths, and when they arrive."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

VOCABULARY = 32_128
_EOS = 1
_FIRST, _LAST = 3, 31_999  # ordinary tokens: neither special ones nor T5's sentinels
_SIGMA = 0.7


@dataclass(frozen=True, slots=True)
class Work:
    """A request: its encoder input, end token included, and how many tokens to generate for it."""

    ids: list[int]
    tokens: int


@dataclass(frozen=True, slots=True)
class Decoding:
    """Search settings, alike for all requests of a workload; `ngram` 0 bans no repetition."""

    beams: int
    ngram: int

    @property
    def label(self) -> str:
        """As printed."""
        return "greedy" if self.beams == 1 else f"{self.beams} beams"


def log_normal(rng: random.Random, median: int, low: int, high: int) -> int:
    """A length in tokens, log-normal with sigma 0.7, clipped to [low, high]."""
    return round(min(max(median * rng.lognormvariate(0, _SIGMA), low), high))


def random_input(rng: random.Random, length: int) -> list[int]:
    """Random tokens, the end token last."""
    return [*rng.choices(range(_FIRST, _LAST + 1), k=length - 1), _EOS]


def mixed(count: int, seed: int) -> list[Work]:
    """Inputs of 32 to 512 tokens (median 180), outputs of 16 to 200 (median 60)."""
    rng = random.Random(seed)
    return [
        Work(random_input(rng, log_normal(rng, 180, 32, 512)), log_normal(rng, 60, 16, 200))
        for _ in range(count)
    ]


def sorted_batches(works: Sequence[Work], batch: int, order: str) -> list[list[Work]]:
    """All requests, sorted by `input` or `output` length, in batches of this size."""

    def length(work: Work) -> int:
        return work.tokens if order == "output" else len(work.ids)

    ordered = sorted(works, key=length)
    return [ordered[start : start + batch] for start in range(0, len(ordered), batch)]


def spread(batches: Sequence[list[Work]]) -> Iterator[list[Work]]:
    """The middle one, then those at the quarters, at the eighths, …: however many one takes from
    the front, they are a fair sample of all lengths."""
    ranges = [(0, len(batches))]
    for low, high in ranges:
        if low < high:
            middle = (low + high) // 2
            yield batches[middle]
            ranges += [(low, middle), (middle + 1, high)]


def single(seed: int) -> Work:
    """256 tokens in, 64 out."""
    return Work(random_input(random.Random(seed), 256), 64)


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Times of a Poisson process of `rate` requests/s, in seconds from the start."""
    rng = random.Random(seed)
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


def distinct(count: int, seed: int) -> list[list[int]]:
    """Inputs of 256 tokens, none of them twice in one: what is copied has one continuation."""
    rng = random.Random(seed)
    return [[*rng.sample(range(_FIRST, _LAST + 1), 255), _EOS] for _ in range(count)]


def documents(count: int) -> list[list[int]]:
    """The demo model's inputs for docstrings of the standard library; they repeat if they must."""
    from serve_app.engine.checkpoint import resolve
    from serve_app.engine.tokenizer import Tokenizer
    from tests.texts import docstrings

    checkpoint = resolve("demo")
    tokenizer = Tokenizer(checkpoint)
    texts = docstrings()
    return [
        tokenizer.model_input(
            checkpoint.prefix + texts[i % len(texts)], checkpoint.max_input_tokens
        )[0]
        for i in range(count)
    ]


def source_seen(works: Sequence[Work]) -> float:
    """Mean input length over all decode steps: long outputs are there for more of them."""
    return sum(len(w.ids) * w.tokens for w in works) / sum(w.tokens for w in works)


def depth_seen(works: Sequence[Work]) -> float:
    """Mean number of tokens a document's decoder attends to over all decode steps.

    The t-th step of a document attends to t tokens, the start token included.
    """
    return sum(w.tokens * (w.tokens + 1) / 2 for w in works) / sum(w.tokens for w in works)
