"""A recommendation: settings searched on training loads, chosen on held-out ones, and beside what.

Chosen is, of the settings that reach the goal on every load, the one of fewest replica-hours; among
those within two hundredths of it the one that turns least often.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve_app.tuning.evaluate import Evaluator, World
from serve_app.tuning.foresight import Foreseen, foresee
from serve_app.tuning.model import Scaling
from serve_app.tuning.oracle import Bound, bound
from serve_app.tuning.search import BATCH, Candidate, Space, front, mean_hours, search

# What `num_replicas: auto` means to Ray Serve 2.60, where it differs from `Scaling`'s defaults.
RAY_DEFAULTS = Scaling(min_replicas=1, max_replicas=100, target_ongoing_requests=2)
SIGNALS = ("requests", "tokens")
_TIE = 1.02
_FAR = 20.0  # times the misses that the goal allows
_JUDGED = 3 * BATCH  # settings that are tried on held-out loads at least
_MOST_REPLICAS = 100_000
_CURVE = (0.2, 0.5, 0.8)  # of the way from an attainment of 0 to the goal


@dataclass(frozen=True)
class Wish:
    """What is wanted.

    Attributes:
        goal: the share of requests to be answered within the objective.
        current: the settings in force.
        until: on `time.monotonic()`'s clock: the search ends then.
        signals: what may scale, of `Scaling.signal`.
    """

    goal: float
    current: Scaling
    trials: int
    seed: int
    until: float = math.inf
    signals: tuple[str, ...] = SIGNALS


@dataclass(frozen=True)
class Recommendation:
    """What was found.

    Attributes:
        training: how many of the world's loads, the first ones, were for training.
        reached: `chosen` reaches the goal on all loads; else it comes closest of all.
        tried: every setting that was tried.
        front: of these, those that none beats on the training loads and that are not too far below
            the goal; tried on held-out loads, too.
        static: the fewest replicas, fixed, that reach the goal; None where no number does.
        bounds, foreseen: of each load, for the goal.
        curve: attainments and the bound of a training load for each, on average, replica-hours.
        cut: time was up before all trials were made.
    """

    world: World
    wish: Wish
    training: int
    chosen: Candidate
    reached: bool
    tried: list[Candidate]
    front: list[Candidate]
    defaults: Candidate
    current: Candidate
    static: Candidate | None
    bounds: list[Bound]
    foreseen: list[Foreseen | None]
    curve: list[tuple[float, float]]
    cut: bool

    @property
    def bound_hours(self) -> float:
        """The bound of a load, on average."""
        return sum(one.replica_s for one in self.bounds) / len(self.bounds) / 3_600


def hours(candidate: Candidate) -> float:
    """Replica-hours of a load, held-out ones among them, on average."""
    return mean_hours([*candidate.training, *candidate.held_out])


def recommend(
    evaluator: Evaluator, training: int, wish: Wish, say: Callable[[str], None] = lambda _: None
) -> Recommendation:
    """Search and choose.

    Args:
        training: how many of the world's loads are for training; the others are held out.
        say: told what is being done.
    """
    world = evaluator.world
    cases = range(len(world.cases))
    learn, judge = cases[:training], cases[training:]
    say("bounds")
    least = float(min(1, wish.current.min_replicas))
    bounds = evaluator.map(_bound, [(number, wish.goal, least) for number in cases])
    say("fixed numbers of replicas")
    number, reaches = fewest(evaluator, cases, wish.goal, bounds)
    space = Space(number, world.model.rows, wish.signals)
    given = [fixed(number), RAY_DEFAULTS, Scaling(), wish.current]
    given += [fixed(one) for one in (number - 1, number + 1) if one >= 1]
    given += [Scaling(max_replicas=number + 1, signal="tokens")]
    given = [one for one in given if one.signal in wish.signals]
    say("settings")
    tried, cut = search(
        evaluator,
        space,
        learn,
        given,
        trials=wish.trials,
        goal=wish.goal,
        seed=wish.seed,
        until=wish.until,
    )
    say("held-out loads")
    # Far below the goal there is nothing to judge.
    best = [one for one in front(tried) if 1 - one.attainment <= _FAR * (1 - wish.goal)]
    compared = [RAY_DEFAULTS, wish.current, fixed(number)]
    known = {one.scaling: one for one in tried}
    for scaling, results in zip(compared, evaluator.results(compared, learn), strict=True):
        known.setdefault(scaling, Candidate(scaling, results))
    shown = [known[scaling] for scaling in compared]
    judged = _judge(evaluator, judge, [*best, *shown])
    chosen, reached = _choose(evaluator, judge, list(known.values()), judged, wish.goal)
    say("foresight")
    foreseen = evaluator.map(foresee, [(number, wish.goal) for number in cases])
    curve = _curve(evaluator, learn, wish.goal, least)
    return Recommendation(
        world,
        wish,
        training,
        chosen,
        reached,
        tried,
        best,
        shown[0],
        shown[1],
        shown[2] if reaches else None,
        bounds,
        foreseen,
        curve,
        cut,
    )


def fixed(replicas: int) -> Scaling:
    """So many replicas, whatever comes."""
    return Scaling(min_replicas=replicas, max_replicas=replicas)


def fewest(
    evaluator: Evaluator, cases: Sequence[int], goal: float, bounds: Sequence[Bound]
) -> tuple[int, bool]:
    """The fewest replicas that reach the goal on all loads, and whether any number does.

    Where none does, the number beyond which more are of no use.
    """

    def worst(replicas: int) -> float:
        [results] = evaluator.results([fixed(replicas)], cases)
        return min(one.attainment for one in results)

    durations = [case.duration_s for case in evaluator.world.cases]
    low = 0  # does not reach it
    means = [one.replica_s / long for one, long in zip(bounds, durations, strict=True)]
    high = max([1, *(math.ceil(one) for one in means if math.isfinite(one))])
    before = -1.0
    while (reached := worst(high)) < goal:
        if reached <= before or high >= _MOST_REPLICAS:
            return max(low, 1), False
        low, before, high = high, reached, min(2 * high, _MOST_REPLICAS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if worst(middle) >= goal else (middle, high)
    return high, True


def _judge(
    evaluator: Evaluator, cases: Sequence[int], candidates: Sequence[Candidate]
) -> list[Candidate]:
    """Try them on held-out loads."""
    found = evaluator.results([one.scaling for one in candidates], cases)
    for candidate, results in zip(candidates, found, strict=True):
        candidate.held_out = results
    return list(candidates)


def _choose(
    evaluator: Evaluator,
    cases: Sequence[int],
    candidates: list[Candidate],
    judged: list[Candidate],
    goal: float,
) -> tuple[Candidate, bool]:
    reaching = sorted(
        (one for one in candidates if one.attainment >= goal),
        key=lambda one: (one.hours, one.reversals),
    )
    passed: list[Candidate] = []
    for begin in range(0, len(reaching), BATCH):
        if passed and begin >= _JUDGED:
            break
        batch = _judge(evaluator, cases, reaching[begin : begin + BATCH])
        judged += batch
        passed += [one for one in batch if one.worst >= goal]
    if not passed:
        return max(judged, key=lambda one: (one.worst, -hours(one))), False
    least = min(map(hours, passed))
    near = [one for one in passed if hours(one) <= least * _TIE]
    return min(near, key=lambda one: (one.reversals, hours(one))), True


def _bound(world: World, number: int, attainment: float, least: float) -> Bound:
    case = world.cases[number]
    return bound(
        case.load,
        case.duration_s,
        world.model,
        world.platform,
        world.objective_s,
        attainment,
        least,
    )


def _curve(
    evaluator: Evaluator, cases: Sequence[int], goal: float, least: float
) -> list[tuple[float, float]]:
    """Attainments below and above the goal, and the bound for each."""
    below = [goal * share for share in _CURVE]
    attainments = [*below, 1 - 4 * (1 - goal), goal, 1 - (1 - goal) / 10]
    wanted = sorted({one for one in attainments if 0 < one < 1})
    jobs = [(number, one, least) for one in wanted for number in cases]
    found = evaluator.map(_bound, jobs)
    points = []
    for place, attainment in enumerate(wanted):
        of_it = found[place * len(cases) : (place + 1) * len(cases)]
        mean = sum(one.replica_s for one in of_it) / len(of_it) / 3_600
        if math.isfinite(mean):
            points.append((attainment, mean))
    return points


def deadline(seconds: float | None) -> float:
    """When a time budget ends, on `time.monotonic()`'s clock."""
    return math.inf if seconds is None else time.monotonic() + seconds
