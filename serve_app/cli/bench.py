"""`t5-serve bench`: an open-loop load against a URL, and what it met."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from serve_app.cli.errors import CliError
from serve_app.cli.loads import load_options, planned
from serve_app.cli.summarize import LOOPBACK, checked_token, dev_token

if TYPE_CHECKING:
    from serve_app.tuning.measured import Measured
    from serve_app.tuning.send import Run, Target

_PATH = "/v1/summarize"
_INTERRUPTED = 130
_DURATION_S = 60.0


def _params() -> list[click.Parameter]:
    positive = click.FloatRange(0, min_open=True)
    return [
        click.Argument(["url"], metavar="URL"),
        *load_options(_DURATION_S),
        click.Option(["--words"], default="lognormal:180:0.6", show_default=True,
                     help="Words of a text: N, uniform:LOW:HIGH, exponential:MEAN, "
                     "lognormal:MEDIAN:SIGMA."),
        click.Option(["--texts"], type=click.Path(dir_okay=False, path_type=Path),
                     help="Send the lines of this file, or each line's `text` of a .jsonl file."),
        click.Option(["--usage-sizes"], is_flag=True,
                     help="Lengths and beams drawn from the usage log instead."),
        click.Option(["--beams"], default=None,
                     help="Beam widths and shares, as 1:0.8,4:0.2. Default: the model's own."),
        click.Option(["--max-new-tokens"], type=click.IntRange(1), help="As in the API."),
        click.Option(["--objective"], type=positive, default=2.0, show_default=True,
                     help="Latency objective, seconds."),
        click.Option(["--timeout"], type=positive, default=60.0, show_default=True,
                     help="Give a request up after so many seconds."),
        click.Option(["--max-requests"], type=click.IntRange(1), default=1_000_000,
                     show_default=True, help="End after so many."),
        click.Option(["--max-in-flight"], type=click.IntRange(1), default=10_000,
                     show_default=True, help="Requests beyond that are not sent, but counted."),
        click.Option(["--max-lag"], type=positive, default=0.1, show_default=True,
                     help="A request begun later than so many seconds was not sent at its rate."),
        click.Option(["--token-file"], type=click.Path(dir_okay=False, path_type=Path),
                     help="File with the API token. Default: $T5_SERVE_TOKEN, and for a service "
                     "on this machine the development token of `t5-serve run`."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the figures as JSON."),
        click.Option(["--html"], type=click.Path(dir_okay=False, path_type=Path),
                     help="Write figures and plots to this file, too."),
    ]  # fmt: skip


def _bench(url: str, **options: Any) -> int:
    try:
        import aiohttp  # noqa: F401
        import rich  # noqa: F401
    except ImportError:
        raise CliError("bench needs aiohttp and rich: pip install 't5-serve[tune]'") from None
    from serve_app.tuning.measured import measure
    from serve_app.tuning.report import page, text

    load = planned(options, _DURATION_S)
    due = load.at[: options["max_requests"]]
    if not len(due):
        raise CliError("the load has no request; raise --rate or --duration")
    # Cut short, a load ends with its last request.
    duration = load.duration_s if len(due) == len(load.at) else float(due[-1])
    run = _send(due, _bodies(options, load.trace), _target(url, options), duration)
    measured = measure(run, duration, options["objective"], options["max_lag"])
    what = [f"{load.told}, seed {options['seed']}, to {url}"]
    if options["html"] is not None:
        try:
            options["html"].write_text(page(measured, run, what), encoding="utf-8")
        except OSError as error:
            raise CliError(f"{options['html']}: {error.strerror}") from None
    if options["as_json"]:
        record = {"load": load.told, "url": url, "seed": options["seed"], **measured.record()}
        click.echo(json.dumps(record, ensure_ascii=False, indent=2))
    else:
        click.echo(text(measured, what), nl=False)
    return _status(measured)


def _status(measured: Measured) -> int:
    if measured.interrupted:
        return _INTERRUPTED
    if measured.missed is None:
        return 0
    click.echo(
        f"t5-serve: not the load that was asked for ({measured.planned_rate:,.2f} requests a "
        f"second): {measured.missed}",
        err=True,
    )
    return 1


def _target(url: str, options: dict[str, Any]) -> Target:
    from serve_app.tuning.send import Target

    local = checked_url(url)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if token := api_token(options["token_file"], local=local):
        headers["Authorization"] = f"Bearer {token}"
    return Target(
        url=url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}{_PATH}",
        headers=headers,
        timeout_s=options["timeout"],
        most_in_flight=options["max_in_flight"],
        # A proxy set in the environment cannot reach this machine's own loopback.
        trust_env=not local,
    )


def checked_url(url: str) -> bool:
    """Whether a service's URL is this machine's own.

    Raises:
        CliError: it is not an HTTP URL.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise CliError(f"{url}: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise CliError(f"{url}: must be an http or https URL")
    return host in LOOPBACK


def api_token(file: Path | None, *, local: bool) -> str | None:
    """The API token of a file, of `T5_SERVE_TOKEN`, or of `t5-serve run` on this machine.

    Raises:
        CliError: the file cannot be read, or holds no token.
    """
    import os

    try:
        token = (
            os.environ.get("T5_SERVE_TOKEN")
            if file is None
            else file.read_text(encoding="utf-8").strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{file}: {getattr(error, 'strerror', None) or 'not text'}") from None
    token = token or (dev_token() if local else None)
    return checked_token(token) if token else None


def _bodies(options: dict[str, Any], trace: Any) -> Any:
    import numpy as np

    from serve_app.cli.loads import option, usage_trace
    from serve_app.tuning.sizes import Mix, Sizes
    from serve_app.tuning.texts import Bodies, TextFileError, read_texts

    words = option("--words", Sizes.parse, options["words"])
    mix = option("--beams", Mix.parse, options["beams"]) if options["beams"] else None
    rng = np.random.default_rng([options["seed"], 1])
    count = min(options["max_requests"], 100_000)
    try:
        texts = read_texts(options["texts"]) if options["texts"] is not None else None
    except TextFileError as error:
        raise CliError(str(error)) from None
    sizes, widths = words.sample(rng, count), np.zeros(1, dtype=np.int64)
    if trace is not None:
        sizes, widths = trace.characters, trace.beams
    elif options["usage_sizes"]:
        trace = usage_trace(options)
        drawn = rng.integers(0, len(trace.at), count)
        sizes, widths = trace.characters[drawn], trace.beams[drawn]
    if mix is not None:
        widths = mix.sample(rng, count)
    more = {"max_new_tokens": options["max_new_tokens"]} if options["max_new_tokens"] else {}
    return Bodies(options["seed"], texts, sizes, widths, more, characters=trace is not None)


def _send(due: Any, bodies: Any, target: Target, duration: float) -> Run:
    from serve_app.tuning.send import Run, send

    run = Run()

    async def go() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, stop.set)
        with _progress(run, duration) as shown:
            showing = asyncio.create_task(shown) if shown is not None else None
            await send(due.tolist(), bodies, target, run, stop)
            if showing is not None:
                showing.cancel()

    asyncio.run(go())
    return run


@contextlib.contextmanager
def _progress(run: Run, duration: float) -> Iterator[Any]:
    """A line on stderr that is renewed, where that is a terminal; gives what renews it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=duration)

        async def renew() -> None:
            from serve_app.tuning.progress import seen

            while True:
                last = run.sent[-1].due if run.sent else 0.0
                progress.update(task, completed=last, description=seen(run))
                await asyncio.sleep(0.25)

        yield renew()


command = click.Command(
    "bench",
    callback=_bench,
    params=_params(),
    help="""Send a load to URL (a service, or any path that takes JSON) and tell how it was met.

Requests leave when they are due, whatever became of those before, and latencies count from that
moment. Exit status 1: it could not be sent as it was asked for, so the figures are of another load.

\b
Examples:
  t5-serve bench http://127.0.0.1:8000 --rate 5 --duration 60
  t5-serve bench http://127.0.0.1:8000 --arrivals bursty --burstiness 8 --beams 1:0.8,4:0.2
  t5-serve bench http://127.0.0.1:8000 --arrivals trace --since 24h --speed 24 --html bench.html
""",
)
