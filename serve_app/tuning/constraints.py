"""Which constraint binds now: a table of rules over readings, the most urgent first.

A rule holds, does not, or cannot be told for want of a series. The first that holds is what binds;
its knob is the one to turn, because those after it do not matter before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_app.tuning.readings import Readings, Value

_FULL = 0.95  # of the rows
_SHARE = 0.01  # of requests, from which on refusals or missed deadlines matter
_SCALING = "summarizer.autoscaling_config"


class UnknownError(Exception):
    """A rule needs a series that nothing exports. The message is the reading's name."""


@dataclass(frozen=True)
class View:
    """Readings and settings, as rules ask for them.

    Attributes:
        settings: values that are known, by path in the chart's values.
        cold_start_s: how long a replica takes to start, its node included.
    """

    readings: Readings
    settings: Mapping[str, Any] = field(default_factory=dict)
    cold_start_s: float = 120.0

    def value(self, name: str) -> Value:
        """A reading.

        Raises:
            UnknownError: its series is not there.
        """
        found = self.readings.values.get(name)
        if found is None:
            raise UnknownError(name)
        return found

    def now(self, name: str) -> float:
        """Its last value, or its rate. Raises as `value`."""
        return self.value(name).now

    def setting(self, name: str, section: str = _SCALING) -> float | None:
        """A number of the settings, or None."""
        found = self.settings.get(f"{section}.{name}")
        return float(found) if isinstance(found, int | float) else None

    @property
    def wanted(self) -> float:
        """Replicas that the load asks for, as the controller sees it over the look-back."""
        return self.now("load") / max(self.now("aim"), 1e-9)

    @property
    def wanted_now(self) -> float:
        """Replicas that the load of this moment asks for."""
        load = self.now("running") + self.now("waiting") + self.now("handle_queue")
        return load / max(self.now("aim"), 1e-9)

    @property
    def full(self) -> bool:
        """Rows were taken all the time, and documents waited for them."""
        rows = self.value("slots_used").low >= _FULL * self.now("slots") > 0
        return rows and self.value("waiting").low > 0


@dataclass(frozen=True)
class Rule:
    """One constraint.

    Attributes:
        knob: path in the chart's values; None: nothing to turn.
        turn: what to do with it.
        holds: whether it binds.
        why: what was read, in words; `{name}` are readings, `{wanted}` and `{wanted_now}` the
            view's, `{s}` the window's seconds.
    """

    name: str
    knob: str | None
    turn: str
    holds: Callable[[View], bool]
    why: str


def _at_max(v: View) -> bool:
    most = v.setting("max_replicas")
    if most is not None:
        return v.now("target") >= most and v.wanted > most
    # The policy's decision is told before the bounds, the target after them.
    return v.value("desired").low > v.value("target").high


def _short(v: View) -> bool:
    return v.value("target").low > v.value("replicas").high


def _nodes(v: View) -> bool:
    lasting = v.readings.window_s >= v.cold_start_s
    return _short(v) and (lasting or v.now("pending_nodes") > 0)


def _handle_full(v: View) -> bool:
    return v.value("handle_queue").low > 0 and not v.full


def _up_delay(v: View) -> bool:
    return math.ceil(v.wanted - 1e-9) > v.now("target")


def _look_back(v: View) -> bool:
    return math.ceil(v.wanted_now - 1e-9) > v.now("target") >= math.ceil(v.wanted - 1e-9)


def _many_rows(v: View) -> bool:
    """Rows are full, but the aim lets more requests to a replica than it has rows."""
    room = v.setting("max_replicas")
    each = v.now("slots") / max(v.now("replicas"), 1)
    return v.full and v.now("aim") > each and (room is None or v.now("target") < room)


def _late(v: View) -> bool:
    done = v.now("finished") + v.now("deadline")
    return v.now("deadline") > _SHARE * done > 0


def _limited(limit: str) -> Callable[[View], bool]:
    def holds(v: View) -> bool:
        # Refused requests are not among the finished.
        here = v.now(f"limited_{limit}")
        return here > _SHARE * (v.now("finished") + here)

    return holds


def _spare(v: View) -> bool:
    least = v.setting("min_replicas")
    needed = max(math.ceil(v.wanted - 1e-9), least if least is not None else 1)
    return v.value("target").low > needed


RULES = (
    Rule(
        "nodes", "summarizer.workers.maxReplicas",
        "raise it, and the node pool's limit and quota; kubectl describe the Pending pods",
        _nodes,
        "{target} replicas are aimed at and {replicas} are there, for {s} s; nodes pending: "
        "{pending_nodes}",
    ),
    Rule(
        "cold_start", f"{_SCALING}.min_replicas",
        "raise it if such waits are too long; else wait: replicas are starting",
        _short,
        "{target} replicas are aimed at, {replicas} are there, for {s} s: not longer than a start",
    ),
    Rule(
        "max_replicas", f"{_SCALING}.max_replicas", "raise it",
        _at_max,
        "the load of {load} requests, {aim} a replica, asks for {wanted} replicas; the target "
        "stays at {target}",
    ),
    Rule(
        "upscale_delay", f"{_SCALING}.upscale_delay_s",
        "lower it, but not below look_back_period_s",
        _up_delay,
        "the load of {load} requests over the look-back asks for {wanted} replicas, the target is "
        "still {target}",
    ),
    Rule(
        "look_back", f"{_SCALING}.look_back_period_s", "lower it, and upscale_delay_s with it",
        _look_back,
        "the load of this moment asks for {wanted_now} replicas; over the look-back it is {load} "
        "requests, {wanted} replicas, so the target stays at {target}",
    ),
    Rule(
        "max_ongoing_requests", "summarizer.max_ongoing_requests", "raise it",
        _handle_full,
        "{handle_queue} requests wait in front of the replicas, while of their {slots} rows "
        "{slots_used} are taken",
    ),
    Rule(
        "target_ongoing_requests", f"{_SCALING}.target_ongoing_requests",
        "lower it to the rows of a replica or below",
        _many_rows,
        "{slots_used} of {slots} rows are taken and {waiting} documents wait, but autoscaling aims "
        "at {aim} requests for each of {replicas} replicas, so adds none",
    ),
    Rule(
        "slots", "engine.max_batch_size", "raise it, as far as memory and latency allow",
        lambda v: v.full,
        "{slots_used} of {slots} rows are taken and {waiting} documents wait for one",
    ),
    Rule(
        "engine_queue", "engine.max_waiting_requests",
        "raise it, if the clients' deadlines allow a longer wait",
        lambda v: v.now("rejected") > _SHARE * (v.now("finished") + v.now("rejected")),
        "engines refuse {rejected} documents a second for a full queue, and finish {finished}",
    ),
    Rule(
        "deadline", "limits.default_timeout_s",
        "raise it; clients that send timeout_s must raise theirs",
        _late,
        "{deadline} documents a second miss their deadline, {finished} finish, and rows are free",
    ),
    Rule(
        "rate_limit_tokens", "rate_limits.tokens_per_minute",
        "raise it, or give the clients in question a tier",
        _limited("tokens_per_minute"),
        "{limited_tokens_per_minute} requests a second are refused for it; engines finish "
        "{finished} documents",
    ),
    Rule(
        "rate_limit_concurrent", "rate_limits.concurrent_requests",
        "raise it, or give the clients in question a tier",
        _limited("concurrent_requests"),
        "{limited_concurrent_requests} requests a second are refused for it; engines finish "
        "{finished} documents",
    ),
    Rule(
        "downscale_delay", f"{_SCALING}.downscale_delay_s",
        "lower it, if so many spare replicas cost too much",
        _spare,
        "the load of {load} requests asks for {wanted} replicas, the target is {target}",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A constraint that holds, its knob, and why."""

    constraint: str
    knob: str | None
    current: Any
    turn: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """What binds.

    Attributes:
        binding: the most urgent; None: nothing binds, or it cannot be told.
        others: those that hold, too.
        undecided: rules that cannot be told, and the reading that each lacks.
    """

    binding: Found | None
    others: tuple[Found, ...]
    undecided: Mapping[str, str]


def explain(view: View, rules: tuple[Rule, ...] = RULES) -> Explanation:
    """Go through the rules."""
    found: list[Found] = []
    undecided: dict[str, str] = {}
    for rule in rules:
        try:
            if rule.holds(view):
                found.append(_found(rule, view))
        except UnknownError as error:
            undecided[rule.name] = str(error)
    return Explanation(found[0] if found else None, tuple(found[1:]), undecided)


def _found(rule: Rule, view: View) -> Found:
    shown = _Shown(view)
    current = view.settings.get(rule.knob) if rule.knob is not None else None
    return Found(rule.name, rule.knob, current, rule.turn, rule.why.format_map(shown))


class _Shown(dict[str, str]):
    """Readings as words, looked up as a sentence needs them."""

    def __init__(self, view: View) -> None:
        super().__init__()
        self._view = view

    def __missing__(self, name: str) -> str:
        if name == "s":
            return f"{self._view.readings.window_s:.0f}"
        if name in ("wanted", "wanted_now"):
            return f"{getattr(self._view, name):.1f}"
        value = self._view.readings.values.get(name)
        if value is None:
            return "an unknown number of"
        return f"{value.now:,.2f}".rstrip("0").rstrip(".")
