"""Figures of the summaries, and what of them is too low or too high."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from quality import RUNS, SEARCHES
from quality.inputs import Bounds, ModelBounds, Parity, Rows, Summary, Text

_RESAMPLES = 10_000
_QUANTILE = 0.01  # of the resampled means: the floor
_Z = 2.326  # one-sided 99 %, of the normal distribution

_scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def looping(text: str) -> bool:
    """Whether a run of one to four words comes three times in a row."""
    return re.search(r"\b(\w+(?:\W+\w+){0,3})(?:\W+\1\b){2}", text.lower()) is not None


@dataclass(frozen=True, slots=True)
class Figures:
    """One run's summaries of some texts by one search. ROUGE in points, text by text."""

    rouge1: list[float]
    rougeL: list[float]  # noqa: N815
    empty: float
    looping: float
    cut_off: float

    def means(self) -> dict[str, float]:
        """What is held against bounds, by the bounds' names."""
        return {
            "rouge1": float(np.mean(self.rouge1)),
            "rougeL": float(np.mean(self.rougeL)),
            "empty": self.empty,
            "looping": self.looping,
            "cut_off": self.cut_off,
        }


@dataclass(frozen=True, slots=True)
class Criterion:
    """One figure and its bound. `name` is the search's and the figure's: `greedy.rougeL`."""

    name: str
    value: float
    bound: float
    kind: Literal["floor", "ceiling"]

    @property
    def passed(self) -> bool:
        """A value on its bound passes."""
        if self.kind == "floor":
            return self.value >= self.bound
        return self.value <= self.bound


def summaries_of(rows: Rows, run: str, search: str, texts: Sequence[Text]) -> list[Summary]:
    """In the texts' order. One that the runner never wrote is a failed one."""
    missing = Summary(error="missing")
    return [rows.summaries.get((run, search, text.id), missing) for text in texts]


def figures(rows: Rows, run: str, search: str, texts: Sequence[Text]) -> Figures:
    """Score one run. A failed summary scores as an empty one."""
    found = summaries_of(rows, run, search, texts)
    scores = [
        _scorer.score(text.synopsis, summary.text)
        for text, summary in zip(texts, found, strict=True)
    ]

    def share(holds: Callable[[Summary], bool]) -> float:
        return sum(map(holds, found)) / len(found)

    return Figures(
        rouge1=[100 * score["rouge1"].fmeasure for score in scores],
        rougeL=[100 * score["rougeL"].fmeasure for score in scores],
        empty=share(lambda summary: not summary.text.strip()),
        looping=share(lambda summary: looping(summary.text)),
        cut_off=share(lambda summary: summary.error is None and not summary.ended),
    )


def parity(rows: Rows, search: str, texts: Sequence[Text]) -> dict[str, float]:
    """How the engine agrees with the reference on `texts`, by the bounds' names."""
    reference = summaries_of(rows, "reference", search, texts)

    def identical(run: str) -> float:
        pairs = zip(summaries_of(rows, run, search, texts), reference, strict=True)
        same = [a.error is None and b.error is None and a.tokens == b.tokens for a, b in pairs]
        return sum(same) / len(same)

    loss = np.mean(figures(rows, "reference", search, texts).rougeL) - np.mean(
        figures(rows, "served", search, texts).rougeL
    )
    return {
        "float32_identical": identical("float32"),
        "served_identical": identical("served"),
        "served_rougeL_loss": float(loss),
    }


def criteria(
    rows: Rows, texts: Sequence[Text], bounds: ModelBounds, default: Parity
) -> list[Criterion]:
    """Everything the gate decides by. Parity is about all texts, the rest about software only."""
    software = [text for text in texts if text.group == "software"]
    allowed = bounds.parity or default
    found: list[Criterion] = []
    for search in SEARCHES:
        failed = sum(
            summary.error is not None
            for run in RUNS
            for summary in summaries_of(rows, run, search, texts)
        )
        found.append(Criterion(f"{search}.failed", failed, 0, "ceiling"))
        for key, value in parity(rows, search, texts).items():
            kind: Literal["floor", "ceiling"] = "ceiling" if key.endswith("loss") else "floor"
            found.append(Criterion(f"{search}.{key}", value, getattr(allowed, key), kind))
        limits: Bounds = getattr(bounds, search)  # its fields are named as searches are
        for key, value in figures(rows, "served", search, software).means().items():
            kind = "floor" if key.startswith("rouge") else "ceiling"
            found.append(Criterion(f"{search}.{key}", value, getattr(limits, key), kind))
    return found


def measured_bounds(found: Figures) -> Bounds:
    """Bounds for a model from its own figures.

    Floors are the 1st percentile of the mean over resampled texts (bootstrap, Efron 1979), rounded
    down to 0.1 points. Ceilings are the 99 % bound of Wilson's score interval (1927), which has
    room above a share of none, rounded up to 0.1 %.
    """
    count = len(found.rougeL)
    picks = np.random.default_rng(1).integers(count, size=(_RESAMPLES, count))

    def floor(values: list[float]) -> float:
        lowest = np.quantile(np.array(values)[picks].mean(axis=1), _QUANTILE)
        return float(np.floor(lowest * 10) / 10)

    def ceiling(share: float) -> float:
        centre = share + _Z**2 / (2 * count)
        spread = _Z * (share * (1 - share) / count + _Z**2 / (4 * count**2)) ** 0.5
        bound = (centre + spread) / (1 + _Z**2 / count)
        return float(np.ceil(bound * 1000) / 1000)

    return Bounds(
        rouge1=floor(found.rouge1),
        rougeL=floor(found.rougeL),
        empty=ceiling(found.empty),
        looping=ceiling(found.looping),
        cut_off=ceiling(found.cut_off),
    )
