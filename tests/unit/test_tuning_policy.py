"""Ray's own autoscaling on virtual time: stepped by hand, metrics, a golden trace."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.serve import autoscaling_policy
from ray.serve._private import autoscaling_metrics_merge as merge

from serve_app.tuning.model import Scaling
from serve_app.tuning.ray_policy import Policy, Signal, next_change, series, signal

GOLDEN = Path(__file__).parent / "golden"
SCALING = Scaling(
    min_replicas=1,
    max_replicas=10,
    target_ongoing_requests=4,
    upscale_delay_s=30,
    downscale_delay_s=60,
)


def stepped(policy: Policy, load: float, ticks: range, current: int, target: int) -> dict[int, int]:
    """Passes of the control loop that change the target, which takes effect at once."""
    changes = {}
    for tick in ticks:
        decided = policy.decide(tick / 10, load, current, target)
        if decided != target:
            changes[tick] = current = target = decided
    return changes


def test_a_step_up_is_followed_after_its_delay_and_a_step_down_after_its_own() -> None:
    policy = Policy(SCALING)
    # 22 requests at 4 each are 5.5 replicas, seen first at 0 s; 3 requests are 0.75, from 100 s on.
    assert stepped(policy, 22, range(1_000), 1, 1) == {300: 6}
    assert stepped(policy, 3, range(1_000, 2_000), 6, 6) == {1_600: 1}


def test_a_wish_that_passes_begins_its_delay_anew() -> None:
    policy = Policy(SCALING)
    assert stepped(policy, 22, range(250), 1, 1) == {}
    assert stepped(policy, 4, range(250, 251), 1, 1) == {}
    assert stepped(policy, 22, range(251, 1_000), 1, 1) == {551: 6}


def test_factors_and_bounds() -> None:
    half = SCALING.model_copy(update={"upscaling_factor": 0.5, "upscale_delay_s": 0.0})
    # From 2 half of the way to 8: 5; from 5: 6.5, up; 7.5, up.
    assert stepped(Policy(half), 32, range(4), 2, 2) == {0: 5, 1: 7, 2: 8}
    assert stepped(Policy(SCALING), 4_000, range(400), 2, 2) == {300: 10}
    kept = SCALING.model_copy(update={"min_replicas": 3})
    assert stepped(Policy(kept), 0, range(800), 5, 5) == {600: 3}


def test_from_zero_it_rises_at_once_and_to_zero_it_has_a_delay_of_its_own() -> None:
    zero = SCALING.model_copy(update={"min_replicas": 0, "downscale_to_zero_delay_s": 90.0})
    assert stepped(Policy(zero), 1, range(10), 0, 0) == {0: 1}
    assert stepped(Policy(zero), 0, range(2_000), 4, 4) == {600: 1, 1_501: 0}


def test_ray_itself_keeps_its_clock() -> None:
    Policy(SCALING).decide(5.0, 22, 1, 1)
    assert autoscaling_policy.time is time


@pytest.mark.parametrize("seed", range(8))
def test_skipped_passes_change_nothing(seed: int) -> None:
    """Against a loop that asks at every pass, over random reports of a load."""
    rng = np.random.default_rng(seed)
    scaling = SCALING.model_copy(
        update={
            "min_replicas": int(rng.integers(0, 2)),
            "upscale_delay_s": [0.0, 3.3, 30.0][seed % 3],
            "downscale_delay_s": float(rng.choice([0.0, 7.0, 45.0])),
            "downscaling_factor": float(rng.choice([0.3, 1.0])),
        }
    )
    every, some = Policy(scaling), Policy(scaling)
    now = {"every": (1, 1), "some": (1, 1)}
    changes: dict[str, list[tuple[int, int]]] = {"every": [], "some": []}
    for window in range(60):
        first, last = window * 100, window * 100 + 99
        at = first / 10
        level = rng.uniform(0, 50, 2) * rng.integers(0, 2)
        seen = Signal(level[0], level[1] * 20, at - 25, at - 5, True)
        for tick in range(first, last + 1):
            current, target = now["every"]
            decided = every.decide(tick * 0.1, seen.at(tick * 0.1), current, target)
            if decided != target:
                changes["every"].append((tick, decided))
                now["every"] = current, decided
        tick = first
        while True:
            current, target = now["some"]
            found = next_change(some, seen.at, tick, last, 0.1, current, target)
            if found is None:
                break
            changes["some"].append(found)
            now["some"] = current, found[1]
            tick = found[0] + 1
        # Replicas are ready at some later time.
        if rng.random() < 0.5:
            now = {name: (target, target) for name, (_, target) in now.items()}
    assert changes["every"] == changes["some"]
    assert len(changes["every"]) > 5 or scaling.upscale_delay_s == 30


@pytest.mark.parametrize("function", ["mean", "max", "min"])
def test_a_signal_is_what_rays_merge_gives_at_any_later_moment(function: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        times = np.sort(rng.uniform(0, 30, rng.integers(1, 6)))
        rows = rng.integers(0, 9, (len(times), rng.integers(1, 5))).astype(float)
        # Some series begin late.
        for column in range(1, rows.shape[1]):
            rows[: rng.integers(0, len(times)), column] = np.nan
        ts, val, offsets = series(list(zip(times.tolist(), rows, strict=True)))
        found = signal(ts, val, offsets, function)
        for now in times[-1] + np.array([0.5, 3.0, 17.0]):
            expected = merge.merge_and_aggregate_arrays(ts, val, offsets, now, function)
            assert found.at(now) == pytest.approx(expected, abs=1e-9)


def rays_signal(ts: Any, val: Any, offsets: Any, function: str) -> Signal:
    """By Ray's functions alone."""
    moments, totals = merge.merge_instantaneous_total_arrays(ts, val, offsets)
    if not moments.size:
        return Signal(0.0)
    last = float(moments[-1])
    found = float(merge.merge_and_aggregate_arrays(ts, val, offsets, last + 1, function))
    if function != "mean":
        return Signal(found)
    firsts = ts[offsets[:-1][offsets[1:] > offsets[:-1]]]
    begin = float(moments[0])
    if len(firsts) > 1 and firsts.max() <= last:
        begin = max(float(firsts.max()), begin)
    value = float(totals[-1])
    return Signal(value, found * (last + 1 - begin) - value, begin, last, True)


@pytest.mark.parametrize("function", ["mean", "max", "min"])
def test_the_compiled_merge_is_rays_to_the_last_bit(function: str) -> None:
    """Series of all kinds: empty ones, one alone, of zeros, points closer than Ray's 10 ms."""
    rng = np.random.default_rng(6)
    seen = {"nothing": 0, "alone": 0, "many": 0, "late": 0}
    for number in range(3_000):
        span = float(rng.choice([0.02, 0.5, 30, 600]))
        times = rng.uniform(0, 80_000) + np.sort(rng.uniform(0, span, rng.integers(1, 24)))
        if number % 5 == 0:
            times = np.round(times, 2)  # and points at the same moment
        counts = rng.integers(0, rng.choice([1, 2, 5, 400]), (len(times), rng.integers(1, 12)))
        values = counts.astype(float)
        values[rng.random(values.shape) < rng.choice([0, 0.3, 0.9])] = np.nan
        for column in range(1, values.shape[1]):
            if rng.random() < 0.5:
                values[: rng.integers(0, len(times) + 1), column] = np.nan
        columns = rng.permutation(values.shape[1])[: rng.integers(1, values.shape[1] + 1)].tolist()
        points = list(zip(times.tolist(), values, strict=True))
        kept = [[(at, row[one]) for at, row in points if row[one] == row[one]] for one in columns]
        ts = np.array([at for one in kept for at, _ in one])
        val = np.array([value for one in kept for _, value in one])
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in kept])]).astype(np.int64)
        expected = rays_signal(ts, val, offsets, function)
        assert signal(*series(points, columns), function) == expected
        active = sum(map(bool, kept))
        seen["nothing" if expected == Signal(0.0) else "alone" if active == 1 else "many"] += 1
        seen["late"] += expected.begin > times[0] + 0.01
    assert min(seen.values()) > (50 if function == "mean" else -1)


def test_series_keep_the_points_they_have() -> None:
    ts, val, offsets = series(
        [
            (1.0, np.array([5.0, np.nan])),
            (2.0, np.array([6.0, 7.0])),
            (3.0, np.array([np.nan, 8.0])),
        ]
    )
    assert ts.tolist() == [1, 2, 2, 3]
    assert val.tolist() == [5, 6, 7, 8]
    assert offsets.tolist() == [0, 2, 4]


def golden_trace() -> list[list[float]]:
    """Targets over an hour of waves, ramps and gaps, replicas being ready 20 s later."""
    policy = Policy(SCALING.model_copy(update={"downscaling_factor": 0.7, "upscaling_factor": 1.3}))
    target, ready = 2, [(0.0, 2)]
    changes = []
    for tick in range(36_000):
        now = tick / 10
        wave = 12 + 11 * math.sin(now / 180) + (25 if 1_200 <= now < 1_320 else 0)
        load = 0.0 if 2_400 <= now < 2_500 else wave
        current = next(count for at, count in reversed(ready) if at <= now)
        decided = policy.decide(now, load, current, target)
        if decided != target:
            changes.append([now, load, current, decided])
            target = decided
            ready.append((now + 20, decided))
    return changes


def test_the_policy_decides_as_it_did() -> None:
    """For each Ray version a trace. A new Ray needs a new one, and a look at what has changed:

    python -c 'from tests.unit.test_tuning_policy import *; write_golden()'
    """
    file = GOLDEN / f"autoscaling-ray-{ray.__version__}.json"
    assert file.exists(), f"no golden trace of Ray {ray.__version__}: see this test"
    kept = json.loads(file.read_text())
    made = golden_trace()
    assert [row[2:] for row in made] == [row[2:] for row in kept]
    assert np.array(made) == pytest.approx(np.array(kept))
    assert len(made) > 10


def write_golden() -> None:
    file = GOLDEN / f"autoscaling-ray-{ray.__version__}.json"
    rows = ",\n".join(json.dumps(row) for row in golden_trace())
    file.write_text(f"[\n{rows}\n]\n")
