"""A load as it was met and the very same load simulated, side by side.

What chance decides in a simulation (the phases of reports, routing) is unknown of the live run, so
it is simulated with several seeds; figures are the medians over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from serve_app.tuning import kernel
from serve_app.tuning.arrivals import Floats
from serve_app.tuning.measured import Measured
from serve_app.tuning.model import Decode, Encode, Platform, Scaling, ServiceModel
from serve_app.tuning.outcome import quantile
from serve_app.tuning.replay import Answers, Plan, Probed, Replayed, Watched
from serve_app.tuning.send import OK
from serve_app.tuning.simulate import Block, Simulated, Simulation
from serve_app.tuning.sizes import Ints

SEEDS = 9
BUCKETS = 60  # along the time axis of the plots
_PERCENTS = (50, 95, 99)


@dataclass(frozen=True)
class Steps:
    """Running replicas as a step function; seconds from the load's beginning."""

    at: list[float]
    running: list[int]

    def over(self, moments: Floats) -> Ints:
        """Replicas at each moment; before the first, as many as then."""
        places = np.searchsorted(np.array(self.at), moments, side="right") - 1
        values: Ints = np.array(self.running, dtype=np.int64)[np.maximum(places, 0)]
        return values


@dataclass(frozen=True)
class Figures:
    """One side. Seconds and requests per second; None of nothing.

    Attributes:
        attainment: share of all requests that succeeded within the objective.
        goodput: these per second of the load.
        wait_s, engine_s, outside_s: of the mean latency, what was spent in queues, at work in the
            engine, and neither.
        replicas_mean, replicas_max: running ones; None: not seen.
    """

    requests: int
    succeeded: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    attainment: float
    goodput: float
    wait_s: float | None
    engine_s: float | None
    outside_s: float | None
    replicas_mean: float | None
    replicas_max: int | None


@dataclass(frozen=True)
class Comparison:
    """Simulated against live.

    Attributes:
        p50_error, p95_error, p99_error: simulated over live, less 1; None where one has none.
        attainment_error: simulated less live.
        timeline_distance: mean absolute difference of running replicas over time, mean over seeds.
        p95_range: lowest and highest p95 over the seeds.
        timelines: live (None: not seen), and simulated with the first seed.
        latencies: per time bucket, p50 and p95, live and simulated.
    """

    name: str
    seconds: float
    live: Figures
    simulated: Figures
    p50_error: float | None
    p95_error: float | None
    p99_error: float | None
    attainment_error: float
    timeline_distance: float | None
    p95_range: tuple[float, float] | None
    timelines: tuple[Steps | None, Steps]
    latencies: dict[str, list[float | None]]

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        live, simulated = self.timelines
        told = asdict(self)
        told["timelines"] = {
            "live": None if live is None else asdict(live),
            "simulated": asdict(simulated),
        }
        return told

    def missed(self, p95: float, replicas: float) -> list[str]:
        """What is out of tolerance, in words."""
        said = []
        if self.p95_error is None:
            said.append("p95 cannot be compared: nothing succeeded")
        elif abs(self.p95_error) > p95:
            said.append(f"p95 is {self.p95_error:+.1%} off, over {p95:.0%}")
        if self.timeline_distance is not None and self.timeline_distance > replicas:
            said.append(
                f"replicas differ by {self.timeline_distance:.2f} on average, over {replicas:g}"
            )
        return said


def distance(one: Steps, other: Steps, seconds: float) -> float:
    """Mean absolute difference over that time."""
    edges = np.unique(np.clip([0.0, seconds, *one.at, *other.at], 0, seconds))
    apart = np.abs(one.over(edges[:-1]) - other.over(edges[:-1]))
    return float((apart * np.diff(edges)).sum() / seconds)


def calibrated(model: ServiceModel, plan: Plan, probed: Probed) -> tuple[ServiceModel, float]:
    """The model with what a probe measured, and by what its times were multiplied.

    `overhead_s` is the probe's; the engine's times are multiplied by the median of what requests
    took in it alone, over what the model says of them.
    """
    count = len(probed.latency_s)
    tokens, steps = probed.answers.input_tokens, probed.answers.output_tokens
    encode, decode = model.encode, model.decode
    read = np.minimum(tokens, model.max_input_tokens)
    step = decode.step_s + decode.row_s * plan.beams[:count] + decode.source_token_s * read
    said = encode.call_s + encode.token_s * read + encode.squared_token_s * read**2 + steps * step
    slower = float(np.median(probed.answers.compute_s / np.maximum(said, 1e-9)))

    def scaled(part: Encode | Decode) -> dict[str, float]:
        return {name: value * slower for name, value in part.model_dump().items()}

    fitted = model.model_copy(
        update={
            "encode": Encode(**scaled(encode)),
            "decode": Decode(**scaled(decode)),
            "overhead_s": probed.overhead_s,
        }
    )
    return fitted, slower


def sizes(plan: Plan, answers: Answers, most_tokens: int) -> tuple[Ints, Ints]:
    """Input tokens and decode steps of all requests; of those without an answer, the median's.

    Where nothing was answered a word or four characters count as a token.
    """
    read, made = answers.input_tokens, answers.output_tokens
    if np.isnan(read).all():
        read = plan.sizes / (4 if plan.characters else 1)
    read = np.where(np.isnan(read), np.nanmedian(read), read)
    made = np.where(np.isnan(made), plan.out, made)
    tokens: Ints = np.clip(np.rint(read), 1, most_tokens).astype(np.int64)
    steps: Ints = np.maximum(made, 1).astype(np.int64)
    return tokens, steps


def simulations(
    plan: Plan,
    tokens: Ints,
    steps: Ints,
    model: ServiceModel,
    scaling: Scaling,
    platform: Platform,
    objective_s: float,
) -> Iterator[tuple[Simulated, float]]:
    """The load with each seed, after an idle time of the look-back: reports then have its zeros.

    Gives also when, in simulated time, the load begins.
    """
    lead = _lead(plan, scaling, platform)
    block: Block = (plan.at + lead, tokens, steps, plan.beams)
    # As many of the leading buckets as the lead is long.
    buckets = BUCKETS + round(lead / (plan.duration_s / BUCKETS))
    for seed in range(1, SEEDS + 1):
        simulation = Simulation(
            iter([block]),
            plan.duration_s + lead,
            model,
            scaling,
            platform,
            objective_s=objective_s,
            seed=seed,
            buckets=buckets,
        )
        yield simulation.run(), lead


def _lead(plan: Plan, scaling: Scaling, platform: Platform) -> float:
    """Seconds, a whole number of time buckets, that look-back and one report fit into."""
    bucket = plan.duration_s / BUCKETS
    least = scaling.look_back_period_s + platform.push_interval_s
    return float(np.ceil(least / bucket) * bucket)


def compare(
    name: str,
    plan: Plan,
    replayed: Replayed,
    measured: Measured,
    simulated: Sequence[tuple[Simulated, float]],
    overhead_s: float,
) -> Comparison:
    """Both sides' figures and what lies between them. `overhead_s` is the simulated model's."""
    seconds = plan.duration_s
    live_steps = _seen(replayed.replicas)
    lines = [_line(one, lead) for one, lead in simulated]
    sides = [
        _simulated(one, line, plan, overhead_s)
        for (one, _), line in zip(simulated, lines, strict=True)
    ]
    live = _live(plan, measured, replayed.answers, live_steps)
    middle = _median(sides)
    p95s = [side.p95_s for side in sides if side.p95_s is not None]
    return Comparison(
        name=name,
        seconds=seconds,
        live=live,
        simulated=middle,
        p50_error=_off(middle.p50_s, live.p50_s),
        p95_error=_off(middle.p95_s, live.p95_s),
        p99_error=_off(middle.p99_s, live.p99_s),
        attainment_error=middle.attainment - live.attainment,
        timeline_distance=None
        if live_steps is None
        else float(np.mean([distance(live_steps, line, seconds) for line in lines])),
        p95_range=(min(p95s), max(p95s)) if p95s else None,
        timelines=(live_steps, lines[0]),
        latencies=_latencies(plan, replayed, simulated[0][0]),
    )


def _off(simulated: float | None, live: float | None) -> float | None:
    return None if not live or simulated is None else simulated / live - 1


def _seen(watched: Watched | None) -> Steps | None:
    return Steps(watched.at, watched.running) if watched is not None and watched.at else None


def _line(simulated: Simulated, lead: float) -> Steps:
    line = simulated.timeline
    before = max(number for number, at in enumerate(line.at) if at <= lead)
    at = [max(one - lead, 0.0) for one in line.at[before:]]
    return Steps(at, line.running[before:])


def _replicas(line: Steps, seconds: float) -> tuple[float, int]:
    edges = np.unique(np.clip([0.0, seconds, *line.at], 0, seconds))
    running = line.over(edges[:-1])
    return float((running * np.diff(edges)).sum() / seconds), int(running.max())


def _live(plan: Plan, measured: Measured, answers: Answers, line: Steps | None) -> Figures:
    mean, most = (None, None) if line is None else _replicas(line, plan.duration_s)
    latency = measured.latency.quantiles
    attainment = measured.attainment or 0.0
    known = ~np.isnan(answers.compute_s)
    parts: list[float | None] = [None, None, None]
    if known.any() and measured.latency.mean is not None:
        wait, engine = float(answers.queue_s[known].mean()), float(answers.compute_s[known].mean())
        parts = [wait, engine, measured.latency.mean - wait - engine]
    return Figures(
        requests=measured.planned,
        succeeded=measured.succeeded,
        p50_s=latency["p50"],
        p95_s=latency["p95"],
        p99_s=latency["p99"],
        attainment=attainment,
        goodput=attainment * measured.planned / plan.duration_s,
        wait_s=parts[0],
        engine_s=parts[1],
        outside_s=parts[2],
        replicas_mean=mean,
        replicas_max=most,
    )


def _simulated(simulated: Simulated, line: Steps, plan: Plan, overhead_s: float) -> Figures:
    totals = simulated.counts.sum(axis=0)
    arrived, met = int(totals[kernel.ARRIVED]), int(totals[kernel.MET])
    histogram = simulated.latencies.sum(axis=0)
    succeeded = int(totals[kernel.SUCCEEDED])
    # Waits are of all that began; the few that then were late make no difference here.
    wait = simulated.wait_s / succeeded if succeeded else None
    rest = None if wait is None else simulated.latency_s / succeeded - wait - overhead_s
    mean, most = _replicas(line, plan.duration_s)
    p50, p95, p99 = (quantile(histogram, one) for one in _PERCENTS)
    return Figures(
        requests=arrived,
        succeeded=succeeded,
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        attainment=met / max(arrived, 1),
        goodput=met / plan.duration_s,
        wait_s=wait,
        engine_s=rest,
        outside_s=overhead_s if succeeded else None,
        replicas_mean=mean,
        replicas_max=most,
    )


def _median(sides: Sequence[Figures]) -> Figures:
    def middle(name: str) -> Any:
        values = [getattr(side, name) for side in sides]
        known = [value for value in values if value is not None]
        # A value that occurred, so that numbers of requests stay whole.
        return sorted(known)[len(known) // 2] if known else None

    return Figures(**{name: middle(name) for name in Figures.__dataclass_fields__})


def _latencies(
    plan: Plan, replayed: Replayed, simulated: Simulated
) -> dict[str, list[float | None]]:
    good = [one for one in replayed.run.sent if one.kind == OK]
    due = np.array([one.due for one in good])
    took = np.array([one.latency_s for one in good])
    bucket = np.minimum((due / plan.duration_s * BUCKETS).astype(int), BUCKETS - 1)
    histograms = simulated.latencies[-BUCKETS:]
    found: dict[str, list[float | None]] = {}
    for percent in (50, 95):
        values = [took[bucket == number] for number in range(BUCKETS)]
        found[f"p{percent} live"] = [
            float(np.percentile(one, percent, method="inverted_cdf")) if one.size else None
            for one in values
        ]
        found[f"p{percent} simulated"] = [quantile(one, percent) for one in histograms]
    return found
