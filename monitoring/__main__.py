"""`python -m monitoring`: writes the chart's dashboards, and the tables of docs/monitoring.md."""

from __future__ import annotations

from pathlib import Path

from monitoring.boards import BOARDS
from monitoring.docs import PAGE, updated
from monitoring.grafana import render

DASHBOARDS = Path(__file__).resolve().parents[1] / "helm" / "t5-summarizer" / "dashboards"

if __name__ == "__main__":
    for board in BOARDS:
        (DASHBOARDS / f"{board.name}.json").write_text(render(board))
    PAGE.write_text(updated(PAGE.read_text()))
