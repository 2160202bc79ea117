"""Arrival processes against their theory; sizes, mixes and recorded loads."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from serve_app.tuning.arrivals import FLASH, Load, arrivals, blocks
from serve_app.tuning.sizes import Mix, Sizes
from serve_app.tuning.trace import TraceError, read_trace
from serve_app.usage.reader import Line

HOUR = 3_600.0


def made(load: Load, seed: int = 7) -> np.ndarray:
    return arrivals(load, np.random.default_rng(seed))


def test_constant_arrivals_are_evenly_spaced() -> None:
    at = made(Load("constant", 4, 10))
    assert at == pytest.approx([0.25 * number for number in range(1, 41)])


@pytest.mark.parametrize(
    ("kind", "burstiness", "squared_variation"),
    [("poisson", 4.0, 1.0), ("bursty", 0.25, 0.25), ("bursty", 9.0, 9.0)],
)
def test_gaps_have_the_mean_and_variance_of_their_process(
    kind: str, burstiness: float, squared_variation: float
) -> None:
    rate = 50.0
    gaps = np.diff(made(Load(kind, rate, HOUR, burstiness)))  # type: ignore[arg-type]
    # The standard error of the mean of n gaps; five of them are not passed by chance.
    error = math.sqrt(squared_variation / len(gaps)) / rate
    assert abs(gaps.mean() - 1 / rate) < 5 * error
    assert gaps.var() * rate**2 == pytest.approx(squared_variation, rel=0.1)


@pytest.mark.parametrize("burstiness", [1.0, 9.0])
def test_counts_scatter_as_a_renewal_process_does(burstiness: float) -> None:
    """In windows much longer than a gap: variance over mean is the burstiness."""
    at = made(Load("bursty", 20, 20 * HOUR, burstiness))
    counts = np.bincount((at / 60).astype(int))[:-1]
    assert counts.mean() == pytest.approx(20 * 60, rel=0.02)
    assert counts.var() / counts.mean() == pytest.approx(burstiness, rel=0.15)


def test_a_day_has_its_trough_first_and_its_peak_at_noon() -> None:
    at = made(Load("diurnal", 10, 24 * HOUR, peak=1.8))
    hours = np.bincount((at / HOUR).astype(int), minlength=24) / HOUR

    def mean(hour: int) -> float:
        # The integral of 10 (1 - 0.8 cos(2 pi h / 24)) over that hour.
        turn = 2 * math.pi / 24
        return 10 * (1 - 0.8 * (math.sin(turn * (hour + 1)) - math.sin(turn * hour)) / turn)

    assert hours == pytest.approx([mean(hour) for hour in range(24)], rel=0.05)
    assert len(at) == pytest.approx(10 * 24 * HOUR, rel=0.01)


def test_two_periods_in_one_load() -> None:
    at = made(Load("diurnal", 10, 2 * HOUR, peak=2, period_s=HOUR))
    quarters = np.bincount((at / (HOUR / 4)).astype(int), minlength=8)
    assert quarters[[1, 2, 5, 6]].min() > 3 * quarters[[0, 3, 4, 7]].max()


def test_a_flash_crowd_rises_stays_and_falls() -> None:
    load = Load("flash-crowd", 20, 1_000, peak=5)
    at = made(load)
    rise, top, fall, end = (share * 1_000 for share in FLASH)

    def seen(begin: float, until: float) -> float:
        return float(((at >= begin) & (at < until)).sum()) / (until - begin)

    assert seen(0, rise) == pytest.approx(20, rel=0.1)
    assert seen(top, fall) == pytest.approx(100, rel=0.05)
    assert seen(fall, end) == pytest.approx(60, rel=0.1)
    assert seen(end, 1_000) == pytest.approx(20, rel=0.15)
    extra = 80 * ((top - rise) / 2 + (fall - top) + (end - fall) / 2)
    assert load.expected() == pytest.approx(20 * 1_000 + extra)


def test_the_same_seed_makes_the_same_arrivals_however_they_are_taken() -> None:
    load = Load("bursty", 1_000, 1_000)
    pieces = list(blocks(load, np.random.default_rng(3)))
    assert len(pieces) > 1
    assert np.array_equal(np.concatenate(pieces), made(load, 3))
    assert not np.array_equal(made(load, 3)[:10], made(load, 4)[:10])
    assert np.all(np.diff(made(load, 3)) >= 0)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        ({"kind": "poisson", "rate": 0, "duration_s": 1}, "rate: must be above 0, is 0"),
        ({"kind": "poisson", "rate": 1, "duration_s": math.inf}, "duration_s: must be"),
        ({"kind": "diurnal", "rate": 1, "duration_s": 1, "peak": 2.5}, "from 1 to 2, is 2.5"),
        ({"kind": "steady", "rate": 1, "duration_s": 1}, "kind: must be one of"),
    ],
)
def test_what_is_no_load_is_refused(load: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Load(**load)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "mean", "middle"),
    [
        ("40", 40, 40),
        ("uniform:10:30", 20, 20),
        ("exponential:200", 200, 200 * math.log(2)),
        ("lognormal:100:0.5", 100 * math.exp(0.125), 100),
    ],
)
def test_sizes_have_the_mean_and_median_of_their_distribution(
    text: str, mean: float, middle: float
) -> None:
    drawn = Sizes.parse(text).sample(np.random.default_rng(1), 100_000)
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert np.median(drawn) == pytest.approx(middle, rel=0.02)
    assert drawn.min() >= 1


@pytest.mark.parametrize(
    "text", ["", "normal:1:2", "uniform:5", "uniform:9:3", "lognormal:-1:1", "uniform:a:b", "0"]
)
def test_what_is_no_distribution_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be|LOW is above"):
        Sizes.parse(text)


def test_a_mix_is_drawn_in_its_shares() -> None:
    drawn = Mix.parse("1:3,4:1").sample(np.random.default_rng(1), 40_000)
    assert np.mean(drawn == 1) == pytest.approx(0.75, abs=0.01)
    assert set(drawn.tolist()) == {1, 4}
    for wrong in ("", "0", "1:-1", "1:0", "1:x"):
        with pytest.raises(ValueError, match=r"must be|needs"):
            Mix.parse(wrong)


MORNING = datetime(2026, 11, 23, 8, tzinfo=UTC)


def event(seconds: float, total_ms: float, **facts: object) -> Line:
    payload = {
        "message": "request",
        "request_id": "r",
        "method": "POST",
        "total_ms": total_ms,
        **facts,
    }
    return Line(MORNING + timedelta(seconds=seconds), json.dumps(payload))


def test_a_trace_is_of_arrivals_not_of_answers_and_a_batch_is_its_texts() -> None:
    trace = read_trace(
        [
            event(10, 9_000, characters=100, input_tokens=25, output_tokens=5, num_beams=4),
            event(2, 500, characters=900, input_tokens=300, output_tokens=30, texts=3, chunks=6),
            event(3, 1, status=401),
            event(3, 1, characters=10**12),
            event(3, 1e300, characters=5),
            event(4, 1, method="GET", characters=5),
            Line(MORNING, json.dumps({"message": "access", "method": "POST", "characters": 5})),
        ]
    )
    assert trace.at == pytest.approx([0, 0.5, 0.5, 0.5])
    assert trace.characters.tolist() == [100, 300, 300, 300]
    assert trace.input_tokens.tolist() == [25, 100, 100, 100]
    assert trace.parts.tolist() == [1, 2, 2, 2]
    assert trace.beams.tolist() == [4, 0, 0, 0]
    assert trace.left_out == 3
    with pytest.raises(TraceError, match="1 requests, none of known size"):
        read_trace([event(3, 1, status=401)])
