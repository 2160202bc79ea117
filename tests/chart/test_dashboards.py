"""Grafana's dashboards in the chart: current, whole, and where its sidecar looks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from monitoring.__main__ import DASHBOARDS
from monitoring.board import Board
from monitoring.boards import BOARDS
from monitoring.grafana import render as render_json
from serve_app.metrics.series import API_SERIES, ENGINE_SERIES, Kind
from tests.chart.conftest import Rendered

Render = Callable[..., Rendered]
each_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)


@each_board
def test_the_file_is_what_the_source_says(board: Board) -> None:
    said = "run `python -m monitoring`, or `make chart`"
    assert (DASHBOARDS / f"{board.name}.json").read_text() == render_json(board), said


def test_there_is_no_file_without_a_source() -> None:
    assert {path.stem for path in DASHBOARDS.iterdir()} == {board.name for board in BOARDS}


@each_board
def test_panels_fill_whole_lines_and_do_not_overlap(board: Board) -> None:
    panels = json.loads((DASHBOARDS / f"{board.name}.json").read_text())["panels"]
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        at = panel["gridPos"]
        for cell in ((x, y) for x in range(at["w"]) for y in range(at["h"])):
            place = (at["x"] + cell[0], at["y"] + cell[1])
            assert place not in taken, (panel["title"], taken[place])
            assert place[0] < 24, panel["title"]
            taken[place] = panel["title"]
    ids = [panel["id"] for panel in panels if panel["type"] != "row"]
    assert len(ids) == len(set(ids)) == len(board.panels)


def test_every_series_of_the_service_is_on_a_dashboard() -> None:
    queries = "".join(
        query.expr for board in BOARDS for one in board.panels for query in one.queries
    )
    seen = set(re.findall(r"ray_t5_\w+", queries))
    for one in (*API_SERIES, *ENGINE_SERIES):
        name = one.exported + ("_bucket" if one.kind is Kind.HISTOGRAM else "")
        # Its rate is the sum of encode's and decode's, which are shown.
        assert name in seen or one.name == "t5_compute_seconds", name
        seen.discard(name)
    assert seen == set()


def test_ray_still_exports_what_needs_a_gpu() -> None:
    # No GPU here to query it from; `ray_` is Ray's prefix.
    assert "node_gpus_utilization" in METRICS_GAUGES


def test_dashboards_are_config_maps_for_grafanas_sidecar(render: Render) -> None:
    values: dict[str, Any] = {"enabled": True, "annotations": {"grafana_folder": "t5-serve"}}
    release = render({"metrics": {"dashboards": values}})
    maps = release.all("ConfigMap")
    assert len(maps) == len(BOARDS)
    for one in maps:
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert one["metadata"]["annotations"] == {"grafana_folder": "t5-serve"}
        [(name, text)] = one["data"].items()
        # Helm leaves Grafana's own braces alone.
        board = name.removeprefix("t5-serve-")
        assert json.loads(text) == json.loads((DASHBOARDS / board).read_text())
    uids = {json.loads(text)["uid"] for one in maps for text in one["data"].values()}
    assert len(uids) == len(BOARDS)


def test_dashboards_are_off_by_default(render: Render) -> None:
    assert render().all("ConfigMap") == []


def test_rays_dashboard_is_told_where_grafana_is(render: Render) -> None:
    def environment(release: Rendered, pod: str) -> dict[str, str]:
        [container] = [one for one in release.pod(pod)["containers"] if one["name"][:4] == "ray-"]
        return {one["name"]: one.get("value", "") for one in container["env"]}

    told = {
        "grafanaHost": "http://grafana.monitoring",
        "grafanaIframeHost": "https://grafana.example.com",
        "prometheusHost": "http://prometheus.monitoring:9090",
    }
    release = render({"metrics": {"rayDashboard": told}})
    head = environment(release, "head")
    assert head["RAY_GRAFANA_HOST"] == "http://grafana.monitoring"
    assert head["RAY_GRAFANA_IFRAME_HOST"] == "https://grafana.example.com"
    assert head["RAY_PROMETHEUS_HOST"] == "http://prometheus.monitoring:9090"
    assert head["RAY_PROMETHEUS_NAME"] == "Prometheus"
    assert not any("GRAFANA" in name for name in environment(release, "api"))
    assert not any("GRAFANA" in name for name in environment(render(), "head"))
    # The head may ask them.
    monitoring = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    }
    for one, may in ((release, True), (render(), False)):
        policy = one.one("NetworkPolicy", "t5-t5-summarizer")
        assert ({"to": [monitoring]} in policy["spec"]["egress"]) is may
