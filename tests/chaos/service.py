"""`t5-serve run` as a process of its own, the processes below it, and what they tell."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
_READY_S = 300.0
_ENDED_S = 120.0
_USAGE_DISK = "16m"  # a few thousand events, and filled at once
# What a process of Ray calls itself, by what it is called here.
TITLES = {
    "engine": "ray::ServeReplica:default:Summarizer",
    "api": "ray::ServeReplica:default:Api",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
    "gcs": "gcs_server",
    "raylet": "raylet",
}
DEPLOYMENTS = ("Summarizer", "Api")
WORK = ("ray_t5_slots_used", "ray_t5_running_requests", "ray_t5_waiting_requests")


def until(condition: Callable[[], Any], what: str, timeout_s: float = 180) -> Any:
    """Wait for something that must come; the bound only ends what is broken."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"never happened: {what}")


@dataclass(frozen=True)
class Replica:
    """One of Serve's replicas, as its dashboard tells of it. `pid` 0: it has no process yet."""

    id: str
    pid: int
    state: str


class LocalService:
    """The service with two replicas of each deployment, its files in a folder of its own.

    Attributes:
        url: of the service, without a trailing slash.
        token: of a client.
        usage_is_a_disk: whether usage events have a small file system of their own.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        # Not pytest's tmp_path: the paths of Ray's sockets must stay below 108 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="t5c", dir="/tmp"))
        self._disk = self._folder / "usage"
        self._disk.mkdir()
        self.usage_is_a_disk = _mounted(self._disk)
        self.usage_folder = self._disk / "events"
        self.tokens_file = self._folder / "conf" / "tokens.json"
        self._gone: list[dict[str, Any]] = []  # events whose files have been removed
        self._known: set[psutil.Process] = set()  # all that ever ran below the command
        self._dashboard = self._ray_token = ""
        self.url = self.token = ""
        self._start(settings or {})

    def _start(self, settings: Mapping[str, Any]) -> None:
        file = self._folder / "settings.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "replicas": {"min": 2, "max": 2},
                    "api": {"replicas": 2},
                    # No segment is pruned: each event is looked for.
                    "usage": {"folder": str(self.usage_folder), "keep": 1_000},
                    "log": "WARNING",
                    **settings,
                }
            )
        )
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("T5_SERVE", "RAY_"))}
        self._said = (self._folder / "stderr").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve_app.cli.main", "run", "--config", str(file),
             "--port", str(port)],
            env={
                **kept,
                "PYTHONPATH": str(ROOT),
                "HOME": str(self._folder),  # Ray's own token goes there
                "RAY_TMPDIR": str(self._folder),
                "RAY_metrics_report_interval_ms": "500",
                "T5_SERVE_TOKENS_FILE": str(self.tokens_file),
            },
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        # A service that never gets ready is ended, and with it the reading of its lines.
        limit = threading.Timer(_READY_S, self.process.kill)
        limit.start()
        try:
            self._read()
        finally:
            limit.cancel()
        self._ray_token = (self._folder / ".ray" / "auth_token").read_text().strip()

    def _read(self) -> None:
        assert self.process.stdout is not None
        told: dict[str, str] = {}
        for line in self.process.stdout:
            if match := re.match(r"(Service|Dashboard|Token) +(\S+)", line):
                told[match[1]] = match[2]
            if line.startswith("first summary"):
                self.url, self.token = told["Service"], told["Token"]
                self._dashboard = told["Dashboard"]
                return
        raise AssertionError(f"the service did not start: {self.said()}")

    def said(self) -> list[str]:
        """Lines on its stderr that are no JSON."""
        lines = (self._folder / "stderr").read_text(errors="replace").splitlines()
        return [line for line in lines if not line.startswith("{")]

    def family(self) -> list[psutil.Process]:
        """The command and all that runs below it."""
        try:
            process = psutil.Process(self.process.pid)
            found = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self._known.update(found)
        return found

    def role(self, process: psutil.Process) -> str:
        """What a process of the family is: a key of `TITLES`, or Ray's name for it."""
        if process.pid == self.process.pid:
            return "t5-serve run"
        title = " ".join(process.cmdline()) or process.name()
        for name, begin in TITLES.items():
            if title.startswith(begin) or Path(title.split(" ")[0]).name == begin:
                return name
        if "/ray/dashboard/" in title or title.startswith("ray-dashboard"):
            return "ray " + title.split(" ")[0].rpartition("/")[2]
        return process.name()[:24]

    def processes(self, role: str) -> list[psutil.Process]:
        """Processes of a role, oldest first."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if self.role(process) == role and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process.create_time(), process.pid, process))
        return [process for _, _, process in sorted(found, key=lambda one: one[:2])]

    def replicas(self) -> dict[str, list[Replica]]:
        """Replicas of each deployment; none while nobody can tell."""
        headers = {"Authorization": f"Bearer {self._ray_token}"}
        try:
            answer = httpx.get(
                f"{self._dashboard}/api/serve/applications/",
                headers=headers,
                timeout=20,
                trust_env=False,
            )
            application = answer.raise_for_status().json()["applications"]["default"]
        except (httpx.HTTPError, ValueError, KeyError):
            return {}
        return {
            name: [
                Replica(one["replica_id"], one.get("pid") or 0, one["state"])
                for one in deployment["replicas"]
            ]
            for name, deployment in application["deployments"].items()
        }

    def whole(self, without: int | None = None) -> bool:
        """Two replicas of each deployment run, none of them the process `without`."""
        found = self.replicas()
        return len(found) == len(DEPLOYMENTS) and all(
            [one.state for one in replicas] == ["RUNNING", "RUNNING"]
            and without not in {one.pid for one in replicas}
            for replicas in found.values()
        )

    def answers(self, token: str | None = None, times: int = 4) -> bool:
        """Whether so many short requests, each with a connection of its own, are answered."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        body = {"text": "A small text to be summarized.", "max_new_tokens": 8, "timeout_s": 60}
        try:
            return all(
                httpx.post(
                    f"{self.url}/v1/summarize",
                    json=body,
                    headers=headers,
                    timeout=90,
                    trust_env=False,
                ).status_code
                == 200
                for _ in range(times)
            )
        except httpx.HTTPError:
            return False

    def series(self, *names: str) -> dict[str, dict[str, float]]:
        """Series by replica, summed over their other labels; of replicas that run only."""
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        path = self._folder / "ray" / "session_latest" / "prom_metrics_service_discovery.json"
        try:
            targets = [
                target for node in json.loads(path.read_text()) for target in node["targets"]
            ]
            pages = [
                httpx.get(f"http://{t}/metrics", timeout=30, trust_env=False).text for t in targets
            ]
        except (OSError, ValueError, httpx.HTTPError):
            return found
        # Ray's agent still shows the last values of replicas that died.
        running = {one.id for replicas in self.replicas().values() for one in replicas}
        for page in pages:
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    replica = sample.labels.get("replica", "")
                    if sample.name in found and replica in running:
                        values = found[sample.name]
                        values[replica] = values.get(replica, 0.0) + sample.value
        return found

    def idle(self) -> bool:
        """Whether all engines say that they have no work and no slot in use."""
        return all(
            len(values) == 2 and not any(values.values()) for values in self.series(*WORK).values()
        )

    def fill_disk(self) -> None:
        """Leave no byte free where usage events go."""
        with (self._disk / "filler").open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"x" * size) == size:
                        pass

    def free_disk(self) -> None:
        """Undo `fill_disk`."""
        (self._disk / "filler").unlink()

    def remove_usage(self) -> None:
        """Remove the folder of usage events. `events` still has those that were in it."""
        self._gone = self.events()
        shutil.rmtree(self.usage_folder)

    def events(self) -> list[dict[str, Any]]:
        """All usage events that were written whole."""
        found = list(self._gone)
        for path in sorted(self.usage_folder.glob("usage-*.jsonl")):
            for line in path.read_bytes().splitlines():
                # A disk that is full leaves half a line at the end of a segment.
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def ended(self) -> int:
        """Its exit status, once it has ended by itself."""
        return self.process.wait(_ENDED_S)

    def stop(self) -> list[str]:
        """Stop it as Ctrl-C does. Gives the processes that it left behind."""
        self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(_ENDED_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        left = [process for process in self._known if _runs(process)]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return [str(process) for process in left]

    def close(self) -> None:
        """Stop it and remove its files."""
        self.stop()
        self._said.close()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.usage_is_a_disk:
            subprocess.run(["umount", "--lazy", self._disk], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def started(settings: Mapping[str, Any] | None = None) -> Iterator[LocalService]:
    """A service that is closed in the end."""
    service = LocalService(settings)
    try:
        yield service
    finally:
        service.close()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _mounted(folder: Path) -> bool:
    """Give the folder a small file system of its own, where this machine lets us."""
    if os.geteuid() != 0:
        return False
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_USAGE_DISK}", "tmpfs", str(folder)]
    return subprocess.run(mount, capture_output=True, check=False).returncode == 0
