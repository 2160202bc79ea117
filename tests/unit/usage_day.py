"""Monday, 2026-11-23, and a second of Tuesday: log lines whose every figure is known beforehand.

| UTC | client | what | service | NGINX |
|---|---|---|---|---|
| 02:00-02:59 | nightly | 5 texts a minute, 1,000 ms; each tenth: full | 54 × 200, 6 × 503 | same |
| 03:00 | none | no token, wrong token | | 7 × 401, 3 × 403 |
| 04:00 | none | too large, which NGINX sees before the key | | 2 × 413 |
| 04:00 | none | no service | | 1 × 502 |
| 05:00 | none | no token, past NGINX | 4 × 401 | |
| 06:00 | nightly | bad field | 5 × 422 | same |
| 07:00 | web-shop | streams that end in an error | 2 × 200 | same |
| 08:00 | web-shop | client leaves | 200 | 499 |
| 09:00-16:59 | web-shop | 2 calls a minute; they take 1, 2, … 960 ms | 960 × 200 | same |
| 12:00 | web-shop | above its rate | | 10 × 429 |
| 23:59:59.900, 00:00:00.100 | late | two calls with one id | 2 × 200 | |
| 10:00 | none | the page | 9 × 200 | same |
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

MONDAY = datetime(2026, 11, 23, tzinfo=UTC)


class Day:
    """The lines of the service and of NGINX."""

    def __init__(self) -> None:
        self.service: list[str] = []
        self.nginx: list[str] = []
        self._ids = 0
        self._nightly()
        self._refused()
        self._web_shop()
        for moment in (timedelta(days=1, seconds=-0.1), timedelta(days=1, seconds=0.1)):
            self._served(MONDAY + moment, "late", "/hf/summarization", 40, request_id="mine")
        for second in range(9):
            self.both(MONDAY + timedelta(hours=10, seconds=second), None, "/", 200, total_ms=1.0)

    def both(
        self, time: datetime, client: str | None, route: str, status: int, **facts: Any
    ) -> None:
        """A request through NGINX that the service answered."""
        request_id = self._event(time, client, route, status, **facts)
        self.edge(time, client, route, status, request_id)

    def edge(
        self,
        time: datetime,
        client: str | None,
        path: str,
        status: int,
        request_id: str | None = None,
        address: str = "192.0.2.1",
    ) -> None:
        """NGINX's line, in the shape of the chart's `log_format`."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00"),
            "severity": "INFO",
            "message": "access",
            "request_id": request_id or self._id(),
            "client": client or "",
            "api_key": f"{client}.0123abcd" if client else "",
            "host": "summarize.example.com",
            "method": "POST",
            "path": path,
            "status": status,
            "duration_s": 2.5,
            "upstream_status": "" if request_id is None else str(status),
            "upstream_duration_s": "",
            "request_bytes": 700,
            "response_bytes": 900,
            "limit": "REJECTED" if status == 429 else "",
            "remote_addr": address,
            "user_agent": "tests",
        }
        self.nginx.append(json.dumps(line))

    def _nightly(self) -> None:
        for minute in range(60):
            time = MONDAY + timedelta(hours=2, minutes=minute)
            if minute % 10 == 0:
                self.both(
                    time, "nightly", "/v1/summarize/batch", 503, error_type="overloaded", texts=5
                )
                continue
            self.both(
                time, "nightly", "/v1/summarize/batch", 200, total_ms=1000.0, texts=5, chunks=5,
                input_tokens=500, output_tokens=100, queue_ms=10.0, compute_ms=50.0, truncated=0,
                cached=0,
            )  # fmt: skip
        for _ in range(5):
            time = MONDAY + timedelta(hours=6)
            self.both(time, "nightly", "/v1/summarize", 422, error_type="invalid")

    def _refused(self) -> None:
        for _ in range(7):
            self.edge(MONDAY + timedelta(hours=3), None, "/v1/summarize", 401, address="192.0.2.7")
        for _ in range(3):
            self.edge(MONDAY + timedelta(hours=3), None, "/v1/summarize", 403, address="192.0.2.8")
        for _ in range(2):
            self.edge(MONDAY + timedelta(hours=4), None, "/v1/summarize", 413)
        self.edge(MONDAY + timedelta(hours=4), None, "/v1/summarize", 502)
        self.edge(MONDAY + timedelta(hours=4), None, "/wp-login.php", 404)  # no call
        for _ in range(4):
            time = MONDAY + timedelta(hours=5)
            self._event(time, None, "/v1/summarize", 401, error_type="unauthorized")

    def _web_shop(self) -> None:
        for _ in range(2):
            time = MONDAY + timedelta(hours=7)
            self.both(time, "web-shop", "/v1/summarize", 200, error_type="deadline", stream=True)
        left = self._event(MONDAY + timedelta(hours=8), "web-shop", "/v1/summarize", 200)
        self.edge(MONDAY + timedelta(hours=8), "web-shop", "/v1/summarize", 499, left)
        for number in range(960):
            time = MONDAY + timedelta(hours=9, minutes=number // 2, seconds=number % 2)
            # 7 and 960 have no common factor: each of 1 to 960 comes once.
            total_ms = float(number * 7 % 960 + 1)
            self._served(time, "web-shop", "/v1/summarize", total_ms, edge=True)
        for _ in range(10):
            self.edge(MONDAY + timedelta(hours=12), "web-shop", "/v1/summarize", 429)

    def _served(
        self,
        time: datetime,
        client: str,
        route: str,
        total_ms: float,
        edge: bool = False,
        request_id: str | None = None,
    ) -> None:
        request_id = self._event(
            time, client, route, 200, request_id=request_id, total_ms=total_ms, texts=1, chunks=1,
            input_tokens=100, output_tokens=20, queue_ms=2.0, compute_ms=5.0, truncated=0,
            cached=0,
        )  # fmt: skip
        if edge:
            self.edge(time, client, route, 200, request_id)

    def _event(
        self, time: datetime, client: str | None, route: str, status: int, **facts: Any
    ) -> str:
        request_id: str = facts.pop("request_id", None) or self._id()
        line = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "severity": "INFO",
            "message": "request",
            "schema_version": 1,
            "source": "service",
            "request_id": request_id,
            "method": "POST",
            "route": route,
            "status": status,
            "total_ms": 3.0,
            "replica": "abc",
            "request_bytes": 600,
            "response_bytes": 800,
            **({"client": client} if client else {}),
            **facts,
        }
        self.service.append(json.dumps(line))
        return request_id

    def _id(self) -> str:
        self._ids += 1
        return f"id-{self._ids}"
