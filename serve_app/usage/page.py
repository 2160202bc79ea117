"""All reports as one HTML page: charts and tables, nothing fetched, no script."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from html import escape

from serve_app.usage.svg import COLOURS, bars, columns, heat
from serve_app.usage.text import shown
from serve_app.usage.views import REPORTS, Table, question

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_ROWS = 200  # of a table
_BARS = 20

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#68727f;--line:#d9dee5;--back:#fff;
--s0:#2563a8;--s1:#d97b29;--s2:#b3303a;--s3:#3d8a5f;--s4:#7a5aa6;--s5:#8a8f98;--s6:#b89b00}
@media(prefers-color-scheme:dark){:root{--ink:#e3e8ef;--soft:#9aa5b1;--line:#343c47;--back:#161a20;
--s0:#6aa5e8;--s1:#eda55c;--s2:#e5737c;--s3:#6fbf94;--s4:#a98bd6;--s5:#a0a6af;--s6:#dcc65b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);
max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2.5rem}p.note{color:var(--soft)}
svg{width:100%;height:auto}svg text{font-size:11px;fill:var(--soft)}svg line{stroke:var(--line)}
.legend span{margin-right:1.2rem}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.4em}
div.table{overflow:auto;max-height:24rem}table{border-collapse:collapse;font-size:13px}
th,td{padding:.2rem .8rem .2rem 0;text-align:left;
border-bottom:1px solid var(--line);white-space:nowrap}
td.n{text-align:right;font-variant-numeric:tabular-nums}
""" + "".join(
    f"svg .s{at}{{fill:var(--s{at})}}.legend .s{at}{{background:var(--s{at})}}"
    f"svg path.s{at}{{fill:none;stroke:var(--s{at});stroke-width:1.5}}"
    for at in range(COLOURS)
)


def page(tables: dict[str, Table], notes: list[str]) -> str:
    """The page of all reports; `notes` says what they are of."""
    parts = []
    for name in REPORTS:
        table = tables[name]
        parts.append(f"<h2>{escape(name.replace('_', ' '))}</h2>")
        parts.append(f'<p class="note">{escape(question(name))}</p>')
        if not table.rows:
            parts.append("<p>nothing to show</p>")
            continue
        if name in _CHARTS:
            parts.append(_CHARTS[name](table))
        parts.append(table_html(table))
    return document("t5-serve: usage", notes, parts)


def document(title: str, notes: list[str], parts: list[str]) -> str:
    """A page of `parts`, which are HTML; `title` and `notes` are text."""
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    # A policy of its own: whatever a log line holds, the page loads and runs nothing.
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{told}{''.join(parts)}</body></html>\n"
    )


def table_html(table: Table) -> str:
    """The first rows of a table."""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="n">{shown(value)}</td>'
            if isinstance(value, int | float)
            else f"<td>{escape(shown(value))}</td>"
            for value in row
        )
        + "</tr>"
        for row in table.rows[:_ROWS]
    )
    more = len(table.rows) - _ROWS
    rest = f'<p class="note">and {more:,} more rows</p>' if more > 0 else ""
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>{rest}'


def _calls(table: Table) -> str:
    calls: dict[str, int] = defaultdict(int)
    cells: dict[tuple[str, str], int] = {}
    for row in table.records():
        calls[row["client"]] += row["calls"]
        cells[row["day"].isoformat(), row["client"]] = row["calls"]
    days = sorted({day for day, _ in cells})
    first = sorted(calls, key=lambda client: -calls[client])
    # The last colour is everybody else's.
    alone = first if len(first) <= COLOURS else first[: COLOURS - 1]
    series = {client: [cells.get((day, client), 0) for day in days] for client in alone}
    if others := first[len(alone) :]:
        series[f"{len(others)} others"] = [
            sum(cells.get((day, client), 0) for client in others) for day in days
        ]
    return columns(days, series, stacked=True)


def _week(table: Table) -> str:
    cells = {(row["weekday"] - 1, row["hour"]): row["calls_per_day"] for row in table.records()}
    return heat(_DAYS, 24, cells)


def _success(table: Table) -> str:
    rows = table.records()
    kinds = {
        "succeeded": "succeeded",
        "client errors": "client_errors",
        "server errors": "server_errors",
    }
    series = {name: [row[column] for row in rows] for name, column in kinds.items()}
    return columns([shown(row["hour"]) for row in rows], series, stacked=True)


def _latency(table: Table) -> str:
    rows = table.records()
    series = {f"{p} ms": [row[f"{p}_ms"] or 0 for row in rows] for p in ("p50", "p95", "p99")}
    return columns([f"{row['day']} {row['route']}" for row in rows], series, stacked=False)


def _per_client(column: str, unit: str) -> Callable[[Table], str]:
    def chart(table: Table) -> str:
        sums: dict[str, float] = defaultdict(float)
        for row in table.records():
            sums[row["client"]] += row[column]
        most = sorted(sums, key=lambda client: -sums[client])[:_BARS]
        return bars({client: sums[client] for client in most}, unit)

    return chart


_CHARTS: dict[str, Callable[[Table], str]] = {
    "calls_per_client_day": _calls,
    "calls_by_weekday_hour": _week,
    "success_per_hour": _success,
    "latency": _latency,
    "throttled_calls": _per_client("calls", "calls"),
    "rate_limit_candidates": _per_client("peak_per_minute", "calls a minute"),
    "top_clients": _per_client("calls", "calls"),
    "cost_per_client_day": _per_client("compute_seconds", "s"),
}
