"""`t5-serve tune`: how replicas should scale, found out without any."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.cli import recommend
from serve_app.cli.errors import CliError, settings_message
from serve_app.cli.explain import command as explain
from serve_app.cli.loads import load_options, named_load, option, usage_trace
from serve_app.cli.profiling import profiled
from serve_app.cli.verify import command as verify

if TYPE_CHECKING:
    from serve_app.tuning.model import Platform, Scaling, ServiceModel
    from serve_app.tuning.simulate import Simulated


_DURATION_S = 3_600.0
_BELIEVED = 0.25  # error of a profile on a mixed load


@click.group("tune", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Autoscaling of the Summarizer's replicas.

    \b
    Examples:
      t5-serve tune profile --model google-t5/t5-small > replica.yaml
      t5-serve tune simulate --model replica.yaml --arrivals diurnal --rate 20 --duration 86400
      t5-serve tune verify --model replica.yaml --rate 4
      t5-serve tune recommend --model replica.yaml --arrivals trace --since 7d --out recommended
    """


def _params() -> list[click.Parameter]:
    file = click.Path(dir_okay=False, path_type=Path)
    return [
        *load_options(_DURATION_S),
        click.Option(["--input-tokens"], default="lognormal:180:0.6", show_default=True,
                     help="Of a request: N, uniform:LOW:HIGH, exponential:MEAN, "
                     "lognormal:MEDIAN:SIGMA."),
        click.Option(["--output-tokens"], default="lognormal:60:0.5", show_default=True,
                     help="Likewise."),
        click.Option(["--beams"], default="1", show_default=True,
                     help="Beam widths and shares, as 1:0.8,4:0.2."),
        click.Option(["--model"], type=file, help="Service model of a replica, YAML or JSON. "
                     "Default: T5-small in int8 on two cores."),
        click.Option(["--values"], type=file,
                     help="Values of the chart; `summarizer.autoscaling_config` is used. Default: "
                     "the chart's own."),
        click.Option(["--set", "changes"], metavar="NAME=VALUE", multiple=True,
                     help="Change one setting of scaling or platform (docs/tuning.md)."),
        click.Option(["--objective"], type=click.FloatRange(0, min_open=True), default=2.0,
                     show_default=True, help="Latency objective, seconds."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print it as JSON."),
        click.Option(["--html"], type=file, help="Write figures and plots to this file, too."),
    ]  # fmt: skip


def _simulate(**options: Any) -> None:
    try:
        import numba  # noqa: F401
    except ImportError:
        raise CliError("tune needs numba: pip install 't5-serve[tune]'") from None
    model, scaling, platform = told(options)
    began = time.perf_counter()
    simulated, load = _run(options, model, scaling, platform)
    wall = time.perf_counter() - began
    from serve_app.tuning.outcome import page, record, text

    changed = {k: v for k, v in scaling.model_dump().items() if v is not None}
    what = [
        f"{load}, seed {options['seed']}",
        f"replica: {model.name}; objective {options['objective']:g} s",
        ", ".join(f"{name} {value}" for name, value in changed.items()),
    ]
    if options["html"] is not None:
        try:
            options["html"].write_text(page(simulated, what), encoding="utf-8")
        except OSError as error:
            raise CliError(f"{options['html']}: {error.strerror}") from None
    if options["as_json"]:
        said = {
            "load": load,
            "seed": options["seed"],
            "objective_s": options["objective"],
            "model": model.model_dump(),
            "scaling": scaling.model_dump(),
            "platform": platform.model_dump(),
        }
        click.echo(json.dumps(record(simulated, said), ensure_ascii=False, indent=2))
        return
    click.echo(text(simulated, what), nl=False)
    faster = simulated.duration_s / max(wall, 1e-9)
    click.echo(f"\nsimulated in {wall:,.1f} s, {faster:,.0f} times as fast as it would have been")


def _run(
    options: dict[str, Any], model: ServiceModel, scaling: Scaling, platform: Platform
) -> tuple[Simulated, str]:
    from serve_app.tuning.loads import drawn, recorded
    from serve_app.tuning.simulate import Simulation
    from serve_app.tuning.sizes import Mix, Sizes
    from serve_app.tuning.trace import TraceError

    seed = options["seed"]
    tokens = option("--input-tokens", Sizes.parse, options["input_tokens"])
    steps = option("--output-tokens", Sizes.parse, options["output_tokens"])
    mix = option("--beams", Mix.parse, options["beams"])
    duration = options["duration"] or _DURATION_S
    if options["arrivals"] == "trace":
        trace = usage_trace(options)
        duration = min(options["duration"] or math.inf, trace.duration_s / options["speed"])
        blocks = recorded(trace, options["speed"], duration, model.max_input_tokens)
        told = f"trace of {len(trace.at):,} texts, {options['speed']:g} times as fast"
        told += f", for {duration:,.0f} s"
        if trace.left_out:
            told += f" ({trace.left_out:,} requests of unknown size left out)"
    else:
        load = named_load(options, duration)
        blocks = drawn(load, tokens, steps, mix, model.max_input_tokens, seed)
        told = f"{load.kind} arrivals, {load.rate:g} requests a second for {duration:g} s"
    try:
        simulation = Simulation(
            blocks,
            duration,
            model,
            scaling,
            platform,
            objective_s=options["objective"],
            seed=seed,
        )
        return simulation.run(), told
    except TraceError as error:
        raise CliError(str(error)) from None


def told(options: dict[str, Any]) -> tuple[ServiceModel, Scaling, Platform]:
    """What `--model`, `--values` and `--set` say.

    Raises:
        CliError: a file cannot be used, or a setting breaks a rule.
    """
    from pydantic import ValidationError

    from serve_app.tuning.model import (
        ModelFileError,
        Platform,
        Scaling,
        ServiceModel,
        load_model,
        load_values,
    )

    try:
        model = load_model(options["model"]) if options["model"] is not None else ServiceModel()
        scaling, platform = Scaling(), Platform()
        if options["values"] is not None:
            scaling, platform = load_values(options["values"], platform)
    except ModelFileError as error:
        raise CliError(str(error)) from None
    pairs = ((Scaling, scaling), (Platform, platform))
    said: dict[type, dict[str, Any]] = {one: kept.model_dump() for one, kept in pairs}
    for change in options["changes"]:
        name, equals, value = change.partition("=")
        kinds = [kind for kind in (Scaling, Platform) if name in kind.model_fields]
        if not equals or not kinds:
            names = ", ".join([*Scaling.model_fields, *Platform.model_fields])
            raise CliError(f"--set {change}: must be NAME=VALUE, NAME one of {names}")
        said[kinds[0]][name] = value
    try:
        return model, Scaling.model_validate(said[Scaling]), Platform.model_validate(said[Platform])
    except ValidationError as error:
        raise CliError(f"--set: {settings_message(error)}") from None


command.add_command(
    click.Command(
        "simulate",
        callback=_simulate,
        params=_params(),
        help="""Simulate a load on replicas that Ray Serve scales: latencies, replicas, their hours.

Requests, engines, metrics, nodes and failures are on virtual time; the autoscaling policy is Ray's
own code, of the version installed. The same seed gives the same result.

\b
Examples:
  t5-serve tune simulate --rate 20 --arrivals flash-crowd --peak 6 --set max_replicas=10
  t5-serve tune simulate --rate 50 --arrivals diurnal --duration 86400 --html day.html
  t5-serve tune simulate --arrivals trace --since 7d --duration 604800 --values values.yaml
""",
    )
)


command.add_command(verify)
command.add_command(explain)
command.add_command(recommend.command(_params(), told))


@command.command("profile")
@click.option("--model", default="demo", show_default=True, help="`demo`, a folder, a repository.")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "int8"]), default="auto")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="CPU threads, as many as a replica's num_cpus.",
)
@click.option(
    "--rows",
    type=click.IntRange(1, 1024),
    default=64,
    show_default=True,
    help="As engine.max_batch_size.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1, 3_600),
    default=60.0,
    show_default=True,
    help="How long to measure.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=180,
    show_default=True,
    help="Input tokens of the request in the table.",
)
@click.option(
    "--new-tokens", type=click.IntRange(1), default=60, show_default=True, help="Its output tokens."
)
def profile(**options: Any) -> int:
    """Measure one replica's engine on this machine: its service model, for `tune simulate`.

    The model goes to stdout, its error and a table of latencies to stderr. Nothing else should run
    meanwhile. Exit status 1: a mixed load took over 25 % more or less than the model says.

    \b
    Example:
      t5-serve tune profile --model google-t5/t5-small --threads 2 > replica.yaml
    """
    import yaml

    from serve_app.tuning.profile import throughput

    found = profiled(
        options["model"],
        options["revision"],
        dtype=options["dtype"],
        device=options["device"],
        threads=options["threads"],
        rows=options["rows"],
        seconds=options["seconds"],
    )
    click.echo(yaml.safe_dump(found.model.model_dump(), sort_keys=False), nl=False)
    say = [
        f"{found.kinds} kinds of work, median error of the fit {found.fit_error:.1%}; "
        f"a mixed load: {found.mixed_error:+.1%}; loaded in {found.load_s:.1f} s",
        f"requests of {options['tokens']} and {options['new_tokens']} tokens:",
        "at once  latency, s  a second",
    ]
    for at_once, latency, rate in throughput(found.model, options["tokens"], options["new_tokens"]):
        say.append(f"{at_once:7}  {latency:10.3f}  {rate:8.2f}")
    click.echo("\n".join(say), err=True)
    if abs(found.mixed_error) <= _BELIEVED:
        return 0
    click.echo(
        f"t5-serve: the model is off by {found.mixed_error:+.0%}, over {_BELIEVED:.0%}: was the "
        "machine busy with something else? More --seconds may help",
        err=True,
    )
    return 1
