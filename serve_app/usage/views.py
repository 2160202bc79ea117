"""The BigQuery views in `sql/`: their texts, and the same views over local lines in DuckDB.

`sql/events.sql` gives every line today's names, `sql/requests.sql` makes one row per request of
them, and all others are reports on those rows: one question each, told in its first comment.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.usage.limits import Call
from serve_app.usage.reader import Line

if TYPE_CHECKING:
    import duckdb

DATASET = "t5_requests"  # as the files write it
_EXPORTED = f"TO_JSON(jsonPayload) AS line\n  FROM {DATASET}.stdout"  # how `events` reads lines
BASE = ("events", "requests")
REPORTS = (
    "overview",
    "calls_per_client_day",
    "calls_by_weekday_hour",
    "success_per_hour",
    "latency",
    "auth_failures",
    "throttled_calls",
    "rate_limit_candidates",
    "top_clients",
    "cost_per_client_day",
)


class MissingExtraError(Exception):
    """DuckDB or sqlglot is not installed."""


@dataclass(frozen=True)
class Table:
    """A report's answer. Values are None, str, bool, int, float, date or datetime (UTC)."""

    name: str
    columns: list[str]
    rows: list[tuple[Any, ...]]

    def records(self) -> list[dict[str, Any]]:
        """The rows as mappings from column to value."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def view_sql(
    name: str,
    dataset: str = DATASET,
    tables: Sequence[str] = ("stdout",),
    source: str | None = None,
) -> str:
    """The BigQuery statement that makes a view.

    Args:
        name: of `BASE` or `REPORTS`.
        dataset: where the views go, and where the sink's tables are: `NAME` or `PROJECT.NAME`.
        tables: those in it that have lines.
        source: a dataset linked to a log bucket (Observability Analytics), whose lines to read in
            place of the sink's.
    """
    text = (files("serve_app.usage") / "sql" / f"{name}.sql").read_text(encoding="utf-8")
    line = re.search(rf".*\n  FROM {DATASET}\.stdout\n", text)
    if line is not None and source is not None:
        # https://cloud.google.com/logging/docs/analyze/query-and-view: the table of all log
        # entries, in which a JSON payload is one column.
        assert _EXPORTED in text
        linked = (
            f"json_payload AS line\n  FROM `{source}._AllLogs`\n  WHERE json_payload IS NOT NULL"
        )
        text = text.replace(_EXPORTED, linked)
    elif line is not None:
        reads = (line[0].replace(".stdout", f".{table}") for table in tables)
        text = text.replace(line[0], "  UNION ALL\n".join(reads))
    if dataset == DATASET:
        return text
    return re.sub(rf"\b{DATASET}\.(\w+)", rf"`{dataset}.\1`", text)


def question(name: str) -> str:
    """What a report answers: its file's first sentence."""
    comment = re.match(r"(?:--.*\n)+", view_sql(name))
    assert comment is not None
    told = " ".join(re.sub(r"^-- ?", "", comment[0], flags=re.MULTILINE).split())
    return re.split(r"(?<=[.?]) ", told)[0]


class Usage:
    """The views over lines, in a DuckDB in memory.

    Args:
        lines: what `reader` reads.
        since, until: only requests from then on, and before then.
        client: only this client's requests.

    Raises:
        MissingExtraError: see there.
    """

    def __init__(
        self,
        lines: Iterable[Line],
        since: datetime | None = None,
        until: datetime | None = None,
        client: str | None = None,
    ) -> None:
        try:
            import duckdb
            import sqlglot
        except ImportError:
            raise MissingExtraError(
                "reports need DuckDB and sqlglot: pip install 't5-serve[usage]'"
            ) from None
        # Nothing is fetched or read but what is said here.
        self._db = duckdb.connect(config={"autoinstall_known_extensions": False})
        self._db.execute(f"SET TimeZone = 'UTC'; CREATE SCHEMA {DATASET}")
        _load(self._db, lines)
        for name in (*BASE, *REPORTS):
            [statement] = sqlglot.transpile(view_sql(name), read="bigquery", write="duckdb")
            self._db.execute(statement)
            if name == "requests":
                self._keep(since, until, client)

    def report(self, name: str) -> Table:
        """A view's rows, in its order."""
        found = self._db.execute(f"SELECT * FROM {DATASET}.{name}")  # noqa: S608  # a name of ours
        return Table(name, [column[0] for column in found.description or []], found.fetchall())

    def arrivals(self) -> dict[str, list[float]]:
        """When each client's calls came, in seconds since 1970, in order; refused ones, too."""
        found = self._db.execute(
            "SELECT client, epoch(time) - LEAST(COALESCE(total_ms, 0) / 1000, 86400) AS came "  # noqa: S608
            f"FROM {DATASET}.requests WHERE is_call AND client IS NOT NULL ORDER BY client, came"
        )
        arrivals: dict[str, list[float]] = {}
        for client, came in found.fetchall():
            arrivals.setdefault(client, []).append(came)
        return arrivals

    def work(self) -> dict[str, list[Call]]:
        """What each client's calls weighed and used, in order; refused ones used nothing.

        Only calls whose text the service has seen. Lines of older versions do not say what a call
        weighed when it came: its input tokens stand for that.
        """
        found = self._db.execute(
            "SELECT client, epoch(time) - LEAST(COALESCE(total_ms, 0) / 1000, 86400) AS came, "  # noqa: S608
            "epoch(time), COALESCE(asked_tokens, input_tokens), "
            "COALESCE(input_tokens, 0) + COALESCE(output_tokens, 0) "
            f"FROM {DATASET}.requests WHERE is_call AND client IS NOT NULL "
            "AND COALESCE(asked_tokens, input_tokens) IS NOT NULL ORDER BY client, came"
        )
        work: dict[str, list[Call]] = {}
        for client, *call in found.fetchall():
            work.setdefault(client, []).append(Call(*call))
        return work

    def _keep(self, since: datetime | None, until: datetime | None, client: str | None) -> None:
        """Put a table of the requests that were asked for in place of the view of all.

        Only once they are put together: the two lines of a request may lie on two sides of a bound.
        Also, DuckDB would run the view anew for each report.
        """
        self._db.execute(
            f"CREATE TEMP TABLE kept AS SELECT * FROM {DATASET}.requests WHERE "  # noqa: S608
            "time >= COALESCE($since, time) AND time < COALESCE($until, time + INTERVAL 1 DAY) "
            "AND ($client IS NULL OR client = $client)",
            {"since": since, "until": until, "client": client},
        )
        self._db.execute(f"DROP VIEW {DATASET}.requests")
        self._db.execute(f"CREATE TABLE {DATASET}.requests AS FROM temp.kept; DROP TABLE temp.kept")


def _load(db: duckdb.DuckDBPyConnection, lines: Iterable[Line]) -> None:
    """Make the table that Cloud Logging's export would make."""
    db.execute(f"CREATE TABLE {DATASET}.stdout (timestamp TIMESTAMPTZ, jsonPayload JSON)")
    # By way of a file: many times faster than inserting rows.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.tsv"
        with file.open("w", encoding="utf-8", newline="") as out:
            # JSON holds no tab or line break as such, so neither needs a quote.
            out.writelines(f"{line.time.isoformat()}\t{line.payload}\n" for line in lines)
        db.execute(
            f"INSERT INTO {DATASET}.stdout SELECT * FROM read_csv($file, delim = '\t', "  # noqa: S608
            "quote = '', escape = '', header = false, auto_detect = false, "
            "columns = {'time': 'TIMESTAMPTZ', 'payload': 'VARCHAR'})",
            {"file": str(file)},
        )
