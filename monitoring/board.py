"""What a dashboard consists of, before it is Grafana's JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The PodMonitors' labels; `application` tells our series from those of other applications on Serve.
PODS = 'namespace="$namespace",job="$job",ray_io_cluster=~"$cluster"'
APP = f'{PODS},application="t5-serve"'


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression. `S` in `{S}` and `{S,…}` stands for the release's series of the service,
    `P` for all that its pods export."""

    text: str
    legend: str = ""

    @property
    def expr(self) -> str:
        """The expression with Grafana's variables."""
        said = self.text
        for letter, labels in (("S", APP), ("P", PODS)):
            said = said.replace(f"{{{letter}}}", f"{{{labels}}}")
            said = said.replace(f"{{{letter},", f"{{{labels},")
        return said


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is Grafana's name of it; `text` says what to read from the panel."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str = ""
    kind: Literal["graph", "stacked", "stat"] = "graph"
    width: int = 8  # of 24


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """A dashboard. `name` is its file's and ends its `uid`."""

    name: str
    title: str
    text: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> list[Panel]:
        """All panels, in order."""
        return [panel for row in self.rows for panel in row.panels]


def graph(
    title: str, unit: str, *queries: tuple[str, str], text: str = "", width: int = 8
) -> Panel:
    """Lines over time; each query with its legend."""
    return Panel(title, unit, tuple(Query(*one) for one in queries), text, "graph", width)


def stacked(
    title: str, unit: str, *queries: tuple[str, str], text: str = "", width: int = 8
) -> Panel:
    """Areas on top of each other: what they sum up to is the whole."""
    return Panel(title, unit, tuple(Query(*one) for one in queries), text, "stacked", width)


def stat(title: str, unit: str, query: str, text: str = "") -> Panel:
    """One number, now."""
    return Panel(title, unit, (Query(query),), text, "stat", 4)
