"""Ray Serve's own autoscaling on virtual time: policy, delays, factors, and the load it sees.

Nothing of what decides is written anew: the modules are Ray's, of the version installed. Its policy
module reads the clock, so it is loaded a second time, under a name of our own and with a clock of
our own; the one that Ray itself uses stays as it is. The functions are private to Ray, therefore
Ray is pinned and a golden trace of each version is among the tests. The merge of reports alone is
done again, compiled (`merge.py`), and held against Ray's.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from ray.serve import autoscaling_policy
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import (
    RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR,
    SERVE_AUTOSCALING_DECISION_COUNTERS_KEY,
    SERVE_AUTOSCALING_DECISION_TIMESTAMP_KEY,
)
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.tuning import merge
from serve_app.tuning.arrivals import Floats
from serve_app.tuning.model import Scaling

RECORD_FACTOR = float(RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR)
_OWN = {"signal", "target_drain_s"}  # of `Scaling`: not Ray's
_EPSILON = 1e-6  # as Ray has it where it compares delays


def _private_copy(clock: Callable[[], float]) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "serve_app.tuning._ray_autoscaling_policy", autoscaling_policy.__file__
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.time = SimpleNamespace(time=clock, monotonic=clock)  # type: ignore[attr-defined]
    return module


@dataclass(frozen=True)
class Signal:
    """What a controller knows between two reports, from which it takes a load at each moment.

    For `mean` the load is the integral so far and the last value carried on, over the time since
    `begin`: Ray's `time_weighted_average_arrays`. For `max` and `min` it is `value`.
    """

    value: float  # the last one, or the extreme
    integral: float = 0.0
    begin: float = 0.0
    last: float = 0.0
    mean: bool = False

    def at(self, now: float) -> float:
        """Requests, as `DeploymentAutoscalingState.get_total_num_requests` would say then."""
        if not self.mean:
            return self.value
        held = max(now - self.last, 0.0) or 1e-3
        span = self.last + held - self.begin
        return (self.integral + self.value * held) / span if span > 0 else 0.0


def signal(ts: Floats, val: Floats, offsets: Any, function: str) -> Signal:
    """The signal of series, laid out as `merge_and_aggregate_arrays` takes them."""
    held, seconds, figures = merge.steps(ts, val, offsets)
    if not held.size:
        return Signal(0.0)
    begin, last, value, low, high = figures.tolist()
    if function != "mean":
        return Signal(high if function == "max" else low)
    # The mean over one more second tells the integral. By the calls that Ray makes, for the bits.
    mean = float(np.dot(held, seconds) / seconds.sum())
    return Signal(value, mean * (last + 1 - begin) - value, begin, last, True)


class Policy:
    """Decides a number of replicas as Ray's controller does, each time it is asked.

    Args:
        scaling: the settings.
        function: the policy, as in `policy_function`; None: Ray's default. Between two reports
            what it wants must rise, or fall, as the requests and the queued ones do.
        more: gives fields of the context beside the usual, at a moment.

    Attributes:
        steady: decisions rise with the load and with nothing else.
        looks: at the load; else nothing needs to be recorded.
    """

    steady = True
    looks = True

    def __init__(
        self,
        scaling: Scaling,
        function: Callable[[AutoscalingContext], tuple[int | float, dict[str, Any]]] | None = None,
        more: Callable[[float], dict[str, Any]] = lambda _: {},
    ) -> None:
        self._now = 0.0
        self._module = _private_copy(lambda: self._now)
        said = scaling.model_dump(exclude=_OWN, exclude_none=True)
        self.config = AutoscalingConfig(**said)
        self._raw = function or self._module.replica_queue_length_autoscaling_policy
        self._decide = self._module._apply_autoscaling_config(self._raw)
        self._scaling = scaling
        self._more = more
        self._state: dict[str, Any] = {}
        self._id = DeploymentID(name="Summarizer", app_name="t5-serve")

    def decide(self, now: float, load: float, current: int, target: int) -> int:
        """One pass of the control loop: the new target, within bounds."""
        self._now = now
        decided, self._state = self._decide(self._context(now, load, current, target))
        return self._bounded(math.ceil(decided))

    def wish(self, now: float, load: float, current: int, target: int) -> int:
        """What it would decide then, were there no delays."""
        context = self._context(now, load, current, target)
        desired, _ = self._raw(context)
        return int(self._module._apply_scaling_factors(desired, current, self.config))

    @property
    def since(self) -> float | None:
        """When the decision that waits for its delay began to wait."""
        since = self._state.get(SERVE_AUTOSCALING_DECISION_TIMESTAMP_KEY)
        return None if since is None else float(since)

    @property
    def waits(self) -> int:
        """What that decision is: above 0 for more replicas, below for fewer, 0: there is none."""
        counter = int(self._state.get(SERVE_AUTOSCALING_DECISION_COUNTERS_KEY, 0))
        return (counter > 0) - (counter < 0)

    def _bounded(self, replicas: int) -> int:
        return max(self._scaling.min_replicas, min(self._scaling.max_replicas, replicas))

    def _context(self, now: float, load: float, current: int, target: int) -> AutoscalingContext:
        said = {
            "total_queued_requests": None,
            "aggregated_metrics": None,
            "raw_metrics": None,
            "running_replicas": [],
            **self._more(now),
        }
        return AutoscalingContext(
            deployment_id=self._id,
            deployment_name=self._id.name,
            app_name=self._id.app_name,
            current_num_replicas=current,
            target_num_replicas=target,
            total_num_requests=load,
            capacity_adjusted_min_replicas=self._scaling.min_replicas,
            capacity_adjusted_max_replicas=self._scaling.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self.config,
            **said,
        )


def next_change(
    policy: Policy,
    load: Callable[[float], float],
    first: int,
    last: int,
    period_s: float,
    current: int,
    target: int,
) -> tuple[int, int] | None:
    """The first pass of the control loop among `first` to `last` that sets another target.

    Passes are `period_s` apart; between them only the load changes, and from `first` to `last`
    in one direction (a mean in which the last value is carried on). So where a policy that is
    `steady` wants to the same side of the target at two passes, it does at all between, and only
    those matter at which a delay begins or is over. Another is asked at each pass.

    Returns:
        The pass and the new target, or None.
    """

    def side_at(pass_: int) -> int:
        at = pass_ * period_s
        return _side(policy.wish(at, load(at), current, target), target)

    tick = first
    while tick <= last:
        decided = policy.decide(tick * period_s, load(tick * period_s), current, target)
        if decided != target:
            return tick, decided
        following = tick + 1
        if policy.steady and following < last:
            side, end = _alike(side_at, following, last)
            if current == 0 or side == 0:
                following = end
            elif policy.waits == side and policy.since is not None:
                over = policy.since + _delay(policy.config, side > 0, target) - _EPSILON
                following = max(following, min(math.ceil(over / period_s - 1e-9), end + 1))
                if following > last:
                    return None
        tick = following
    return None


def _alike(side_at: Callable[[int], int], first: int, last: int) -> tuple[int, int]:
    """The first pass' side, and the last pass on it of those that follow without a gap."""
    side = side_at(first)
    if side_at(last) == side:
        return side, last
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if side_at(middle) == side else (first, middle)
    return side, first


def _side(wish: int, target: int) -> int:
    return (wish > target) - (wish < target)


def _delay(config: AutoscalingConfig, up: bool, target: int) -> float:
    if up:
        return float(config.upscale_delay_s)
    if target == 1 and config.downscale_to_zero_delay_s is not None:
        return float(config.downscale_to_zero_delay_s)
    return float(config.downscale_delay_s)


def series(
    points: Sequence[tuple[float, Floats]], columns: Sequence[int] | None = None
) -> tuple[Floats, Floats, Any]:
    """Columns of points as series: NaN where a series has none.

    Each point is a time and a value per series; each series keeps the points it has.

    Args:
        columns: those that are wanted; None: all.
    """
    times = np.array([at for at, _ in points])
    values = np.array([row for _, row in points])
    among = np.arange(values.shape[1]) if columns is None else np.array(columns)
    laid: tuple[Floats, Floats, Any] = merge.laid(times, values, among)
    return laid
