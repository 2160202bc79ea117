"""`t5-serve tune explain`: which constraint binds now, and the one knob to turn."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.cli.errors import CliError
from serve_app.cli.ray_token import ray_token

if TYPE_CHECKING:
    from serve_app.tuning.constraints import Explanation
    from serve_app.tuning.readings import Readings

_SCALING = "summarizer.autoscaling_config"
_TO_DO = {
    "ray_t5_": "no Summarizer replica reports: is one running, and are the worker pods scraped "
    "(metrics.podMonitor.enabled; port 8080 of each pod)?",
    "ray_serve_": "Ray Serve's own series: the head pod must be scraped, too; those of autoscaling "
    "need a deployment with autoscaling_config",
}


@click.command("explain")
@click.option("--prometheus", help="URL of a Prometheus that scrapes the service.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="NAME=VALUE",
    help="That all series must have there, as namespace=t5. Repeatable.",
)
@click.option(
    "--metrics",
    "pages",
    multiple=True,
    help="URL of a metrics page of Ray, as http://127.0.0.1:8080/metrics, read twice in place of "
    "asking a Prometheus. Once for each node.",
)
@click.option("--dashboard", help="URL of Ray's dashboard: tells the settings that hold.")
@click.option(
    "--ray-token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with Ray's token. Default: $RAY_AUTH_TOKEN, or that of this user.",
)
@click.option("--application", help="Of the dashboard's, where several have a Summarizer.")
@click.option(
    "--values",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Values of the chart: the settings, where --dashboard does not tell.",
)
@click.option(
    "--window",
    type=click.FloatRange(1, 3_600),
    help="Seconds to look at. Default: 120 of a Prometheus, 15 of pages.",
)
@click.option(
    "--cold-start",
    type=click.FloatRange(0),
    default=120.0,
    show_default=True,
    help="Seconds that a replica takes to start, node included.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(**options: Any) -> int:
    """Name the constraint that binds the Summarizer now, and the one knob to turn.

    Exit status 1: it cannot be told, because series are missing.

    \b
    Examples:
      t5-serve tune explain --prometheus http://prometheus:9090 --label namespace=t5
      t5-serve tune explain --metrics http://127.0.0.1:8080/metrics --dashboard http://127.0.0.1:8265
    """
    from serve_app.tuning.constraints import View, explain

    if (options["prometheus"] is None) == (not options["pages"]):
        raise CliError("give --prometheus or --metrics: one of them")
    settings = _settings(options)
    readings = _readings(options)
    view = View(readings, settings, options["cold_start"])
    explained = explain(view)
    click.echo(_json(explained, readings) if options["as_json"] else _text(explained, readings))
    return 1 if explained.binding is None and explained.undecided else 0


def _readings(options: dict[str, Any]) -> Readings:
    from serve_app.tuning.readings import ReadingError, from_pages, from_prometheus

    labels = {}
    for label in options["labels"]:
        name, equals, value = label.partition("=")
        if not equals or not name.isidentifier() or '"' in value or "\\" in value:
            raise CliError(f"--label {label}: must be NAME=VALUE")
        labels[name] = value
    try:
        if options["prometheus"] is not None:
            return from_prometheus(options["prometheus"], options["window"] or 120.0, labels)
        if labels:
            raise CliError("--label goes with --prometheus")
        return from_pages(options["pages"], options["window"] or 15.0)
    except ReadingError as error:
        raise CliError(str(error)) from None


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Settings by their path in the chart's values: of the file, then of the dashboard."""
    from serve_app.tuning.dashboard import Dashboard, DashboardError
    from serve_app.tuning.model import ModelFileError, Platform, load_values

    known: dict[str, Any] = {}
    if options["values"] is not None:
        try:
            scaling, platform = load_values(options["values"], Platform())
        except ModelFileError as error:
            raise CliError(str(error)) from None
        for name, value in scaling.model_dump().items():
            known[f"{_SCALING}.{name}"] = value
        known["summarizer.max_ongoing_requests"] = platform.max_ongoing_requests
        known["limits.default_timeout_s"] = platform.deadline_s
    if options["dashboard"] is not None:
        dashboard = Dashboard(
            options["dashboard"],
            ray_token(options["ray_token_file"]),
            application=options["application"],
        )
        try:
            config = dashboard.read().config
        except DashboardError as error:
            raise CliError(str(error)) from None
        finally:
            dashboard.close()
        for name, value in (config.get("autoscaling_config") or {}).items():
            known[f"{_SCALING}.{name}"] = value
        for name in ("max_ongoing_requests", "max_queued_requests"):
            if name in config:
                known[f"summarizer.{name}"] = config[name]
    return {name: value for name, value in known.items() if value is not None}


def _text(explained: Explanation, readings: Readings) -> str:
    lines = []
    one = explained.binding
    if one is not None:
        lines.append(f"binding: {one.constraint}")
        lines.append(f"why:     {one.why}")
        now = "" if one.current is None else f" (now {one.current})"
        lines.append(f"turn:    {one.knob}{now}: {one.turn}")
        lines += [f"also:    {other.constraint}: {other.why}" for other in explained.others]
    elif explained.undecided:
        lines.append("binding: cannot be told")
    else:
        lines.append("binding: nothing")
    if explained.undecided:
        lines.append("not judged: " + ", ".join(explained.undecided))
    lines += [f"missing: {name}" for name in readings.missing]
    lines += [f"to do:   {told}" for told in _to_do(readings)]
    return "\n".join(lines)


def _to_do(readings: Readings) -> list[str]:
    return [
        told
        for start, told in _TO_DO.items()
        if any(name.startswith(start) for name in readings.missing)
    ]


def _json(explained: Explanation, readings: Readings) -> str:
    told = {
        **asdict(explained),
        "window_s": readings.window_s,
        "readings": {name: asdict(value) for name, value in readings.values.items()},
        "missing": readings.missing,
        "to_do": _to_do(readings),
    }
    return json.dumps(told, ensure_ascii=False, indent=2)
