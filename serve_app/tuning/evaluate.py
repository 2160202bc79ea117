"""Settings tried on loads, over processes: the order of results is that of what was asked."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from serve_app.tuning import kernel
from serve_app.tuning.cases import Case
from serve_app.tuning.model import Platform, Scaling, ServiceModel
from serve_app.tuning.outcome import quantile, reversals
from serve_app.tuning.ray_policy import Policy
from serve_app.tuning.simulate import Simulated, Simulation

_T = TypeVar("_T")


@dataclass(frozen=True)
class Result:
    """One setting on one load.

    Attributes:
        attainment: share of all requests answered within the objective.
        missed: requests that were not.
        reversals: how often the target turned.
    """

    attainment: float
    missed: int
    replica_hours: float
    node_hours: float
    reversals: int
    p99_s: float | None


@dataclass(frozen=True)
class World:
    """What all settings are tried in."""

    cases: tuple[Case, ...]
    model: ServiceModel
    platform: Platform
    objective_s: float


def simulate(
    world: World, scaling: Scaling, number: int, policy: Policy | None = None
) -> Simulated:
    """A setting on one of the world's loads."""
    case = world.cases[number]
    bounds = scaling.min_replicas, scaling.max_replicas
    first = min(max(case.first, bounds[0]), bounds[1])
    return Simulation(
        iter([case.load]),
        case.duration_s,
        world.model,
        scaling.model_copy(update={"initial_replicas": first}),
        world.platform,
        objective_s=world.objective_s,
        seed=case.seed,
        policy=policy,
    ).run()


def result(simulated: Simulated) -> Result:
    """The figures that are compared."""
    totals = simulated.counts.sum(axis=0)
    arrived, met = int(totals[kernel.ARRIVED]), int(totals[kernel.MET])
    return Result(
        met / arrived,
        arrived - met,
        simulated.replica_s / 3_600,
        simulated.node_s / 3_600,
        reversals(simulated.timeline),
        quantile(simulated.latencies.sum(axis=0), 99),
    )


_world: World | None = None  # of a worker process


def _enter(world: World) -> None:
    global _world
    _world = world


def _call(job: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    assert _world is not None
    function, arguments = job
    return function(_world, *arguments)


def _evaluate(world: World, scaling: Scaling, number: int) -> Result:
    return result(simulate(world, scaling, number))


class Evaluator:
    """Tries settings on loads; what was tried before is remembered.

    Args:
        workers: processes; 1: this one.
        done: called after each piece of work.
    """

    def __init__(self, world: World, workers: int, done: Callable[[], None] = lambda: None) -> None:
        self.world = world
        self._done = done
        self._known: dict[tuple[Scaling, int], Result] = {}
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            # Forked, where that is safe: loads are large, and Ray takes seconds to import.
            how = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            self._pool = ProcessPoolExecutor(workers, how, _enter, (world,))

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[..., _T], jobs: Iterable[tuple[Any, ...]]) -> list[_T]:
        """`function(world, *job)` of each job, in their order."""
        found: list[_T] = []
        for one in self._started(function, list(jobs)):
            found.append(one)
            self._done()
        return found

    def _started(self, function: Callable[..., _T], jobs: list[tuple[Any, ...]]) -> Iterable[_T]:
        if self._pool is None:
            return (function(self.world, *job) for job in jobs)
        return self._pool.map(_call, [(function, job) for job in jobs])

    def results(self, settings: Sequence[Scaling], cases: Sequence[int]) -> list[list[Result]]:
        """Of each setting, its results on each of the loads."""
        wanted = [(scaling, case) for scaling in settings for case in cases]
        jobs = list(dict.fromkeys(job for job in wanted if job not in self._known))
        self._known.update(zip(jobs, self.map(_evaluate, jobs), strict=True))
        return [[self._known[scaling, case] for case in cases] for scaling in settings]
