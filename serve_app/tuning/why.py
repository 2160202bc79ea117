"""A recommendation told: tables for a terminal, one page that says why, a record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from serve_app.tuning.evaluate import Result, simulate
from serve_app.tuning.oracle import works
from serve_app.tuning.recommend import Recommendation, hours
from serve_app.tuning.search import Candidate, mean_hours
from serve_app.tuning.simulate import Timeline
from serve_app.usage.page import document, table_html
from serve_app.usage.svg import lines, scatter
from serve_app.usage.text import table_text
from serve_app.usage.views import Table

_POINTS = 480  # along a time axis


def compared(found: Recommendation, price: float | None) -> Table:
    """The recommended settings beside the others; hours are of one load, on average."""
    names = ["", "attained", "held out", "replica-hours", "node-hours", "reversals", "p99, s"]
    rows: list[list[Any]] = []
    chosen = "recommended" if found.reached else "closest"
    for name, one in _shown(found, chosen):
        results = [*one.training, *one.held_out]
        rows.append(
            [
                name,
                _percent(one.attainment),
                _percent(min(result.attainment for result in one.held_out)),
                *_figures(results),
            ]
        )
    foreseen = [one.result for one in found.foreseen if one is not None]
    if len(foreseen) == len(found.foreseen):
        training, held_out = foreseen[: found.training], foreseen[found.training :]
        rows.append(
            [
                "foresight",
                _percent(min(one.attainment for one in training)),
                _percent(min(one.attainment for one in held_out)),
                *_figures(foreseen),
            ]
        )
    if math.isfinite(found.bound_hours):
        goal = _percent(found.wish.goal)
        rows.append(["lower bound", goal, goal, found.bound_hours, None, None, None])
    if price is not None:
        names.append("price of 30 days")
        days = sum(case.duration_s for case in found.world.cases) / len(found.world.cases) / 86_400
        for row in rows:
            row.append(round(row[3] * price * 30 / days, 2))
    for row in rows:
        row[3:7] = [None if one is None else round(one, 2) for one in row[3:7]]
    return Table("compared", names, [tuple(row) for row in rows])


def _figures(results: Sequence[Result]) -> list[float | None]:
    slowest = [one.p99_s for one in results if one.p99_s is not None]
    return [
        mean_hours(results),
        sum(one.node_hours for one in results) / len(results),
        sum(one.reversals for one in results) / len(results),
        max(slowest, default=None),
    ]


def _shown(found: Recommendation, chosen: str) -> list[tuple[str, Candidate]]:
    shown = [(chosen, found.chosen), ("current", found.current), ("Ray's defaults", found.defaults)]
    if found.static is not None:
        number = found.static.scaling.max_replicas
        shown.append((f"{number} replica{'s' if number > 1 else ''}, fixed", found.static))
    return shown


def settings(found: Recommendation) -> Table:
    """The settings themselves."""
    shown = [found.chosen, found.current, found.defaults]
    said = [one.scaling.model_dump() for one in shown]
    idle = {"initial_replicas", "downscale_to_zero_delay_s"}
    if all(one["signal"] == "requests" for one in said):
        idle |= {"signal", "target_drain_s"}
    rows = [(name, *(_value(one[name]) for one in said)) for name in said[0] if name not in idle]
    chosen = "recommended" if found.reached else "closest"
    return Table("settings", ["setting", chosen, "current", "Ray's defaults"], rows)


def per_load(found: Recommendation) -> Table:
    """Of each load, attainment and replica-hours."""
    shown = _shown(found, "recommended" if found.reached else "closest")
    rows = []
    for number, case in enumerate(found.world.cases):
        row: list[Any] = [case.name, "training" if number < found.training else "held out"]
        row.append(case.requests)
        for _, one in shown:
            result = [*one.training, *one.held_out][number]
            row += [_percent(result.attainment), round(result.replica_hours, 2)]
        bound = found.bounds[number].replica_s / 3_600
        row.append(round(bound, 2) if math.isfinite(bound) else None)
        rows.append(tuple(row))
    heads = [head for name, _ in shown for head in (name, "hours")]
    return Table("loads", ["load", "for", "requests", *heads, "bound"], rows)


def sentences(found: Recommendation, error: str) -> list[str]:
    """What was found, a line each; `error` says how far the simulator is to be believed."""
    goal, objective = f"{found.wish.goal:.4%}".rstrip("0%").rstrip("."), found.world.objective_s
    chosen = found.chosen
    said = []
    if found.reached:
        said.append(
            f"{goal} % within {objective:g} s are reached on all {len(found.world.cases)} loads, "
            f"with {hours(chosen):,.2f} replica-hours of each on average"
        )
    else:
        said.append(
            f"no setting reaches {goal} % within {objective:g} s; the closest is below, with "
            f"{chosen.worst:.2%} on the load where it is lowest"
        )
        if most := _most(found):
            said.append(most)
    said += _against(found)
    if found.cut:
        said.append(
            f"time was up after {len(found.tried)} settings: with more of it, or on another "
            "machine, the result may be another"
        )
    said.append(f"simulator's error: {error}")
    return said


def _most(found: Recommendation) -> str | None:
    """Why the goal cannot be reached at all, if so."""
    shares = [
        float(np.isfinite(works(case.load, found.world.model, found.world.objective_s)).mean())
        for case in found.world.cases
    ]
    if min(shares) >= found.wish.goal:
        return None
    return (
        f"no number of replicas would: only {min(shares):.2%} of the requests can be answered "
        "within it by an idle replica"
    )


def _against(found: Recommendation) -> list[str]:
    chosen, defaults = found.chosen, found.defaults
    said = []
    less = 1 - hours(chosen) / hours(defaults)
    said.append(
        f"against Ray's defaults: {_more(-less)} replica-hours, {_missed(defaults)} of the "
        f"requests missed there, {_missed(chosen)} here"
    )
    if found.static is not None:
        share = hours(chosen) / hours(found.static) - 1
        said.append(f"against {found.static.scaling.max_replicas} fixed replicas: {_more(share)}")
    foreseen = [one.result for one in found.foreseen if one is not None]
    if found.reached and foreseen:
        said.append(
            f"above perfect foresight: {hours(chosen) / mean_hours(foreseen) - 1:.0%}; above the "
            f"lower bound: {hours(chosen) / found.bound_hours - 1:.0%}"
        )
    return said


def _missed(one: Candidate) -> str:
    """The share of all requests, in per cent."""
    results = [*one.training, *one.held_out]
    return f"{sum(1 - result.attainment for result in results) / len(results):.2%}"


def _more(share: float) -> str:
    return f"{abs(share):.0%} {'more' if share > 0 else 'fewer'}"


def text(found: Recommendation, price: float | None, what: Sequence[str], error: str) -> str:
    """What a terminal shows."""
    told = "".join(f"{line}\n" for line in [*what, *sentences(found, error)])
    return f"{told}\n{table_text(compared(found, price))}\n{table_text(settings(found))}"


def page(
    found: Recommendation,
    price: float | None,
    what: Sequence[str],
    error: str,
    overlay: str,
    commands: Sequence[str],
) -> str:
    """The page that says why."""
    parts = [
        "<h2>Compared</h2>",
        table_html(compared(found, price)),
        "<h2>Settings</h2>",
        table_html(settings(found)),
        "<h2>Missed requests, %, against replica-hours of a load</h2>",
        _pareto(found),
        *_timelines(found),
        "<h2>Each load</h2>",
        table_html(per_load(found)),
        "<h2>Put in force</h2>",
        f"<pre>{escape(overlay)}</pre><pre>{escape(chr(10).join(commands))}</pre>",
    ]
    return document("t5-serve: recommended scaling", [*what, *sentences(found, error)], parts)


def _pareto(found: Recommendation) -> str:
    # Who misses most requests is of no interest, and would stretch the axes.
    far = 2 * max(hours(one) for _, one in _shown(found, ""))
    tried = [_point(one) for one in found.tried if one.hours <= far]
    series: dict[str, list[tuple[float, float]]] = {
        "recommended" if found.reached else "closest": [_point(found.chosen)],
        "Ray's defaults": [_point(found.defaults)],
        "current": [_point(found.current)],
        "best of those tried": [_point(one) for one in found.front if one.hours <= far],
        "lower bound": [(hours, 100 * (1 - share)) for share, hours in reversed(found.curve)],
        "tried": tried,
    }
    if found.static is not None:
        series = {**series, "fixed": [_point(found.static)]}
    return scatter(series, ("best of those tried", "lower bound"), "h")


def _point(one: Candidate) -> tuple[float, float]:
    return one.hours, 100 * (1 - one.attainment)


def _timelines(found: Recommendation) -> list[str]:
    """Replicas over the first held-out load."""
    number = found.training
    case = found.world.cases[number]
    scale, unit = (3_600.0, "h") if case.duration_s > 7_200 else (1.0, "s")
    at = np.linspace(0, case.duration_s, _POINTS, endpoint=False)
    busy = works(case.load, found.world.model, math.inf)
    place = np.minimum((case.load[0] / case.duration_s * _POINTS).astype(int), _POINTS - 1)
    wide = case.duration_s / _POINTS
    load = np.bincount(place, busy, _POINTS) / wide

    def over(line: Timeline) -> list[float | None]:
        places = np.searchsorted(line.at, at, side="right") - 1
        return [float(line.running[one]) for one in places]

    chosen = over(simulate(found.world, found.chosen.scaling, number).timeline)
    series: dict[str, list[float | None]] = {
        "recommended" if found.reached else "closest": chosen,
        "replicas the load keeps busy": [float(one) for one in load],
    }
    foreseen = found.foreseen[number]
    if foreseen is not None:
        series["foresight"] = over(foreseen.timeline)
    across = [float(one) / scale for one in at]
    defaults = {
        "recommended" if found.reached else "closest": chosen,
        "Ray's defaults": over(simulate(found.world, found.defaults.scaling, number).timeline),
    }
    return [
        f"<h2>Replicas, {escape(case.name)}, held out</h2>",
        lines(across, series, unit, steps=True),
        "<h2>Replicas, beside Ray's defaults</h2>",
        lines(across, defaults, unit, steps=True),
    ]


def record(found: Recommendation, what: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it. Hours are of a load, on average."""

    def of(one: Candidate) -> dict[str, Any]:
        return {
            "scaling": one.scaling.model_dump(),
            "attainment_training": one.attainment,
            "attainment_held_out": min((each.attainment for each in one.held_out), default=None),
            "replica_hours": hours(one),
            "reversals": one.reversals,
        }

    foreseen = [one.result.replica_hours for one in found.foreseen if one is not None]
    whole = len(foreseen) == len(found.foreseen)
    return {
        **what,
        "goal": found.wish.goal,
        "objective_s": found.world.objective_s,
        "reached": found.reached,
        "cut": found.cut,
        "settings_tried": len(found.tried),
        "loads": [
            {"name": one.name, "requests": one.requests, "seconds": one.duration_s}
            for one in found.world.cases
        ],
        "training_loads": found.training,
        "chosen": of(found.chosen),
        "current": of(found.current),
        "ray_defaults": of(found.defaults),
        "static": None if found.static is None else of(found.static),
        "foresight_hours": sum(foreseen) / len(foreseen) if whole else None,
        "bound_hours": found.bound_hours if math.isfinite(found.bound_hours) else None,
        "front": [of(one) for one in found.front],
    }


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _value(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
