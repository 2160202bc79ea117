"""The dashboards' queries over a real run, as pictures: `python -m bench.dashboards`.

Runs the service on the demo model in a local Ray, scrapes it with a real Prometheus (`make
chart-tools`), sends load in waves for some minutes, and plots what every panel would show, the way
Grafana asks for it. Takes the place of screenshots: Grafana itself is not among the tools here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"  # everything listens on loopback only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import httpx
import matplotlib as mpl
import ray
from PIL import Image
from ray import serve

from monitoring.board import Board, Panel
from monitoring.boards import BOARDS
from monitoring.prometheus import Prometheus, Series
from serve_app.app import build
from serve_app.config import ServiceSettings

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
TEXT = (
    "nginx is a small and fast HTTP server that many sites use. It serves static files, balances "
    "load over several servers and keeps the answers of slow ones. This package has its manual. "
)
# Share of the run, clients at once: quiet, busy, more than the queues take, quiet.
WAVES = ((0.2, 2), (0.3, 12), (0.3, 48), (0.2, 3))


def main() -> None:
    """Run the service, load it, plot."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.dashboards")
    parser.add_argument("--minutes", type=float, default=4, help="of load (%(default)s)")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the pictures")
    options = parser.parse_args()
    places = os.pathsep.join((str(ROOT / ".tools" / "bin"), os.environ.get("PATH", "")))
    program = shutil.which("prometheus", path=places)
    if program is None:
        parser.error("prometheus is not here: `make chart-tools` builds it")
    metrics, http, web = (_free_port() for _ in range(3))
    with tempfile.TemporaryDirectory() as folder:
        ray.init(
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            _metrics_export_port=metrics,
            _system_config={"metrics_report_interval_ms": 1_000},
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": http})
            serve.run(build(_settings(Path(folder))), name="t5-serve")
            target = f"127.0.0.1:{metrics}"
            with Prometheus(program, Path(folder), target, web, interval_s=2) as prometheus:
                began = time.time()
                _load(f"http://127.0.0.1:{http}", options.minutes * 60)
                time.sleep(5)
                for board in BOARDS:
                    path = options.output / f"dashboard-{board.name}.png"
                    _plot(board, prometheus, began, time.time(), path)
                    print(path)
        finally:
            serve.shutdown()
            ray.shutdown()


def _settings(folder: Path) -> ServiceSettings:
    return ServiceSettings.model_validate(
        {
            "auth": "trusted-header",
            "engine": {"max_waiting_requests": 24, "max_batch_size": 16},
            "replicas": {
                **{"min": 1, "max": 2, "target_ongoing_requests": 12},
                **{"upscale_delay_s": 15, "downscale_delay_s": 20},
            },
            "usage": {"folder": str(folder / "usage")},
        }
    )


def _load(url: str, seconds: float) -> None:
    for share, clients in WAVES:
        stop = threading.Event()
        with ThreadPoolExecutor(clients) as pool:
            working = [pool.submit(_client, url, at, stop) for at in range(clients)]
            time.sleep(share * seconds)
            stop.set()
        for one in working:
            one.result()


def _client(url: str, at: int, stop: threading.Event) -> None:
    """Short texts, every fourth client long ones; one goes away, one sends nothing of use."""
    name = ("web-shop", "newsroom", "intranet", "archive")[at % 4]
    headers = {"X-Api-Client": name}
    with httpx.Client(base_url=url, headers=headers, timeout=120, trust_env=False) as client:
        turn = 0
        while not stop.is_set():
            turn += 1
            body: dict[str, Any] = {"text": TEXT * (40 if name == "archive" else 2)}
            if turn % 9 == 0:
                body = {**body, "on_overflow": "truncate", "timeout_s": 0.05}
            if turn % 7 == 0:
                body = {"text": ""}
            if turn % 5 == 0:
                with client.stream("POST", "/v1/summarize", json={**body, "stream": True}) as one:
                    next(one.iter_bytes(), None)
            elif client.post("/v1/summarize", json=body).status_code == 503:
                stop.wait(0.5)


def _plot(board: Board, prometheus: Prometheus, start: float, end: float, path: Path) -> None:
    panels = board.panels
    columns = 3 if len(panels) > 4 else 2
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5 * columns, 2.3 * lines), layout="constrained", squeeze=False
    )
    for panel, axis in zip(panels, axes.flat, strict=False):
        _draw(panel, axis, prometheus, start, end)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(board.title, fontsize=11)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    # Lines in a few colours: a palette halves the file.
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256)
    small.save(path, optimize=True)


def _draw(panel: Panel, axis: Any, prometheus: Prometheus, start: float, end: float) -> None:
    lines: list[tuple[str, Series]] = []
    for query in panel.queries:
        for series in prometheus.range(query.expr, start, end, step_s=2):
            legend = query.legend or panel.title
            for name, value in series.labels.items():
                legend = legend.replace("{{" + name + "}}", value)
            lines.append((legend, series))
    for legend, series in lines[:8]:
        times = [at - start for at, _ in series.points]
        axis.plot(times, [value for _, value in series.points], label=legend, linewidth=1.2)
    axis.set_title(f"{panel.title} ({panel.unit})", fontsize=8)
    axis.tick_params(labelsize=6)
    axis.set_xlim(0, end - start)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    if not lines:
        axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes, fontsize=8)
    elif lines[0][0] != panel.title:
        axis.legend(fontsize=6, loc="upper left")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
