"""Search over the autoscaling settings: fewest replica-hours against fewest misses, by optuna.

The sampler is the multi-objective tree-structured Parzen estimator (Ozaki et al., "Multiobjective
tree-structured Parzen estimator", JAIR 2022). Settings are asked for and tried a batch at a time,
so that the result does not depend on how many processes try them.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import optuna

from serve_app.tuning.evaluate import Evaluator, Result
from serve_app.tuning.model import Scaling

BATCH = 8
_STARTUP = 24  # trials at random before the sampler learns
_FLOOR = 1e-6  # of a share of misses, for its logarithm
# Ray's delays, look-back and factors in the range that is of use; the chart wants over 10 s.
_LOOK_BACK = (11.0, 120.0)
_UPSCALE_DELAY, _DOWNSCALE_DELAY = (1.0, 120.0), (10.0, 3_600.0)
_UPSCALING, _DOWNSCALING = (0.25, 4.0), (0.1, 1.0)
_DRAIN = (0.01, 30.0)


@dataclass
class Candidate:
    """A setting, and what it came to on the training loads and, once tried, the held-out ones."""

    scaling: Scaling
    training: list[Result]
    held_out: list[Result] = field(default_factory=list)
    name: str = ""

    @property
    def attainment(self) -> float:
        """On the training load where it is lowest."""
        return min(one.attainment for one in self.training)

    @property
    def hours(self) -> float:
        """Replica-hours of a training load, on average."""
        return mean_hours(self.training)

    @property
    def worst(self) -> float:
        """Attainment on the load, training or held out, where it is lowest."""
        return min(one.attainment for one in [*self.training, *self.held_out])

    @property
    def reversals(self) -> int:
        """Of all loads it was tried on."""
        return sum(one.reversals for one in [*self.training, *self.held_out])


@dataclass(frozen=True)
class Space:
    """What is searched, beside the ranges above.

    Attributes:
        replicas: a fixed number that reaches the goal, or as near to it as one found.
        rows: an engine's.
        signals: of `Scaling.signal`.
    """

    replicas: int
    rows: int
    signals: tuple[str, ...]

    def suggest(self, trial: optuna.Trial) -> Scaling:
        """The sampler's next setting."""
        low = trial.suggest_int("min_replicas", 1, max(self.replicas, 1), log=True)
        high = trial.suggest_int("max_replicas", 1, 2 * self.replicas + 2, log=True)
        signal = trial.suggest_categorical("signal", self.signals)
        if signal == "tokens":
            aim = {"target_drain_s": _spread(trial, "target_drain_s", *_DRAIN)}
        else:
            most = 2.0 * self.rows
            aim = {"target_ongoing_requests": _spread(trial, "target_ongoing_requests", 0.5, most)}
        functions = ["mean", "max", "min"]
        said = {
            "min_replicas": low,
            "max_replicas": max(low, high),
            "signal": signal,
            **aim,
            "upscale_delay_s": _spread(trial, "upscale_delay_s", *_UPSCALE_DELAY),
            "downscale_delay_s": _spread(trial, "downscale_delay_s", *_DOWNSCALE_DELAY),
            "upscaling_factor": _spread(trial, "upscaling_factor", *_UPSCALING),
            "downscaling_factor": _spread(trial, "downscaling_factor", *_DOWNSCALING),
            "look_back_period_s": _spread(trial, "look_back_period_s", *_LOOK_BACK),
            "aggregation_function": trial.suggest_categorical("aggregation_function", functions),
        }
        return Scaling.model_validate(said)

    def parameters(self, scaling: Scaling) -> dict[str, object]:
        """A setting as the sampler knows it, brought into the ranges."""
        said = scaling.model_dump()
        ranges: dict[str, tuple[float, float]] = {
            "min_replicas": (1, max(self.replicas, 1)),
            "max_replicas": (1, 2 * self.replicas + 2),
            "target_ongoing_requests": (0.5, 2.0 * self.rows),
            "target_drain_s": _DRAIN,
            "upscale_delay_s": _UPSCALE_DELAY,
            "downscale_delay_s": _DOWNSCALE_DELAY,
            "upscaling_factor": _UPSCALING,
            "downscaling_factor": _DOWNSCALING,
            "look_back_period_s": _LOOK_BACK,
        }
        unused = "target_ongoing_requests" if said["signal"] == "tokens" else "target_drain_s"
        within = {
            name: min(max(said[name], low), high)
            for name, (low, high) in ranges.items()
            if name != unused
        }
        return {**within, **{name: said[name] for name in ("signal", "aggregation_function")}}


def _spread(trial: optuna.Trial, name: str, low: float, high: float) -> float:
    """A value on a logarithmic scale, of two significant digits: nobody sets 17.3482 seconds."""
    value = trial.suggest_float(name, low, high, log=True)
    return min(max(float(f"{value:.2g}"), low), high)


def search(
    evaluator: Evaluator,
    space: Space,
    cases: Sequence[int],
    given: Sequence[Scaling],
    *,
    trials: int,
    goal: float,
    seed: int,
    until: float,
) -> tuple[list[Candidate], bool]:
    """Try settings on the training loads.

    Args:
        cases: numbers of the training loads.
        given: settings to begin with.
        until: on `time.monotonic()`'s clock; no batch begins after it.

    Returns:
        Each setting that was tried, once, and whether time was up before all were.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Where the goal is far away there is nothing to choose, so the sampler is kept near it.
    near = 4 * (1 - goal) + 1e-4

    def constraints(trial: optuna.trial.FrozenTrial) -> tuple[float]:
        return (trial.user_attrs["missed"] - near,)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the sampler's options are marked as experimental
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=min(_STARTUP, max(trials // 3, 1)),
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=seed,
            constraints_func=constraints,
        )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for scaling in given:
        study.enqueue_trial(space.parameters(scaling), skip_if_exists=True)
    found: dict[Scaling, Candidate] = {}
    tried = 0
    while tried < trials:
        if time.monotonic() >= until:
            return list(found.values()), True
        asked = [study.ask() for _ in range(min(BATCH, trials - tried))]
        settings = [space.suggest(trial) for trial in asked]
        for trial, scaling, results in zip(
            asked, settings, evaluator.results(settings, cases), strict=True
        ):
            candidate = found.setdefault(scaling, Candidate(scaling, results))
            missed = 1 - candidate.attainment
            trial.set_user_attr("missed", missed)
            study.tell(trial, (math.log10(missed + _FLOOR), candidate.hours))
        tried += len(asked)
    return list(found.values()), False


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats: not in attainment for as few hours, nor in hours for as much."""
    kept: list[Candidate] = []
    best = -1.0
    for one in sorted(candidates, key=lambda one: (one.hours, -one.attainment)):
        if one.attainment > best:
            kept.append(one)
            best = one.attainment
    return kept


def mean_hours(results: Sequence[Result]) -> float:
    """Replica-hours of a load, on average."""
    return sum(one.replica_hours for one in results) / len(results)
