"""`make audit`: the real pip-audit, and a service of advisories of our own for it to ask."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.ci.conftest import ROOT, Pipeline

LOCK = ROOT / "requirements.lock"
SHA = "0" * 64
ADVISORY = {
    "id": "PYSEC-2026-1",
    "summary": "It can be made to wait for ever.",
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "lampreader"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.0.1"}]}],
            "versions": ["1.0.0"],
        }
    ],
}


class Advisories(BaseHTTPRequestHandler):
    """Answers as OSV does; knows one advisory."""

    asked: list[str]

    def do_POST(self) -> None:
        asked: Any = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, version = asked["package"]["name"], asked["version"]
        self.asked.append(name)
        known = (name, version) == ("lampreader", "1.0.0")
        data = json.dumps({"vulns": [ADVISORY]} if known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def advisories() -> Iterator[str]:
    Advisories.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    thread.join()
    server.server_close()


def options(url: str) -> list[str]:
    return ["--vulnerability-service=osv", f"--osv-url={url}", "--timeout=60"]


def lock(folder: Path, *pins: str) -> str:
    path = folder / "some.lock"
    path.write_text("".join(f"{pin} --hash=sha256:{SHA}\n" for pin in pins))
    return str(path)


def test_all_that_is_locked_is_asked_about(pipeline: Pipeline, advisories: str) -> None:
    done = pipeline.script("audit", *options(advisories))
    assert done.returncode == 0, done.stderr
    # But what the lock has for other systems.
    locked = {line.split("==")[0] for line in LOCK.read_text().splitlines() if "==" in line}
    asked = set(Advisories.asked)
    assert asked <= locked
    assert {"ray", "torch", "fastapi", "uvicorn", "safetensors"} <= asked


def test_a_known_vulnerability_fails(pipeline: Pipeline, advisories: str, tmp_path: Path) -> None:
    found = lock(tmp_path, "lampreader==1.0.0", "otterbak==2.0")
    done = pipeline.script("audit", *options(advisories), LOCK=found)
    assert done.returncode == 1
    assert "PYSEC-2026-1" in done.stdout
    assert "1.0.1" in done.stdout
    mended = lock(tmp_path, "lampreader==1.0.1", "otterbak==2.0")
    assert pipeline.script("audit", *options(advisories), LOCK=mended).returncode == 0


def test_a_lock_without_hashes_cannot_be_checked(
    pipeline: Pipeline, advisories: str, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.lock"
    bare.write_text("lampreader==1.0.1\n")
    done = pipeline.script("audit", *options(advisories), LOCK=str(bare))
    assert done.returncode == 2
    assert "hash" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_service_that_is_not_there_is_told_in_one_line(
    pipeline: Pipeline, advisories: str, tmp_path: Path
) -> None:
    pins = lock(tmp_path, "lampreader==1.0.1")
    # Port 9 is nobody's here.
    done = pipeline.script("audit", *options("http://127.0.0.1:9/v1/query"), LOCK=pins)
    assert done.returncode == 3
    said = "audit: no service of advisories can be reached; nothing was checked\n"
    assert done.stderr == said
    asked = " ".join(options("http://127.0.0.1:9/v1/query"))
    # The environment is the one that this test runs in.
    kept = "--old-file=.venv/.installed"
    made = pipeline.command("make", kept, "audit", f"ARGS={asked}", LOCK=pins)
    first, last = made.stderr.splitlines()
    assert f"{first}\n" == said
    assert last.endswith("audit] Error 3")
    assert Advisories.asked == []
