"""`t5-serve tune recommend`: which autoscaling settings to take, and why."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.cli.errors import CliError
from serve_app.cli.loads import named_load, option, usage_trace

if TYPE_CHECKING:
    from serve_app.tuning.cases import Case
    from serve_app.tuning.model import Platform, Scaling, ServiceModel
    from serve_app.tuning.recommend import Recommendation

_DURATION_S = 3_600.0
_UNVERIFIED = "not verified on this machine: run t5-serve tune verify"
Told = Callable[[dict[str, Any]], "tuple[ServiceModel, Scaling, Platform]"]


def command(shared: list[click.Parameter], told: Told) -> click.Command:
    """The command.

    Args:
        shared: options of `tune simulate`, of which those of load and settings are taken.
        told: what they say of model, settings in force, and platform.
    """
    taken = [one for one in shared if one.name not in ("as_json", "html")]

    def run(**options: Any) -> int:
        return _recommend(options, told)

    return click.Command(
        "recommend",
        callback=run,
        params=[*taken, *_own_options()],
        help="""Recommend autoscaling settings for a load, from simulations.

Settings are searched on some loads and judged on others, held out. Chosen is the one of fewest
replica-hours that answers the share --attainment of the requests within --objective seconds on
all of them. Beside it: Ray's defaults, fixed replicas, perfect foresight, a lower bound. Exit
status 1: no setting does; the closest is shown.

\b
Examples:
  t5-serve tune recommend --sample --out recommended
  t5-serve tune recommend --arrivals trace --since 7d --values values.yaml --out recommended
  t5-serve tune recommend --arrivals flash-crowd --rate 40 --peak 6 --attainment 0.95 --price 0.71
""",
    )


def _own_options() -> list[click.Parameter]:
    positive = click.FloatRange(0, min_open=True)
    folder = click.Path(file_okay=False, path_type=Path)
    file = click.Path(dir_okay=False, path_type=Path)
    return [
        click.Option(["--attainment"], default=0.99, show_default=True,
                     type=click.FloatRange(0, 1, min_open=True, max_open=True),
                     help="Share of the requests to be answered within the objective."),
        click.Option(["--price"], type=positive, help="Of a replica-hour, in any currency."),
        click.Option(["--trials"], type=click.IntRange(1, 100_000), default=100, show_default=True,
                     help="Settings to try."),
        click.Option(["--seconds"], type=positive,
                     help="Begin no more trials after so long; judging them takes a little more. "
                     "What is found then depends on the machine's speed."),
        click.Option(["--workers"], type=click.IntRange(1, 256), help="Processes; they do not "
                     "change what is found. Default: as many as processors."),
        click.Option(["--sample"], is_flag=True,
                     help="A made-up day that ships with t5-serve, as the trace."),
        click.Option(["--times"], type=click.IntRange(1, 100_000),
                     help="trace: each request counts as so many, up to five minutes apart: of "
                     "a log that has one in so many, or of a service that will grow."),
        click.Option(["--window"], type=positive, default=86_400.0, show_default=True,
                     help="trace: seconds of a load; the trace is cut into such."),
        click.Option(["--error"], type=file, help="What `tune verify --json` printed: the "
                     "simulator's error, to be told beside the recommendation."),
        click.Option(["--out"], type=folder, help="Write why.html, overlay.yaml (values of the "
                     "chart) and recommendation.json into this folder."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print it as JSON."),
    ]  # fmt: skip


def _recommend(options: dict[str, Any], told: Told) -> int:
    try:
        import numba  # noqa: F401
        import optuna  # noqa: F401
        import rich  # noqa: F401
    except ImportError:
        raise CliError("tune needs numba, optuna, rich: pip install 't5-serve[tune]'") from None
    from serve_app.tuning.evaluate import Evaluator, World
    from serve_app.tuning.model import ModelFileError
    from serve_app.tuning.overlay import commands, overlay, overlay_text, read_values
    from serve_app.tuning.recommend import Wish, deadline, recommend
    from serve_app.tuning.trace import TraceError
    from serve_app.tuning.why import page, record, sentences, text

    until = deadline(options["seconds"])
    error = _error(options["error"])
    model, current, platform = told(options)
    try:
        training, held_out, load = _cases(options, model)
    except TraceError as problem:
        raise CliError(str(problem)) from None
    world = World((*training, *held_out), model, platform, options["objective"])
    wish = Wish(options["attainment"], current, options["trials"], options["seed"], until)
    workers = options["workers"] or os.cpu_count() or 1
    with (
        _progress(options["trials"] * len(training)) as (say, done),
        Evaluator(world, workers, done) as evaluator,
    ):
        found = recommend(evaluator, len(training), wish, say)

    what = [
        f"{load}, seed {options['seed']}: {len(training)} loads to choose by, {len(held_out)} held "
        "out",
        f"replica: {model.name}; objective {options['objective']:g} s; {len(found.tried)} settings "
        "tried",
    ]
    try:
        values = overlay(found.chosen.scaling, current, read_values(options["values"]))
    except ModelFileError as problem:
        raise CliError(str(problem)) from None
    notes = ["t5-serve tune recommend", *what, sentences(found, error)[0]]
    shown = overlay_text(values, notes)
    said = {
        "load": load,
        "seed": options["seed"],
        "model": model.model_dump(),
        "platform": platform.model_dump(),
        "simulator_error": error,
        "overlay": values,
    }
    folder = options["out"]
    steps = commands(str(folder / "overlay.yaml" if folder is not None else "overlay.yaml"))
    printed = json.dumps(record(found, said), ensure_ascii=False, indent=2)
    if folder is not None:
        html = page(found, options["price"], what, error, shown, steps)
        files = {"why.html": html, "overlay.yaml": shown, "recommendation.json": f"{printed}\n"}
        _write(folder, files)
    if options["as_json"]:
        click.echo(printed)
    else:
        click.echo(text(found, options["price"], what, error), nl=False)
        click.echo(f"\noverlay.yaml:\n{shown}\n" + "\n".join(steps))
        if folder is not None:
            click.echo(f"\nwritten to {folder}: why.html, overlay.yaml, recommendation.json")
    return _status(found, error)


def _status(found: Recommendation, error: str) -> int:
    from serve_app.tuning.why import sentences

    if found.reached:
        return 0
    click.echo(f"t5-serve: {sentences(found, error)[0]}", err=True)
    return 1


def _cases(options: dict[str, Any], model: ServiceModel) -> tuple[list[Case], list[Case], str]:
    """Loads to choose by, held-out ones, and what they are."""
    from serve_app.tuning.cases import multiplied, process_cases, trace_cases
    from serve_app.tuning.samples import SAMPLE, TIMES
    from serve_app.tuning.sizes import Mix, Sizes

    seed, objective = options["seed"], options["objective"]
    if options["sample"]:
        if options["logs"] or options["arrivals"] not in ("poisson", "trace"):
            raise CliError("--sample is a trace of its own: without --logs and --arrivals")
        options = {**options, "arrivals": "trace", "logs": (str(SAMPLE),)}
        options["times"] = options["times"] or TIMES
    if options["arrivals"] != "trace":
        if options["times"] is not None:
            raise CliError("--times is for --arrivals trace; of other arrivals, change --rate")
        load = named_load(options, _DURATION_S)
        sizes = (
            option("--input-tokens", Sizes.parse, options["input_tokens"]),
            option("--output-tokens", Sizes.parse, options["output_tokens"]),
            option("--beams", Mix.parse, options["beams"]),
        )
        told = f"{load.kind} arrivals, {load.rate:g} requests a second for {load.duration_s:g} s"
        return *process_cases(load, sizes, model, objective, seed), told
    trace, speed = usage_trace(options), options["speed"]
    times = options["times"] or 1
    trace = multiplied(trace, times, seed)
    duration = min(options["duration"] or math.inf, trace.duration_s / speed)
    told = f"trace of {len(trace.at):,} texts in {duration:,.0f} s"
    told += f", each as {times}" if times > 1 else ""
    told += f", {speed:g} times as fast" if speed != 1 else ""
    if options["sample"]:
        told = f"made-up {told}"
    if trace.left_out:
        told += f" ({trace.left_out:,} requests of unknown size left out)"
    return *trace_cases(trace, speed, duration, options["window"], model, objective, seed), told


def _error(path: Path | None) -> str:
    """What `tune verify` found out, in words.

    Raises:
        CliError: the file is not its JSON.
    """
    if path is None:
        return _UNVERIFIED
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        known = [said[name] for name in ("p95_error", "attainment_error", "timeline_distance")]
        p95, attained, replicas = (None if one is None else float(one) for one in known)
        seconds = float(said["seconds"])
    except OSError as error:
        raise CliError(f"--error {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CliError(f"--error {path}: not what `tune verify --json` prints") from None
    parts = [] if p95 is None else [f"p95 {p95:+.1%}"]
    parts += [] if attained is None else [f"attainment {100 * attained:+.2f} points"]
    parts += [] if replicas is None else [f"replicas off by {replicas:.2f} on average"]
    return f"simulated against live for {seconds:,.0f} s (tune verify): {', '.join(parts)}"


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise CliError(f"--out {error.filename or folder}: {error.strerror}") from None


@contextlib.contextmanager
def _progress(simulations: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A line on stderr, where that is a terminal; gives what names a stage and what counts."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # No thread of its own: processes are forked meanwhile.
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        auto_refresh=False,
    ) as progress:
        task = progress.add_task("")
        counted = 0

        def say(stage: str) -> None:
            nonlocal counted
            counted = 0
            known = simulations if stage == "settings" else None
            progress.reset(task, total=known, description=stage)
            progress.refresh()

        def done() -> None:
            nonlocal counted
            counted += 1
            progress.update(task, completed=counted, refresh=True)

        yield say, done
