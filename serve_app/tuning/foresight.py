"""Replicas as one would have scaled them who knew all arrivals: what a policy could reach at best.

The requests' work (`oracle.works`) is filled into replicas so and so full, a step of time after the
other; dips shorter than a cold start are bridged, because a new replica would cost more. How full
they may be is searched, so that the attainment is just reached in the simulation. Nodes are there
when they are needed. It is a good schedule, not the best one: that lies between `oracle.bound` and
this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from serve_app.tuning.arrivals import Floats
from serve_app.tuning.evaluate import Result, World, result, simulate
from serve_app.tuning.model import Scaling
from serve_app.tuning.oracle import works
from serve_app.tuning.ray_policy import Policy
from serve_app.tuning.simulate import Timeline
from serve_app.tuning.sizes import Ints

_FULL = tuple(float(one) for one in np.geomspace(1.25, 0.2, 31))  # fullest first
_CONTROL_S = 0.5


@dataclass(frozen=True)
class Foreseen:
    """What came of the schedule on one load."""

    result: Result
    timeline: Timeline


class _Schedule(Policy):
    """Says what the schedule says, a cold start ahead."""

    steady = looks = False

    def __init__(self, scaling: Scaling, replicas: Ints, step_s: float, ahead_s: float) -> None:
        super().__init__(scaling)
        self._replicas: list[int] = replicas.tolist()
        self._step_s, self._ahead_s = step_s, ahead_s

    def decide(self, now: float, load: float, current: int, target: int) -> int:
        first = int(now / self._step_s)
        last = int((now + self._ahead_s) / self._step_s)
        return max(self._replicas[first : last + 1] or self._replicas[-1:])


def foresee(world: World, number: int, attainment: float) -> Foreseen | None:
    """The schedule of fewest replica-hours that reaches the attainment on a load; None: none does.

    Args:
        number: of the load.
    """
    low, high = 0, len(_FULL) - 1
    best = _scheduled(world, number, _FULL[high])
    if best.result.attainment < attainment:
        return None
    while low < high:
        middle = (low + high) // 2
        found = _scheduled(world, number, _FULL[middle])
        if found.result.attainment >= attainment:
            high, best = middle, found
        else:
            low = middle + 1
    return best


def _scheduled(world: World, number: int, full: float) -> Foreseen:
    case, platform = world.cases[number], world.platform
    step_s = min(max(world.objective_s, 1.0), case.duration_s)
    steps = math.ceil(case.duration_s / step_s)
    work = works(case.load, world.model, math.inf)
    place = np.minimum((case.load[0] / step_s).astype(np.int64), steps - 1)
    busy = np.bincount(place, work, steps) / (step_s * full)
    bridged = _closed(np.maximum(np.ceil(busy), 1), math.ceil(platform.cold_start_s / step_s))
    replicas = bridged.astype(np.int64)
    scaling = Scaling(
        min_replicas=1, max_replicas=int(replicas.max()), initial_replicas=int(replicas[0])
    )
    there = platform.model_copy(update={"node_s": 0.0, "control_period_s": _CONTROL_S})
    ready = platform.cold_start_s + _CONTROL_S
    told = World(world.cases, world.model, there, world.objective_s)
    policy = _Schedule(scaling, replicas, step_s, ready)
    simulated = simulate(told, scaling, number, policy)
    return Foreseen(result(simulated), simulated.timeline)


def _closed(values: Floats, width: int) -> Floats:
    """Dips of up to `width` entries filled: the closing of mathematical morphology."""
    wide = np.pad(values, width, constant_values=0)
    window = np.lib.stride_tricks.sliding_window_view(wide, width + 1)
    highest = window.max(axis=1)  # of each entry's past and itself
    closed: Floats = np.lib.stride_tricks.sliding_window_view(highest, width + 1).min(axis=1)
    return closed
