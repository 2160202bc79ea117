"""Report tables for a terminal, and their values as text and JSON."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

from serve_app.usage.views import Table


def shown(value: Any) -> str:
    """A value as people read it; times are UTC, to the minute where they are whole minutes."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S").removesuffix(":00")
    if isinstance(value, date):
        return value.isoformat()
    # Lines come from others: nothing of theirs may steer a terminal.
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in str(value))


def plain(value: Any) -> Any:
    """A value as JSON has it; times in RFC 3339."""
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, date) else value


def table_text(table: Table) -> str:
    """A table in columns: numbers right, all else left. One row of many columns stands upright."""
    if not table.rows:
        return "nothing to show\n"
    if len(table.rows) == 1 and len(table.columns) > 9:
        wide = max(map(len, table.columns))
        pairs = zip(table.columns, table.rows[0], strict=True)
        return "".join(f"{name.ljust(wide)}  {shown(value)}\n" for name, value in pairs)
    lines = [table.columns, *([shown(value) for value in row] for row in table.rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.columns))]
    right = [isinstance(value, int | float) for value in table.rows[0]]
    said = []
    for line in lines:
        cells = [
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, right, strict=True)
        ]
        said.append("  ".join(cells).rstrip() + "\n")
    return "".join(said)
