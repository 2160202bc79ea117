"""`python -m monitoring`: writes the chart's dashboards."""

from __future__ import annotations

from pathlib import Path

from monitoring.boards import BOARDS
from monitoring.grafana import render

DASHBOARDS = Path(__file__).resolve().parents[1] / "helm" / "t5-summarizer" / "dashboards"

if __name__ == "__main__":
    for board in BOARDS:
        (DASHBOARDS / f"{board.name}.json").write_text(render(board))
