"""The list of series in docs/monitoring.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from serve_app.metrics.series import API_SERIES, ENGINE_SERIES, SPANS_DROPPED, Series

PAGE = Path(__file__).resolve().parents[1] / "docs" / "monitoring.md"
_TABLES = {"Api": API_SERIES, "Summarizer": ENGINE_SERIES, "traces": (SPANS_DROPPED,)}


def updated(page: str) -> str:
    """The page with its tables as the code has them."""
    for name, series in _TABLES.items():
        begin, end = f"<!-- series: {name} -->\n", "<!-- end -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}{_table(series)}{end}{after}"
    return page


def _table(series: Iterable[Series]) -> str:
    lines = ["| series | kind | labels | |", "|---|---|---|---|"]
    for one in series:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        lines.append(f"| `{one.exported}` | {one.kind} | {labels} | {one.text} |")
    return "\n".join(lines) + "\n"
