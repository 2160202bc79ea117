"""What the Summarizer's metrics say now: a table of readings, from Prometheus or from raw pages.

Every reading is a sum (or maximum) of one series: of a gauge its last, lowest and highest value
over the window, of a counter its rate over it. So the same table is asked of a Prometheus, and of
Ray's metrics pages read twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S = 30.0
_POINTS = 12  # of a gauge over the window, from Prometheus
_SUMMARIZER = (("deployment", "Summarizer"),)


class ReadingError(Exception):
    """A source cannot be read; the message says which and why, in one line."""


@dataclass(frozen=True)
class Reading:
    """One row of the table.

    Attributes:
        series: as exported.
        labels: that a series must have; a value may not.
        of: how series are put together. `rate`: sum of the counters' rates, per second.
        rare: the series appears with its first count, so none means 0.
    """

    name: str
    series: str
    labels: tuple[tuple[str, str], ...] = ()
    of: Literal["sum", "max", "rate"] = "sum"
    rare: bool = False

    @property
    def selector(self) -> str:
        """As PromQL has it."""
        inside = ",".join(f'{name}="{value}"' for name, value in self.labels)
        return f"{self.series}{{{inside}}}" if inside else self.series


def _outcome(name: str) -> Reading:
    labels = (("outcome", name),)
    return Reading(name, "ray_t5_engine_requests_total", labels, "rate", rare=True)


def _limited(name: str) -> Reading:
    return Reading(f"limited_{name}", "ray_t5_rate_limited_total", (("limit", name),), "rate", True)


READINGS = (
    Reading("slots", "ray_t5_slots"),
    Reading("slots_used", "ray_t5_slots_used"),
    Reading("running", "ray_t5_running_requests"),
    Reading("waiting", "ray_t5_waiting_requests"),
    Reading("replicas", "ray_serve_deployment_replica_healthy", _SUMMARIZER),
    Reading("target", "ray_serve_autoscaling_target_replicas", _SUMMARIZER, "max"),
    Reading("desired", "ray_serve_autoscaling_desired_replicas", _SUMMARIZER, "max"),
    Reading("load", "ray_serve_autoscaling_total_requests", _SUMMARIZER, "max"),
    Reading("aim", "ray_serve_autoscaling_target_ongoing_requests", _SUMMARIZER, "max"),
    Reading("handle_queue", "ray_serve_deployment_queued_queries", _SUMMARIZER),
    Reading("pending_nodes", "autoscaler_pending_nodes", rare=True),
    _outcome("finished"),
    _outcome("deadline"),
    _outcome("rejected"),
    _limited("tokens_per_minute"),
    _limited("concurrent_requests"),
)


@dataclass(frozen=True)
class Value:
    """Of one reading: last, lowest and highest over the window. A rate is all three."""

    now: float
    low: float
    high: float


@dataclass(frozen=True)
class Readings:
    """All that was read over so many seconds. `missing` are series that nothing exports."""

    window_s: float
    values: Mapping[str, Value]
    missing: tuple[str, ...]


def from_prometheus(
    url: str,
    window_s: float,
    labels: Mapping[str, str],
    table: Sequence[Reading] = READINGS,
    now: Callable[[], float] = time.time,
) -> Readings:
    """Ask a Prometheus.

    Args:
        labels: that all series must have, as namespace and job where it sees several services.

    Raises:
        ReadingError: it does not answer.
    """
    common = tuple(labels.items())
    end = now()
    found: dict[str, Value] = {}
    missing: list[str] = []
    with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
        for one in table:
            each = Reading(one.name, one.series, (*one.labels, *common), one.of)
            if one.of == "rate":
                expr = f"sum(rate({each.selector}[{window_s:g}s]))"
                values = _asked(client, url, "query", {"query": expr, "time": end})
            else:
                values = _asked(
                    client,
                    url,
                    "query_range",
                    {
                        "query": f"{one.of}({each.selector})",
                        "start": end - window_s,
                        "end": end,
                        "step": max(window_s / _POINTS, 1),
                    },
                )
            _keep(one, values, found, missing)
    return Readings(window_s, found, tuple(missing))


def _asked(client: httpx.Client, url: str, path: str, parameters: Mapping[str, Any]) -> list[float]:
    address = f"{url.rstrip('/')}/api/v1/{path}"
    try:
        body = client.get(address, params=dict(parameters)).json()
        if body["status"] != "success":
            raise ReadingError(f"{address}: {' '.join(str(body.get('error')).split())}")
        result = body["data"]["result"]
        if not result:
            return []
        pairs = result[0]["values"] if path == "query_range" else [result[0]["value"]]
        return [float(value) for _, value in pairs]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ReadingError(f"{address}: {error or type(error).__name__}") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise ReadingError(f"{address}: not what Prometheus answers") from None


def _keep(
    one: Reading, values: Sequence[float], found: dict[str, Value], missing: list[str]
) -> None:
    values = [value for value in values if value == value]  # a rate of nothing is NaN
    if values:
        found[one.name] = Value(values[-1], min(values), max(values))
    elif one.rare:
        found[one.name] = Value(0.0, 0.0, 0.0)
    elif one.series not in missing:
        missing.append(one.series)


def from_pages(
    urls: Sequence[str],
    window_s: float,
    table: Sequence[Reading] = READINGS,
    sleep: Callable[[float], None] = time.sleep,
) -> Readings:
    """Read Ray's metrics pages, one for each node, twice.

    Raises:
        ReadingError: a page cannot be read.
    """
    with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
        before = _samples(client, urls)
        began = time.monotonic()
        sleep(window_s)
        after = _samples(client, urls)
        passed = max(time.monotonic() - began, 1e-3)
    found: dict[str, Value] = {}
    missing: list[str] = []
    for one in table:
        first, last = _matching(before, one), _matching(after, one)
        if one.of == "rate":
            # A counter that has just appeared began at 0, one that fell began anew.
            grown = [
                value - first.get(key, 0.0) if value >= first.get(key, 0.0) else value
                for key, value in last.items()
            ]
            values = [sum(grown) / passed] if last else []
        else:
            join = max if one.of == "max" else sum
            values = [float(join(side.values())) for side in (first, last) if side]
        _keep(one, values, found, missing)
    return Readings(passed, found, tuple(missing))


_Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _samples(client: httpx.Client, urls: Sequence[str]) -> _Samples:
    kept: _Samples = {}
    for number, url in enumerate(urls):
        try:
            page = client.get(url)
            page.raise_for_status()
            for family in text_string_to_metric_families(page.text):
                for sample in family.samples:
                    labels = (*sorted(sample.labels.items()), ("page", str(number)))
                    kept[(sample.name, labels)] = float(sample.value)
        except httpx.HTTPStatusError as error:
            raise ReadingError(f"{url}: status {error.response.status_code}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ReadingError(f"{url}: {error or type(error).__name__}") from None
        except ValueError as error:
            raise ReadingError(f"{url}: not a metrics page: {error}") from None
    return kept


def _matching(samples: _Samples, one: Reading) -> dict[tuple[tuple[str, str], ...], float]:
    wanted = set(one.labels)
    return {
        labels: value
        for (name, labels), value in samples.items()
        if name == one.series and wanted <= set(labels)
    }
