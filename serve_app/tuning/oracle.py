"""A lower bound of replica-hours: no scaling whatever, foresight included, needs fewer.

A request that meets the objective takes at least its own encoding and its share of decode steps
from replicas, and all of it between its arrival and the objective. Time is cut into slots; what
arrives so late in its slot that it may end in the next one counts as free. What is left must
fit into the replica-seconds of its slot. A schedule costs its replica-seconds and, for each replica
that is added, the cold start, which is paid for, too; the first ones are ready in the beginning, as
simulated ones are. The cheapest schedule that serves enough requests is found by dynamic
programming over slots and numbers of replicas, with a price per served request in place of the
constraint: for any price the Lagrangian dual bounds from below, and the best price is searched.

Numbers of replicas may be fractions: a replica that is there for half a slot. Rounding them to a
grid of width u: for a shift drawn evenly from [0, u) the rounded schedule costs on average what the
schedule costs, starts included (co-area formula), so one shift costs no more; it lacks less than u
of the schedule's capacity, which the program gives back. So the bound stays one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from serve_app.tuning.arrivals import Floats
from serve_app.tuning.model import Platform, ServiceModel
from serve_app.tuning.simulate import Block
from serve_app.tuning.sizes import Ints

_SLOTS = 1_440  # at most
_LEVELS = 1_536  # of the grid of replicas, at most
_FINEST = 256  # grid points of a replica
_SLOT_OBJECTIVES = (10, 40, 160)  # lengths of a slot that are tried: the longest bound counts
_PRICES = 28  # tried for each length


@dataclass(frozen=True)
class Bound:
    """Replica-seconds that no schedule can go below, and the schedule of the bound.

    Attributes:
        replica_s: infinite where no number of replicas reaches the attainment.
        slot_s: seconds of a slot.
        replicas: per slot, fractions.
    """

    replica_s: float
    slot_s: float
    replicas: NDArray[np.floating[Any]]


def works(load: Block, model: ServiceModel, objective_s: float) -> Floats:
    """Replica-seconds each request takes at least; infinite: it cannot meet the objective.

    A step's fixed part is shared by the rows of the batch. Their number is bounded by the engine's
    and by the objective: the more rows, the longer the steps, and a request has so many of them.
    """
    _, tokens, out, beams = load
    encode, decode = model.encode, model.decode
    steps = np.maximum(out, 1)
    own = encode.token_s * tokens + encode.squared_token_s * tokens**2
    left = objective_s - model.overhead_s - own
    most = np.full(len(steps), float(model.rows))
    if decode.row_s > 0:
        with np.errstate(invalid="ignore"):
            most = np.minimum(most, (left / steps - decode.step_s) / decode.row_s)
    alone = steps * (decode.step_s + decode.row_s * beams + decode.source_token_s * tokens)
    # A rounding error must not make what just fits impossible.
    possible = alone <= left * (1 + 1e-9)
    share = beams / np.maximum(np.maximum(most, beams), 1)
    step = decode.row_s * beams + decode.source_token_s * tokens + decode.step_s * share
    found: Floats = np.where(possible, own + steps * step, np.inf)
    return found


def bound(
    load: Block,
    duration_s: float,
    model: ServiceModel,
    platform: Platform,
    objective_s: float,
    attainment: float,
    least: float = 1.0,
) -> Bound:
    """The bound for serving a share `attainment` of the requests within the objective.

    Args:
        load: all requests, in order of arrival.
        least: replicas that every schedule has at each moment.
    """
    at, work = load[0], works(load, model, objective_s)
    needed = math.ceil(attainment * len(at) - 1e-9)
    if int(np.isfinite(work).sum()) < needed:
        return Bound(math.inf, duration_s, np.array([math.inf]))
    span = max(objective_s - model.overhead_s, 1e-3)
    best = Bound(0.0, duration_s, np.array([least]))
    tried = set()
    for objectives in _SLOT_OBJECTIVES:
        slots = int(min(max(duration_s / (objectives * span), 1), _SLOTS))
        if slots not in tried:
            tried.add(slots)
            found = _slotted(
                at, work, duration_s, slots, span, platform.cold_start_s, needed, least
            )
            best = max(best, found, key=lambda one: one.replica_s)
    return best


def _slotted(
    at: Floats,
    work: Floats,
    duration_s: float,
    slots: int,
    span: float,
    cold_s: float,
    needed: int,
    least: float,
) -> Bound:
    slot_s = duration_s / slots
    slot = np.minimum((at / slot_s).astype(np.int64), slots - 1)
    able = np.isfinite(work)
    free = able & (at + span > (slot + 1) * slot_s)
    core = able & ~free
    order = np.lexsort((work[core], slot[core]))
    cost, place = work[core][order], slot[core][order]
    edges = np.searchsorted(place, np.arange(slots + 1))
    sums = np.concatenate([[0.0], np.cumsum(cost)])
    highest = max(float(np.diff(sums[edges]).max()) / slot_s, least)
    unit = max(1 / _FINEST, highest / (_LEVELS - 2))
    levels = int(highest / unit) + 2
    # How many requests of a slot a level can serve, the smallest first.
    served = np.zeros((slots, levels), dtype=np.int64)
    capacity = (np.arange(levels) + 1) * unit * slot_s
    for number in range(slots):
        begin, end = edges[number], edges[number + 1]
        served[number] = np.searchsorted(
            sums[begin + 1 : end + 1] - sums[begin], capacity * (1 + 1e-9), side="right"
        )
    wanted = needed - int(free.sum())
    first = int(least / unit + 1e-9)

    def dual(price: float) -> tuple[float, Ints]:
        value, chosen = _cheapest(served, price, unit * slot_s, unit * cold_s, first)
        return value + price * wanted, chosen

    # The dual is concave in the price; between two prices of which it is higher at one, the other
    # way is lost. Prices are seconds of a replica for a request.
    low, high = math.log(1e-6), math.log(1e6)
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = dual(math.exp(left)), dual(math.exp(right))
    best = max(dual(0.0), at_left, at_right, key=lambda one: one[0])
    for _ in range(_PRICES):
        if at_left[0] < at_right[0]:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = dual(math.exp(right))
        else:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = dual(math.exp(left))
        best = max(best, at_left, at_right, key=lambda one: one[0])
    return Bound(best[0], slot_s, best[1] * unit)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _cheapest(
    served: Ints, price: float, level_s: float, start_s: float, first: int
) -> tuple[float, Ints]:
    """Least of replica-seconds, starts and, negative, the price of what is served; its levels."""
    slots, levels = served.shape
    came = np.zeros((slots, levels), dtype=np.int32)
    cost = np.zeros(levels)
    above = np.zeros(levels)
    above_at = np.zeros(levels, dtype=np.int32)
    for slot in range(slots):
        if slot > 0:
            above[levels - 1] = cost[levels - 1]
            above_at[levels - 1] = levels - 1
            for level in range(levels - 2, -1, -1):
                above[level], above_at[level] = above[level + 1], above_at[level + 1]
                if cost[level] <= above[level]:
                    above[level], above_at[level] = cost[level], level
            below, below_at = np.inf, 0
            for level in range(levels):
                if level >= first and cost[level] - start_s * level < below:
                    below, below_at = cost[level] - start_s * level, level
                came[slot, level] = above_at[level]
                if below + start_s * level < above[level]:
                    came[slot, level] = below_at
                    above[level] = below + start_s * level
            cost[:] = above
        for level in range(levels):
            cost[level] += level * level_s - price * served[slot, level]
            if level < first:
                cost[level] = np.inf
    chosen = np.zeros(slots, dtype=np.int64)
    level = int(np.argmin(cost))
    least = cost[level]
    for slot in range(slots - 1, -1, -1):
        chosen[slot] = level
        level = came[slot, level]
    return least, chosen
