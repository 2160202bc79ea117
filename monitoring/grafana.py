"""Boards as Grafana's JSON."""

from __future__ import annotations

import json

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
)

from monitoring.board import Board, Panel

TAG = "t5-serve"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHT = 8
# A series that is there as long as the service is.
_SERIES = "ray_serve_deployment_replica_healthy"


def render(board: Board) -> str:
    """The dashboard's JSON, stable from run to run."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(f"t5-serve-{board.name}")
        .description(board.text)
        .tags([TAG])
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .link(
            dashboard.DashboardLink("t5-serve")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(_label("namespace", f"label_values({_SERIES}, namespace)"))
        .with_variable(_label("job", f'label_values({_SERIES}{{namespace="$namespace"}}, job)'))
        .with_variable(
            # During an upgrade there are two.
            _label(
                "cluster",
                f'label_values({_SERIES}{{namespace="$namespace",job="$job"}}, ray_io_cluster)',
            )
            .include_all(True)
            .all_value(".*")
            .multi(True)
            .current(VariableOption(text="All", value="$__all"))
        )
    )
    number = 0
    for row in board.rows:
        built.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            number += 1
            built.with_panel(_panel(panel).id(number))
    return json.dumps(built.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _label(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .query(query)
        .datasource(_SOURCE)
        .refresh(VariableRefresh.ON_DASHBOARD_LOAD)
    )


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel:
    built: timeseries.Panel | stat.Panel
    if panel.kind == "stat":
        built = (
            stat.Panel()
            .graph_mode(BigValueGraphMode.AREA)
            .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
            .height(4)
        )
    else:
        built = (
            timeseries.Panel()
            .height(_HEIGHT)
            .min(0)
            .show_points(VisibilityMode.NEVER)
            .legend(
                common.VizLegendOptions()
                .display_mode(LegendDisplayMode.LIST)
                .placement(LegendPlacement.BOTTOM)
                .show_legend(True)
            )
            .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        )
        if panel.kind == "stacked":
            built = built.fill_opacity(30).stacking(
                common.StackingConfig().mode(StackingMode.NORMAL)
            )
    built = (
        built.title(panel.title)
        .description(panel.text)
        .unit(panel.unit)
        .span(panel.width)
        .datasource(_SOURCE)
    )
    for letter, query in zip("ABCDEF", panel.queries, strict=False):
        built.with_target(
            prometheus.Dataquery()
            .expr(query.expr)
            .legend_format(query.legend or panel.title)
            .ref_id(letter)
            .datasource(_SOURCE)
        )
    return built
