"""The benchmark's workloads and arithmetic."""

from __future__ import annotations

from statistics import mean, median

import pytest

from bench.engine.figures import GOALS, latencies, percentile
from bench.engine.workloads import (
    Work,
    arrivals,
    depth_seen,
    mixed,
    single,
    sorted_batches,
    source_seen,
    spread,
)


def test_mixed_lengths() -> None:
    works = mixed(2_000, seed=5)
    assert works == mixed(2_000, seed=5)
    assert works != mixed(2_000, seed=6)
    inputs, outputs = [len(w.ids) for w in works], [w.tokens for w in works]
    assert (min(inputs), max(inputs)) == (32, 512)
    assert (min(outputs), max(outputs)) == (16, 200)
    assert 165 < median(inputs) < 195
    assert 55 < median(outputs) < 65
    assert all(w.ids[-1] == 1 and min(w.ids[:-1]) >= 3 for w in works)


def test_a_single_request() -> None:
    assert (len(single(1).ids), single(1).tokens) == (256, 64)


def test_arrivals_are_poisson() -> None:
    times = arrivals(4_000, rate=8.0, seed=3)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert times == sorted(times)
    assert mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    # Exponential gaps: standard deviation equals the mean.
    assert mean((gap - 1 / 8) ** 2 for gap in gaps) ** 0.5 == pytest.approx(1 / 8, rel=0.1)


@pytest.mark.parametrize(
    ("values", "percent", "told"),
    [
        ([3.0], 95, 3.0),
        ([1.0, 2.0, 4.0], 50, 2.0),
        ([4.0, 1.0, 2.0], 75, 3.0),
        ([0.0, 10.0], 99, 9.9),
    ],
)
def test_percentiles(values: list[float], percent: float, told: float) -> None:
    assert percentile(values, percent) == pytest.approx(told)


def test_latency_counts_from_the_schedule() -> None:
    assert latencies([2.0, 5.0], [0.5, 1.0]) == [1.5, 4.0]


def test_batches_are_sorted_and_a_sample_of_them_is_spread() -> None:
    works = [Work([1] * n, 100 - n) for n in (5, 9, 1, 8, 2, 7, 3, 6, 4)]
    lengths = [[len(w.ids) for w in part] for part in sorted_batches(works, 4, "input")]
    assert lengths == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    tokens = [[w.tokens for w in part] for part in sorted_batches(works, 4, "output")]
    assert tokens == [[91, 92, 93, 94], [95, 96, 97, 98], [99]]
    singles = sorted_batches(works, 1, "input")
    assert [len(part[0].ids) for part in spread(singles)] == [5, 3, 8, 2, 4, 7, 9, 1, 6]


def test_means_over_steps() -> None:
    works = [Work([1] * 10, 3), Work([1] * 40, 1)]
    assert source_seen(works) == (10 * 3 + 40) / 4
    assert depth_seen(works) == (1 + 2 + 3 + 1) / 4


def test_goals() -> None:
    assert GOALS["offline greedy"].met(5.0)
    assert not GOALS["offline greedy"].met(4.9)
    assert GOALS["single"].met(0.35)
    assert not GOALS["single"].met(0.36)
    assert str(GOALS["offline beams"]) == "≥ 4×"
