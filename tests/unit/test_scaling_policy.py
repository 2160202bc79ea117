"""The policy that scales by work: decisions computed by hand, and none that raises."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID
from ray.serve._private.metrics_utils import TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.engine.work import Work
from serve_app.scaling import SERIES, TokenPolicy

NOW = 1_000.0
Rows = list[tuple[float, float, float, float]]  # seconds before now, waiting, done, finished


def reports(replicas: dict[str, Rows]) -> dict[str, Any]:
    """As Serve has them: by series, by replica, in time."""
    found: dict[str, Any] = {name: {} for name in SERIES}
    for replica, rows in replicas.items():
        for name, column in (("waiting_s", 1), ("done_s", 2), ("finished", 3)):
            found[name][replica] = [TimeStampedValue(NOW - row[0], row[column]) for row in rows]
        found["running_s"][replica] = [TimeStampedValue(NOW - row[0], 0.0) for row in rows]
    return found


def context(raw: Any, **changes: Any) -> AutoscalingContext:
    held: dict[str, Any] = {
        "current_num_replicas": 2,
        "target_num_replicas": 2,
        "running_replicas": ["a", "b"],
        "total_num_requests": 1.0,
        "total_queued_requests": 0.0,
        "policy_state": {},
        "current_time": NOW,
        "config": AutoscalingConfig(
            min_replicas=0, max_replicas=20, target_ongoing_requests=32, look_back_period_s=30
        ),
        **changes,
    }
    return AutoscalingContext(
        deployment_id=DeploymentID(name="Summarizer", app_name="t5-serve"),
        deployment_name="Summarizer",
        app_name="t5-serve",
        aggregated_metrics=None,
        raw_metrics=raw,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=20,
        last_scale_up_time=None,
        last_scale_down_time=None,
        **held,
    )


def decide(replicas: dict[str, Rows], **changes: Any) -> float:
    return TokenPolicy(target_drain_s=2)(context(reports(replicas), **changes))[0]


def steady(per_s: float, backlog: float = 0.0) -> Rows:
    return [(20, backlog, 0, 0), (10, backlog, per_s * 10, 0), (0, backlog, per_s * 20, 0)]


def test_the_series_are_what_replicas_report() -> None:
    assert set(SERIES) == set(Work.__dataclass_fields__)


def test_a_steady_load_gets_what_it_does_and_room_to_drain() -> None:
    # 1.6 s of work a second, 0.8 s of it in front: half as much within 2 s.
    assert decide({"a": steady(0.8, 0.4), "b": steady(0.8, 0.4)}) == pytest.approx(2.0)


def test_what_piles_up_counts_as_having_come() -> None:
    # 10 s of work done and 5 more there than before, in 10 s; 3.5 s in front on average.
    grows = [(10.0, 1.0, 0.0, 0.0), (0.0, 6.0, 10.0, 5.0)]
    assert decide({"a": grows, "b": steady(0)}) == pytest.approx(1.5 + 3.5 / 2)


def test_what_queues_at_the_handle_is_as_much_work_as_recent_requests() -> None:
    # 5 requests were 10 s of work: 4 that wait are 8 s.
    busy = [(10.0, 0.0, 0.0, 0.0), (0.0, 0.0, 10.0, 5.0)]
    assert decide({"a": busy, "b": steady(0)}, total_queued_requests=4.0) == pytest.approx(5.0)


def test_what_a_request_costs_is_remembered() -> None:
    policy = TokenPolicy(target_drain_s=2)
    busy: Rows = [(10, 0, 0, 0), (0, 0, 10, 5)]
    _, state = policy(context(reports({"a": busy, "b": steady(0)})))
    assert len(pickle.dumps(state)) < 200
    idle = {"a": steady(0), "b": steady(0)}
    again = context(reports(idle), policy_state=state, total_queued_requests=6.0)
    assert policy(again)[0] == pytest.approx(6.0)


def test_a_replica_goes_only_if_the_others_have_room() -> None:
    # A tenth more than the load: 0.93 would be one replica, 1.02 is two.
    assert decide({"a": steady(0.425), "b": steady(0.425)}) == pytest.approx(0.935)
    assert decide({"a": steady(0.465), "b": steady(0.465)}) == pytest.approx(1.023)
    # And not above what there is.
    assert decide({"a": steady(0.96), "b": steady(0.96)}) == 2.0


def test_idle_goes_to_nothing_but_not_while_somebody_waits() -> None:
    idle = {"a": steady(0), "b": steady(0)}
    assert decide(idle, total_num_requests=0.0) == 0
    assert 0 < decide(idle, total_num_requests=3.0) < 1


def test_nobody_goes_while_most_have_not_reported() -> None:
    five = {"current_num_replicas": 5, "target_num_replicas": 5, "running_replicas": [*"abcde"]}
    assert decide({"a": steady(0.1), "b": steady(0.1)}, **five) == 5
    three = {name: steady(0.1) for name in "abc"}
    assert decide(three, **five) == pytest.approx(0.33)


@pytest.mark.parametrize(
    "raw",
    [
        None,
        {},
        reports({"a": [(61, 9, 0, 0), (60.5, 9, 1, 0)]}),  # older than a look-back and 30 s
        reports({"elsewhere": steady(1)}),
        {**reports({"a": steady(1)}), "done_s": {}},
    ],
    ids=["none", "empty", "stale", "of others", "a series is missing"],
)
def test_without_reports_rays_own_policy_decides(raw: Any) -> None:
    # 160 requests, 32 for each.
    assert TokenPolicy()(context(raw, total_num_requests=160.0))[0] == 5


def test_without_replicas_rays_own_policy_decides() -> None:
    none = {"current_num_replicas": 0, "target_num_replicas": 0, "running_replicas": []}
    assert TokenPolicy()(context({}, total_num_requests=3.0, **none))[0] >= 1


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(), st.none(), st.text(max_size=2)
)
VALUES = st.lists(st.builds(TimeStampedValue, NUMBERS, NUMBERS), max_size=4)
RAW = st.one_of(
    st.none(),
    st.dictionaries(
        st.sampled_from([*SERIES, "other"]),
        st.one_of(st.none(), st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES)),
    ),
)


@given(
    raw=RAW,
    queued=NUMBERS,
    total=NUMBERS,
    current=st.integers(0, 3),
    target=st.integers(0, 3),
    state=st.dictionaries(st.sampled_from(["request_s", "else"]), NUMBERS),
    now=NUMBERS,
)
def test_it_never_raises(
    raw: Any, queued: Any, total: Any, current: int, target: int, state: Any, now: Any
) -> None:
    policy = TokenPolicy()
    policy._told = True  # without hundreds of tracebacks
    desired, after = policy(
        context(
            raw,
            total_queued_requests=queued,
            total_num_requests=total,
            current_num_replicas=current,
            target_num_replicas=target,
            policy_state=state,
            current_time=now,
        )
    )
    assert desired >= 0
    pickle.dumps(after)
