"""Options that name a load: shared by what sends one and what simulates one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from serve_app.cli.errors import CliError
from serve_app.cli.usage import lines_of, log_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from serve_app.tuning.arrivals import Load
    from serve_app.tuning.trace import Trace

_T = TypeVar("_T")
# As in serve_app.tuning.arrivals, which needs numpy.
_KINDS = ("constant", "poisson", "bursty", "diurnal", "flash-crowd", "trace")


@dataclass(frozen=True)
class Plan:
    """A load to send: when requests are due, in seconds, and what it is in words."""

    at: NDArray[np.float64]
    duration_s: float
    told: str
    trace: Trace | None = None


def load_options(duration_s: float) -> list[click.Parameter]:
    """Which load."""
    positive = click.FloatRange(0, min_open=True)
    return [
        click.Option(["--arrivals"], type=click.Choice(_KINDS), default="poisson",
                     show_default=True, help="How requests come; trace: as in the usage log."),
        click.Option(["--rate"], type=positive, default=1.0, show_default=True,
                     help="Requests per second: the mean, and before a flash crowd."),
        click.Option(["--duration"], type=positive,
                     help=f"Seconds of the load. Default: {duration_s:g}; of a trace, all of it."),
        click.Option(["--burstiness"], type=positive, default=4.0, show_default=True,
                     help="bursty: variance of the gaps over their squared mean; 1 is Poisson."),
        click.Option(["--peak"], type=click.FloatRange(1), default=2.0, show_default=True,
                     help="diurnal: highest over mean rate, at most 2; flash-crowd: over --rate."),
        click.Option(["--period"], type=positive,
                     help="diurnal: seconds. Default: the duration."),
        click.Option(["--speed"], type=positive, default=1.0, show_default=True,
                     help="trace: so many times as fast as it was."),
        *log_options(),
        click.Option(["--seed"], type=click.IntRange(0), default=1, show_default=True,
                     help="Of all chance."),
    ]  # fmt: skip


def named_load(options: dict[str, Any], duration_s: float) -> Load:
    """The arrival process of the options, for so long where they do not say.

    Raises:
        CliError: an option is out of its bounds.
    """
    from serve_app.tuning.arrivals import Load

    try:
        return Load(
            options["arrivals"],
            options["rate"],
            options["duration"] or duration_s,
            options["burstiness"],
            options["peak"],
            options["period"],
        )
    except ValueError as error:
        raise CliError(f"--{str(error).replace('_s:', ':')}") from None


def planned(options: dict[str, Any], duration_s: float) -> Plan:
    """The load that the options name, for so long where they do not say.

    Raises:
        CliError: an option is out of its bounds, or there is no trace.
    """
    import numpy as np

    from serve_app.tuning.arrivals import arrivals

    if options["arrivals"] == "trace":
        trace = usage_trace(options)
        at = trace.at / options["speed"]
        end = min(trace.duration_s / options["speed"], options["duration"] or np.inf)
        at = at[at <= end]
        told = f"trace of {len(at):,} texts, {options['speed']:g} times as fast"
        if trace.left_out:
            told += f" ({trace.left_out:,} requests of unknown size left out)"
        return Plan(at, end, told, trace)
    load = named_load(options, duration_s)
    if load.expected() > 10_000_000:
        raise CliError(
            f"--rate times --duration: must be at most 10,000,000, is {load.expected():,.0f}"
        )
    at = arrivals(load, np.random.default_rng([options["seed"], 0]))
    told = f"{load.kind} arrivals, {load.rate:g} requests a second for {load.duration_s:g} s"
    return Plan(at, load.duration_s, told)


def usage_trace(options: dict[str, Any]) -> Trace:
    """The load in the usage log that the options name.

    Raises:
        CliError: a log cannot be read or tells no size.
    """
    from serve_app.tuning.trace import TraceError, read_trace
    from serve_app.usage.reader import Tally, UsageReadError

    since, until = options["since"], options["until"]
    tally = Tally()
    try:
        trace = read_trace(
            line
            for line in lines_of(options["logs"], tally)
            if (since is None or line.time >= since) and (until is None or line.time < until)
        )
    except (TraceError, UsageReadError) as error:
        raise CliError(str(error)) from None
    if count := tally.broken_lines:
        lines = "1 line" if count == 1 else f"{count:,} lines"
        click.echo(f"t5-serve: {lines} could not be read: {'; '.join(tally.broken)}", err=True)
    return trace


def option(name: str, parse: Callable[[str], _T], text: str) -> _T:
    """An option's value, parsed.

    Raises:
        CliError: it cannot be.
    """
    try:
        return parse(text)
    except ValueError as error:
        raise CliError(f"{name}: {error}") from None
