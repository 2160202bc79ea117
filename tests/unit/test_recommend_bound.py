"""The lower bound is one, and no looser than a hand-made case allows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from serve_app.tuning import foresight
from serve_app.tuning.arrivals import Load
from serve_app.tuning.cases import Case, process_cases
from serve_app.tuning.evaluate import World, result, simulate
from serve_app.tuning.foresight import foresee
from serve_app.tuning.model import Decode, Encode, Platform, Scaling, ServiceModel
from serve_app.tuning.oracle import bound, works
from serve_app.tuning.recommend import RAY_DEFAULTS, fixed
from serve_app.tuning.reports import Reports
from serve_app.tuning.simulate import Block
from serve_app.tuning.sizes import Mix, Sizes

SIZES = Sizes.parse("lognormal:180:0.6"), Sizes.parse("lognormal:60:0.5"), Mix.parse("1:0.7,4:0.3")
# One request at a time, of ten microseconds a token.
SERVER = ServiceModel(
    encode=Encode(token_s=1e-5),
    decode=Decode(step_s=0, row_s=0),
    overhead_s=0,
    rows=1,
    max_batch_tokens=1,
)


def block(at: Any, tokens: Any, steps: Any = 1, beams: Any = 1) -> Block:
    at = np.asarray(at, dtype=float)
    shaped = [
        np.broadcast_to(np.asarray(one, dtype=np.int64), at.shape) for one in (tokens, steps, beams)
    ]
    return at, shaped[0], shaped[1], shaped[2]


def test_work_is_encoding_and_a_share_of_the_fullest_batch_the_objective_allows() -> None:
    model = ServiceModel(
        encode=Encode(call_s=9, token_s=0.001, squared_token_s=1e-6),
        decode=Decode(step_s=0.01, row_s=0.001, source_token_s=1e-6),
        overhead_s=0.1,
        rows=8,
    )
    load = block([0, 0, 0], [100, 100, 100], [10, 10, 10], [1, 4, 1])
    own = 0.1 + 0.01  # 100 tokens, and their square
    loose = works(load, model, 100.0)
    # Ten steps of a full batch of 8 rows: a row's share of 0.01 s is an eighth.
    alone = [10 * (0.001 * beams + 1e-4 + 0.01 * beams / 8) for beams in (1, 4, 1)]
    assert loose == pytest.approx([own + one for one in alone])
    # 0.15 s for ten steps allow 5 rows in each.
    tight = works(load, model, 0.1 + own + 0.15)
    assert tight[1] == pytest.approx(own + 10 * (0.004 + 1e-4 + 0.01 * 4 / 5))
    # Four rows need 0.014 s and more for a step, one row 0.011.
    assert np.isfinite(works(load, model, 0.1 + own + 0.13)).tolist() == [True, False, True]
    assert not np.isfinite(works(load, model, 0.05)).any()


def test_even_work_is_bounded_by_itself() -> None:
    """3,600 requests of half a second: 1,800 replica-seconds, less what slots leave out."""
    load = block(np.arange(3_600.0), 50_000)
    found = bound(load, 3_600, SERVER, Platform(), 1.0, 1.0, least=0)
    assert 0.97 * 1_800 <= found.replica_s <= 1_800
    assert bound(load, 3_600, SERVER, Platform(), 1.0, 0.5, least=0).replica_s <= 900
    # At least one replica at each moment is more than that.
    assert bound(load, 3_600, SERVER, Platform(), 1.0, 1.0).replica_s == pytest.approx(3_600)


def test_a_peak_costs_a_start_or_waiting_for_it() -> None:
    """An hour in which ten minutes keep three replicas busy: 3,600 + 2 x 600 and two starts."""
    quiet, busy = np.arange(0, 3_600, 10.0), np.arange(1_500, 2_100, 0.25)
    at = np.sort(np.concatenate([quiet, busy]))
    load = block(at, 75_000)
    platform = Platform(cold_start_s=60)
    found = bound(load, 3_600, SERVER, platform, 2.0, 1.0)
    assert 0.95 * (3_600 + 2 * 600 + 2 * 60) <= found.replica_s <= 3_600 + 2 * 630 + 2 * 60
    assert found.replicas.max() == pytest.approx(3, abs=0.2)
    cheap = bound(load, 3_600, SERVER, Platform(cold_start_s=0), 2.0, 1.0)
    assert found.replica_s - cheap.replica_s == pytest.approx(2 * 60, rel=0.1)


def test_the_smallest_requests_are_served_first() -> None:
    small, large = np.arange(0, 1_000, 2.0), np.arange(1, 1_000, 2.0)
    at = np.sort(np.concatenate([small, large]))
    load = block(at, np.where(at % 2 == 0, 10_000, 90_000))
    half = bound(load, 1_000, SERVER, Platform(), 1.0, 0.5, least=0)
    assert 0.85 * 500 * 0.1 <= half.replica_s <= 500 * 0.1


def test_what_cannot_be_met_has_no_bound() -> None:
    load = block([0.0, 1.0], [10_000, 900_000])
    assert math.isinf(bound(load, 10, SERVER, Platform(), 1.0, 0.9).replica_s)
    assert math.isfinite(bound(load, 10, SERVER, Platform(), 1.0, 0.5).replica_s)


def world(kind: str, seed: int, **more: Any) -> World:
    load = Load(kind, 25, 600, **more)  # type: ignore[arg-type]
    training, held_out = process_cases(load, SIZES, ServiceModel(), 2.0, seed)
    platform = Platform(node_s=20, cold_start_s=10)
    return World((*training, *held_out), ServiceModel(), platform, 2.0)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("poisson", {}),
        ("bursty", {"burstiness": 50}),
        ("flash-crowd", {"peak": 5}),
        ("diurnal", {}),
    ],
)
def test_no_simulated_setting_goes_below_the_bound_at_its_attainment(
    kind: str, more: dict[str, Any]
) -> None:
    tried = world(kind, 3, **more)
    rng = np.random.default_rng(5)
    settings = [fixed(number) for number in (1, 2, 3, 5)] + [RAY_DEFAULTS]
    settings += [
        Scaling(
            max_replicas=int(rng.integers(2, 8)),
            target_ongoing_requests=float(rng.uniform(1, 20)),
            upscale_delay_s=float(rng.uniform(0, 20)),
            downscale_delay_s=float(rng.uniform(0, 60)),
            look_back_period_s=12,
        )
        for _ in range(6)
    ]
    seen = set()
    for number, case in enumerate(tried.cases[:2]):
        for scaling in settings:
            found = result(simulate(tried, scaling, number))
            seen.add(round(found.attainment, 2))
            least = bound(case.load, 600, tried.model, tried.platform, 2.0, found.attainment)
            assert least.replica_s <= found.replica_hours * 3_600 * (1 + 1e-9)
            # And it says something: most of the work there is.
            served = np.sort(works(case.load, tried.model, 2.0))[: case.requests - found.missed]
            assert least.replica_s >= max(0.8 * served.sum(), 599)
    assert len(seen) > 3


def test_foresight_reaches_the_goal_with_less_than_a_fixed_number() -> None:
    tried = world("diurnal", 3)
    case: Case = tried.cases[0]
    found = foresee(tried, 0, 0.99)
    assert found is not None
    assert found.result.attainment >= 0.99
    least = bound(case.load, 600, tried.model, tried.platform, 2.0, 0.99)
    assert least.replica_s <= found.result.replica_hours * 3_600
    number = next(n for n in range(1, 9) if result(simulate(tried, fixed(n), 0)).attainment >= 0.99)
    assert found.result.replica_hours < number * 600 / 3_600
    assert foresee(World(tried.cases, tried.model, tried.platform, 0.01), 0, 0.99) is None


def test_a_schedule_is_the_same_where_loads_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports, which a schedule does not look at, are left out of its simulation."""
    tried = world("diurnal", 3)
    without = foresee(tried, 0, 0.99)
    made = Reports.push
    pushed = []

    def push(reports: Reports, now: float, *about: Any) -> None:
        pushed.append(now)
        made(reports, now, *about)

    monkeypatch.setattr(Reports, "push", push)
    assert foresee(tried, 0, 0.99) == without
    assert not pushed
    monkeypatch.setattr(foresight._Schedule, "looks", True)
    assert foresee(tried, 0, 0.99) == without
    assert pushed
