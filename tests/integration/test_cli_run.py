"""`t5-serve run` as a user has it: a real process, its printed curl line, and no process left."""

from __future__ import annotations

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
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.otlp import collector

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "serve_app.cli.main"]
TEXT = "This package contains a text editor for the terminal. It is small and easy to learn."
TIMEOUT_S = 240

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    # Not tmp_path: the paths of Ray's sockets must stay below 108 bytes.
    folder = tempfile.mkdtemp(prefix="t5", dir="/tmp")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("T5_SERVE", "RAY_"))
    }
    yield {
        **kept,
        "PYTHONPATH": str(ROOT),
        "HOME": folder,  # Ray's own token goes there
        "RAY_TMPDIR": folder,
        "T5_SERVE_TOKENS_FILE": f"{folder}/conf/tokens.json",
    }
    shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Run:
    """`t5-serve run` and what it has printed so far."""

    def __init__(self, environment: dict[str, str], *args: str) -> None:
        self.environment = environment
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*COMMAND, "run", *args],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def until(self, pattern: str) -> re.Match[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no {pattern!r} in {self.lines}, stderr: {self.said}")

    def family(self) -> set[psutil.Process]:
        """The process and all it has started. A process that is gone is no longer equal to one."""
        process = psutil.Process(self.process.pid)
        return {process, *process.children(recursive=True), *session(self.environment)}

    def ended(self) -> int:
        status = self.process.wait(TIMEOUT_S)
        self._reader.join(30)
        return status


def session(environment: dict[str, str]) -> set[psutil.Process]:
    """Processes of the Ray session, by the folder that is theirs alone; also those re-parented."""
    folder = environment["RAY_TMPDIR"]
    found = set()
    for process in psutil.process_iter():
        try:
            opened = [process.cwd(), *process.cmdline(), *open_files(process)]
        except psutil.Error:
            continue
        if any(folder in name for name in opened):
            found.add(process)
    return found


def open_files(process: psutil.Process) -> list[str]:
    try:
        return [file.path for file in process.open_files()]
    except (psutil.Error, OSError):
        return []


@pytest.fixture
def run(environment: dict[str, str]) -> Iterator[Run]:
    started = Run(environment, "--port", str(free_port()))
    yield started
    if started.process.poll() is None:
        for process in started.family():
            process.kill()
        started.process.wait()


def left(family: set[psutil.Process]) -> list[str]:
    return [str(process) for process in family if process.is_running()]


def test_run_serves_and_leaves_no_process(run: Run, environment: dict[str, str]) -> None:
    service = run.until(r"^Service +(http://127\.0\.0\.1:\d+)$")[1]
    page = run.until(r"^Page +(\S+)$")[1]
    assert run.until(r"^API docs +(\S+)$")[1] == f"{service}/docs"
    dashboard = run.until(r"^Dashboard +(http://127\.0\.0\.1:\d+)")[1]
    token = run.until(r"^Token +(t5s_\S+)$")[1]
    assert page == f"{service}/#token={token}"
    curl = run.until(r"^curl .*$")[0]
    run.until(r"^first summary \d+\.\d s after start$")

    pasted = subprocess.run(["bash", "-c", curl], capture_output=True, timeout=TIMEOUT_S)
    answer = json.loads(pasted.stdout)
    assert answer["model"]["name"] == "demo"
    assert answer["summary"].strip()

    url = ["--url", service]
    summarized = subprocess.run(
        [*COMMAND, "summarize", "-", *url],
        env=environment,
        input=TEXT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (summarized.returncode, summarized.stderr) == (0, "")
    whole = subprocess.run(
        [*COMMAND, "summarize", "-", *url, "--json", "--no-stream"],
        env=environment,
        input=TEXT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert summarized.stdout == json.loads(whole.stdout)["summary"] + "\n"

    refused = subprocess.run(
        [*COMMAND, "summarize", "-", *url, "--token", "t5s_wrong"],
        env=environment,
        input=TEXT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("t5-serve: Unauthorized: ")

    # Ray runs any code that it is sent: without Ray's own token nobody may send any.
    jobs = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{dashboard}/api/jobs/"]
    assert subprocess.run(jobs, capture_output=True, text=True).stdout == "401"

    family = run.family()
    names = " ".join(name for process in family for name in process.cmdline()[:1])
    for part in ("raylet", "gcs_server", "ray::ServeReplica:default:Summarizer"):
        assert part in names
    run.process.send_signal(signal.SIGINT)
    assert run.ended() == 0
    assert left(family) == []
    assert left(session(environment)) == []
    assert [line for line in run.said if not line.startswith("{")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_it_starts_and_stops_leave_no_process(
    run: Run, environment: dict[str, str], number: signal.Signals
) -> None:
    # In the middle of the start: Ray's own processes are up, the service is not.
    family: set[psutil.Process] = set()
    while not any("raylet" in process.name() for process in alive(family)):
        assert run.process.poll() is None, run.said
        family |= run.family()
    run.process.send_signal(number)
    run.process.send_signal(number)
    assert run.ended() == 0
    assert left(family) == []
    assert left(session(environment)) == []
    assert not [line for line in run.said if "Traceback" in line]


def alive(family: set[psutil.Process]) -> list[psutil.Process]:
    return [process for process in family if process.is_running()]


def test_serves_spans_and_ours_are_one_tree_and_our_log_is_on_the_terminal(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with collector() as taken:
        settings = tmp_path / "settings.yaml"
        settings.write_text(f"tracing: {taken.url}\nauth: 'off'\n")
        serves = {
            "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "serve_app.tracing.serve:span_processors",
            "RAY_SERVE_TRACING_SAMPLING_RATIO": "1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": taken.url,
            "OTEL_SERVICE_NAME": "ray-serve",
        }
        arguments = ["--config", str(settings), "--port", str(free_port())]
        run = Run({**environment, **serves}, *arguments)
        try:
            run.until(r"^first summary \d+\.\d s after start$")

            def above() -> list[tuple[str, str]] | None:
                """The spans above the request's own, once all are there."""
                by_id = {span.id: span for span in taken.spans()}
                found = [s for s in by_id.values() if s.name == "POST /v1/summarize"]
                above = []
                while found and found[-1].parent in by_id:
                    found.append(by_id[found[-1].parent])
                    above.append((found[-1].service, found[-1].name.split(" ")[0]))
                return above if found and not found[-1].parent else None

            deadline = time.monotonic() + TIMEOUT_S
            while (spans := above()) is None and time.monotonic() < deadline:
                time.sleep(0.1)
            assert spans == [
                ("ray-serve", "replica_handle_request"),
                ("ray-serve", "route_to_replica"),
                ("ray-serve", "proxy_http_request"),
            ]
            assert any('"message": "engine ready"' in line for line in run.said)
        finally:
            run.process.send_signal(signal.SIGINT)
            assert run.ended() == 0


def test_once_stops_by_itself(environment: dict[str, str]) -> None:
    started = Run(environment, "--port", str(free_port()), "--auth", "off", "--once")
    curl = started.until(r"^curl .*$")[0]
    assert "Authorization" not in curl
    started.until(r"^first summary ")
    family = started.family()
    assert started.ended() == 0
    assert left(family) == []


def test_more_replicas_than_the_machine_has_room_for_are_refused(
    environment: dict[str, str],
) -> None:
    started = Run(environment, "--port", str(free_port()), "--replicas", "1000")
    assert started.ended() == 2
    assert "1000" in started.said[-1]
    assert "CPUs" in started.said[-1]
    assert left(session(environment)) == []
