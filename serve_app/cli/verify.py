"""`t5-serve tune verify`: a load sent to a live service and simulated, side by side."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serve_app.cli.errors import CliError
from serve_app.cli.live import Live, agree, served
from serve_app.cli.loads import load_options, option, planned
from serve_app.cli.profiling import profiled

if TYPE_CHECKING:
    from serve_app.tuning.compare import Comparison
    from serve_app.tuning.model import Platform, Scaling, ServiceModel
    from serve_app.tuning.replay import Plan

_DURATION_S = 180.0
_MOST_NEW_TOKENS = 512  # the service's own limit, as it is by default
# What Ray Serve has where nothing is said.
_RAYS = {
    "target_ongoing_requests": 2,
    "upscale_delay_s": 30,
    "downscale_delay_s": 600,
    "upscaling_factor": 1,
    "downscaling_factor": 1,
    "look_back_period_s": 30,
    "aggregation_function": "mean",
}
_RAYS_ONGOING = 5


def _params() -> list[click.Parameter]:
    file = click.Path(dir_okay=False, path_type=Path)
    positive = click.FloatRange(0, min_open=True)
    return [
        *load_options(_DURATION_S),
        click.Option(["--input-tokens"], default="lognormal:180:0.6", show_default=True,
                     help="Words of a text, about as many tokens: N, uniform:LOW:HIGH, "
                     "exponential:MEAN, lognormal:MEDIAN:SIGMA."),
        click.Option(["--output-tokens"], default="lognormal:60:0.5", show_default=True,
                     help="Likewise; asked for exactly, 512 at most."),
        click.Option(["--beams"], default="1", show_default=True,
                     help="Beam widths and shares, as 1:0.8,4:0.2."),
        click.Option(["--values"], type=file, help="Values of the chart: the settings of scaling."),
        click.Option(["--set", "changes"], metavar="NAME=VALUE", multiple=True,
                     help="Change one setting of scaling or platform (docs/tuning.md)."),
        click.Option(["--against-defaults"], is_flag=True,
                     help="Replay and simulate with Ray Serve's default settings, too."),
        click.Option(["--model"], type=file, help="Service model of a replica, from `tune "
                     "profile`. Default: measured first."),
        click.Option(["--profile-seconds"], type=click.FloatRange(1, 3_600), default=30.0,
                     show_default=True, help="How long to measure it."),
        click.Option(["--checkpoint"], default="demo", show_default=True,
                     help="What to serve here: `demo`, a folder, a repository."),
        click.Option(["--dtype"], type=click.Choice(["auto", "float32", "bfloat16", "int8"]),
                     default="auto", help="Of it."),
        click.Option(["--threads"], type=click.IntRange(1), default=1, show_default=True,
                     help="CPU threads of a replica, and CPUs that Ray counts for it."),
        click.Option(["--rows"], type=click.IntRange(1, 1024), default=64, show_default=True,
                     help="engine.max_batch_size of a replica."),
        click.Option(["--url"], help="A service that runs already, in place of one started here."),
        click.Option(["--dashboard"], help="With --url: Ray's dashboard, where replicas are seen."),
        click.Option(["--ray-token-file"], type=file, help="File with Ray's token. Default: "
                     "$RAY_AUTH_TOKEN, or that of this user."),
        click.Option(["--token-file"], type=file, help="File with the API token of --url. "
                     "Default: $T5_SERVE_TOKEN."),
        click.Option(["--probes"], type=click.IntRange(1, 1_000), default=20, show_default=True,
                     help="Requests sent one by one before the load, to measure what a request "
                     "takes outside the engine."),
        click.Option(["--objective"], type=positive, default=2.0, show_default=True,
                     help="Latency objective, seconds."),
        click.Option(["--max-lag"], type=positive, default=0.1, show_default=True,
                     help="As of `bench`: beyond it nothing is compared."),
        click.Option(["--tolerance"], type=positive, default=0.15, show_default=True,
                     help="Largest relative error of p95."),
        click.Option(["--replica-tolerance"], type=positive, default=0.3, show_default=True,
                     help="Largest mean difference of running replicas."),
        click.Option(["--name"], help="Of the comparison, in its report. Default: the arrivals'."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print it as JSON."),
        click.Option(["--html"], type=file, help="Write figures and plots to this file, too."),
    ]  # fmt: skip


def _verify(**options: Any) -> int:
    try:
        import aiohttp  # noqa: F401
        import numba  # noqa: F401
    except ImportError:
        raise CliError("tune needs aiohttp and numba: pip install 't5-serve[tune]'") from None
    from serve_app.cli.tune import told as settings_told

    _check(options)
    if options["url"] is None:
        from serve_app.cli.service import set_ray_environment

        set_ray_environment()  # before anything imports Ray
    from serve_app.tuning.verify_report import page, record, text

    model, scaling, platform = settings_told(options)
    plan, told = _plan(options, platform.deadline_s)
    if options["model"] is None:
        click.echo(f"t5-serve: measuring a replica: {options['profile_seconds']:g} s", err=True)
        model = profiled(
            options["checkpoint"],
            None,
            dtype=options["dtype"],
            device="auto",
            threads=options["threads"],
            rows=options["rows"],
            seconds=options["profile_seconds"],
        ).model
    model = model.model_copy(update={"rows": options["rows"]})
    name = options["name"] or options["arrivals"]
    runs = [(name, scaling, platform)]
    if options["against_defaults"]:
        plain = platform.model_copy(update={"max_ongoing_requests": _RAYS_ONGOING})
        runs.append((f"{name}, Ray's defaults", scaling.model_copy(update=_RAYS), plain))
    what = [f"{told}, seed {options['seed']}", f"replica: {model.name}"]
    comparisons = []
    for called, one, under in runs:
        click.echo(f"t5-serve: {called}: {plan.duration_s:,.0f} s", err=True)
        with served(options, one, under) as live:
            compared = _compare(options, called, plan, live, (model, one, under), what)
        if compared is None:
            return 1
        comparisons.append(compared)
    if options["html"] is not None:
        try:
            options["html"].write_text(page(comparisons, what), encoding="utf-8")
        except OSError as error:
            raise CliError(f"{options['html']}: {error.strerror}") from None
    missed = [
        f"{one.name}: {said}"
        for one in comparisons
        for said in one.missed(options["tolerance"], options["replica_tolerance"])
    ]
    if options["as_json"]:
        said = {
            "load": told,
            "seed": options["seed"],
            "objective_s": options["objective"],
            "scaling": scaling.model_dump(),
            "out_of_tolerance": missed,
            "notes": what,
        }
        click.echo(json.dumps(record(comparisons, said), ensure_ascii=False, indent=2))
    else:
        click.echo(text(comparisons, what), nl=False)
    for line in missed:
        click.echo(f"t5-serve: {line}", err=True)
    return 1 if missed else 0


def _check(options: dict[str, Any]) -> None:
    """Options that exclude each other."""
    if options["url"] is None:
        for name in ("dashboard", "token_file"):
            if options[name] is not None:
                raise CliError(f"--{name.replace('_', '-')} goes with --url")
    elif options["against_defaults"]:
        raise CliError("--against-defaults needs a service started here, not --url")
    elif options["model"] is None:
        raise CliError("--url needs --model: what a replica there can do is not measured from here")


def _plan(options: dict[str, Any], deadline_s: float) -> tuple[Plan, str]:
    import numpy as np

    from serve_app.tuning.replay import Plan
    from serve_app.tuning.sizes import Mix, Sizes

    load = planned(options, _DURATION_S)
    count = len(load.at)
    if not count:
        raise CliError("the load has no request; raise --rate or --duration")
    if load.trace is not None:
        trace = load.trace
        out = np.where(trace.output_tokens > 0, trace.output_tokens, 60)
        words, beams = trace.characters, np.maximum(trace.beams, 1)
    else:
        # As `tune simulate` draws them, at least of the first quarter million.
        rng = np.random.default_rng([options["seed"], 1])
        words = option("--input-tokens", Sizes.parse, options["input_tokens"]).sample(rng, count)
        out = option("--output-tokens", Sizes.parse, options["output_tokens"]).sample(rng, count)
        beams = option("--beams", Mix.parse, options["beams"]).sample(rng, count)
    plan = Plan(
        at=load.at,
        duration_s=load.duration_s,
        sizes=words[:count],
        out=np.minimum(out[:count], _MOST_NEW_TOKENS),
        beams=beams[:count],
        seed=options["seed"],
        deadline_s=deadline_s,
        characters=load.trace is not None,
    )
    return plan, load.told


def _compare(
    options: dict[str, Any],
    name: str,
    plan: Plan,
    live: Live,
    settings: tuple[ServiceModel, Scaling, Platform],
    what: list[str],
) -> Comparison | None:
    """Probe, replay, simulate. None: the load was not sent as planned, which stderr says."""
    from serve_app.tuning.compare import calibrated, compare, simulations, sizes
    from serve_app.tuning.dashboard import DashboardError
    from serve_app.tuning.measured import measure
    from serve_app.tuning.replay import ReplayError, probe, replay

    model, scaling, platform = settings
    try:
        if live.dashboard is not None:
            agree(scaling, platform, live.dashboard.read().config)
        probed = asyncio.run(probe(plan, live.target, options["probes"]))
        fitted, slower = calibrated(model, plan, probed)
        # The probe leaves the look-back, as the simulation begins with an empty one.
        idle = scaling.look_back_period_s + platform.push_interval_s
        replayed = asyncio.run(_after(idle, lambda: replay(plan, live.target, live.dashboard)))
    except (ReplayError, DashboardError) as error:
        raise CliError(str(error)) from None
    measured = measure(replayed.run, plan.duration_s, options["objective"], options["max_lag"])
    if measured.missed is not None:
        click.echo(f"t5-serve: {name}: nothing is compared: {measured.missed}", err=True)
        return None
    if options["url"] is None:
        # Nodes are there; what a start takes was seen.
        starts = replayed.replicas.starts_s() if replayed.replicas is not None else []
        changed = {change.partition("=")[0] for change in options["changes"]}
        update: dict[str, float] = {} if "node_s" in changed else {"node_s": 0.0}
        if starts and "cold_start_s" not in changed:
            update["cold_start_s"] = sorted(starts)[len(starts) // 2]
        platform = platform.model_copy(update=update)
    tokens, steps = sizes(plan, replayed.answers, fitted.max_input_tokens)
    simulated = list(
        simulations(plan, tokens, steps, fitted, scaling, platform, options["objective"])
    )
    what.append(
        f"{name}: the probe's {len(probed.latency_s)} requests took {slower:.2f} times the model "
        f"in the engine, {probed.overhead_s * 1e3:.1f} ms outside it; a replica's start "
        f"{platform.cold_start_s:.1f} s; generator's lag p99 "
        f"{(measured.lag.quantiles['p99'] or 0) * 1e3:.1f} ms"
    )
    what += [f"{name}: failed, {kind}: {count:,}" for kind, count in measured.errors.items()]
    if replayed.replicas is not None and replayed.replicas.unseen:
        what.append(f"{name}: {replayed.replicas.unseen} looks at the replicas had no answer")
    return compare(name, plan, replayed, measured, simulated, fitted.overhead_s)


async def _after(seconds: float, then: Callable[[], Any]) -> Any:
    await asyncio.sleep(seconds)
    return await then()


command = click.Command(
    "verify",
    callback=_verify,
    params=_params(),
    help="""Send a load to a live service and simulate the very same: how far apart they are.

The service is started here, as by `t5-serve run`, or it is --url. Exit status 1: out of
tolerance, or the load could not be sent as planned, and then nothing is compared.

\b
Examples:
  t5-serve tune verify --rate 4 --set max_replicas=2 --set target_ongoing_requests=2
  t5-serve tune verify --arrivals flash-crowd --peak 4 --model replica.yaml --html verify.html
  t5-serve tune verify --url https://summaries.example.org --token-file token \\
    --values values.yaml --model replica.yaml --dashboard http://127.0.0.1:8265
""",
)
