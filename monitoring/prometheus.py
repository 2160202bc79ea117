"""A Prometheus of one's own: scrapes a local service as the PodMonitors would in a cluster."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

# What the operator makes of the PodMonitors' `jobLabel` and `podTargetLabels`, and of the pod.
LABELS = {
    "namespace": "prod",
    "job": "t5",
    "pod": "t5-local",
    "container": "ray-worker",
    "app_kubernetes_io_instance": "t5",
    "ray_io_cluster": "t5-local",
}
# Grafana's variables in the dashboards' queries. A rate's window must hold four scrapes.
VARIABLES = {"$namespace": "prod", "$job": "t5", "$cluster": ".*"}


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer: its labels, and (Unix seconds, value) pairs."""

    labels: Mapping[str, str]
    points: list[tuple[float, float]]

    @property
    def value(self) -> float:
        """The last value."""
        return self.points[-1][1]


class Prometheus:
    """A running Prometheus; stops with its `with` block.

    Args:
        program: path of `prometheus`.
        folder: where configuration and data go.
        target: `host:port` of Ray's metrics port.
        port: to listen on, on loopback.
        interval_s: between scrapes, and the most that one may take: Ray's agent needs a second or
            two for its page on a busy machine. Rules are evaluated every second.
        rules: groups of a PrometheusRule's `spec`, or None.
    """

    def __init__(
        self,
        program: Path | str,
        folder: Path,
        target: str,
        port: int,
        *,
        interval_s: float = 5,
        rules: dict[str, Any] | None = None,
    ) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._rate = f"{max(round(4 * interval_s), 5)}s"
        every = f"{round(interval_s * 1000)}ms"
        config: dict[str, Any] = {
            "global": {
                "scrape_interval": every,
                "scrape_timeout": every,
                "evaluation_interval": "1s",
            },
            "scrape_configs": [
                {
                    "job_name": "podMonitor/prod/t5-t5-summarizer-worker/0",
                    # A label of Ray's that a label of the pod's shadows becomes `exported_…`.
                    "honor_labels": False,
                    "static_configs": [{"targets": [target]}],
                    "relabel_configs": [
                        {"target_label": name, "replacement": value}
                        for name, value in LABELS.items()
                    ],
                }
            ],
        }
        if rules is not None:
            (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
            config["rule_files"] = ["rules.yaml"]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self._command = [
            str(program),
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]
        self._log = folder / "prometheus.log"

    def __enter__(self) -> Prometheus:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)  # noqa: S603
        for _ in range(600):
            if self._process.poll() is not None:
                raise RuntimeError(f"prometheus did not start: {self._log.read_text()[-2000:]}")
            try:
                if httpx.get(f"{self._url}/-/ready", trust_env=False).is_success:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        self.__exit__(None, None, None)
        raise RuntimeError("prometheus was not ready after a minute")

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)

    def query(self, expr: str) -> list[Series]:
        """The answer of an instant query; Grafana's variables may be in it. Empty: no data."""
        found = self._get("query", query=self._filled(expr))
        return [Series(one["metric"], [_point(one["value"])]) for one in found["result"]]

    def range(self, expr: str, start: float, end: float, step_s: float) -> list[Series]:
        """The answer of a range query, between two times in Unix seconds."""
        found = self._get(
            "query_range", query=self._filled(expr), start=start, end=end, step=step_s
        )
        return [Series(one["metric"], list(map(_point, one["values"]))) for one in found["result"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        alerts = self._get("alerts")["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    def rules(self) -> list[dict[str, Any]]:
        """All rules as Prometheus sees them, with `health` and `lastError`."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _filled(self, expr: str) -> str:
        for name, value in {**VARIABLES, "$__rate_interval": self._rate}.items():
            expr = expr.replace(name, value)
        return expr

    def _get(self, path: str, **parameters: Any) -> Any:
        url = f"{self._url}/api/v1/{path}"
        answer = httpx.get(url, params=parameters, timeout=60, trust_env=False)
        body = json.loads(answer.text)
        if body["status"] != "success":
            raise ValueError(f"prometheus: {body['error']} in {parameters}")
        return body["data"]


def _point(pair: tuple[float, str]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
