"""What a run of the whole service leaves behind: no token and no text in it, and no open port."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.conftest import until
from tests.integration.test_cli_run import ROOT, Run, free_port
from tests.texts import texts

SECRET = "Xylophonberg"
TEXT = f"{SECRET}. {texts(1)[0]}"
# What is looked for of the text: a part that no log could have from elsewhere.
PHRASE = texts(1)[0][:40]
WRONG = "t5s_" + "W" * 43

pytestmark = pytest.mark.timeout(600)


@dataclass
class Kept:
    """What there was to see while it ran, and the folder that has all its files."""

    folder: Path
    token: str
    rays_token: str
    errors: list[httpx.Response]
    metrics: str = ""
    command_lines: dict[int, str] = field(default_factory=dict)
    environments: dict[int, bytes] = field(default_factory=dict)
    listening: set[tuple[str, str]] = field(default_factory=set)  # process, address


def calls(url: str, token: str) -> list[httpx.Response]:
    """Requests of all kinds, good and bad. Gives the answers that are errors."""
    headers = {"Authorization": f"Bearer {token}"}
    bodies: list[tuple[str, Any, int]] = [
        ("/v1/summarize", {"text": TEXT}, 200),
        ("/v1/summarize", {"text": TEXT, "stream": True}, 200),
        ("/v1/summarize", {"text": TEXT * 30, "timeout_s": 0.001}, 408),
        ("/v1/summarize", {"text": TEXT, SECRET: 1}, 422),
        (f"/v1/summarize?{SECRET}={token}", {"text": TEXT, "num_beams": 99}, 422),
        ("/v1/summarize/batch", {"texts": [TEXT, ""]}, 200),
        ("/hf/summarization", {"inputs": TEXT, "parameters": {"top_k": 1}}, 422),
        (f"/v1/{token}", {"text": TEXT}, 404),
    ]
    found = []
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for path, body, status in bodies:
            answer = client.post(path, json=body, headers=headers)
            assert answer.status_code == status, answer.text
            found.append(answer)
        for given in (f"Bearer {WRONG}", f"Basic {token}", f"Bearer {token}x", token):
            answer = client.post(
                "/v1/summarize", json={"text": TEXT}, headers={"Authorization": given}
            )
            assert answer.status_code == 401
            found.append(answer)
    return [answer for answer in found if answer.is_error]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Not tmp_path: the paths of Ray's sockets must stay below 108 bytes.
    path = tempfile.mkdtemp(prefix="t5", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def kept(folder: Path) -> Iterator[Kept]:
    own = ("T5_SERVE", "RAY_")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(own)},
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),  # Ray's own token goes there
        "RAY_TMPDIR": str(folder),
        "T5_SERVE_TOKENS_FILE": f"{folder}/conf/tokens.json",
    }
    settings = folder / "settings.yaml"
    settings.write_text(json.dumps({"log": "DEBUG", "usage": {"folder": f"{folder}/usage"}}))
    run = Run(environment, "--port", str(free_port()), "--config", str(settings))
    try:
        url = run.until(r"^Service +(\S+)$")[1]
        token = run.until(r"^Token +(t5s_\S+)$")[1]
        run.until(r"^first summary")
        result = Kept(
            folder, token, (folder / ".ray" / "auth_token").read_text().strip(), calls(url, token)
        )
        for process in run.family():
            with suppress(psutil.Error, OSError):  # a worker that was not needed has gone
                look_at(process, result)
        result.metrics = until(lambda: metrics(folder), "metrics tell of the requests")
        run.process.send_signal(signal.SIGINT)
        assert run.ended() == 0
        (folder / "stderr").write_text("".join(run.said))
        yield result
    finally:
        if run.process.poll() is None:
            for process in run.family():
                process.kill()
            run.process.wait()


def look_at(process: psutil.Process, result: Kept) -> None:
    name = " ".join(process.cmdline())
    result.command_lines[process.pid] = name
    result.environments[process.pid] = Path(f"/proc/{process.pid}/environ").read_bytes()
    result.listening.update(
        (name, connection.laddr.ip.removeprefix("::ffff:"))  # IPv4 by an IPv6 socket
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    )


def metrics(folder: Path) -> str:
    """All pages of metrics that Ray has told Prometheus of, once they have the requests."""
    places = [
        target
        for path in folder.rglob("prom_metrics_service_discovery.json")
        for one in json.loads(path.read_text())
        for target in one["targets"]
    ]
    pages = "".join(
        httpx.get(f"http://{place}/metrics", timeout=30, trust_env=False).text for place in places
    )
    return pages if "t5_http_requests" in pages else ""


def files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if stat.S_ISREG(os.lstat(path).st_mode):
            yield path, path.read_bytes()


def test_nothing_that_is_left_has_the_token_or_the_text(kept: Kept) -> None:
    said = [kept.token.encode(), WRONG.encode(), SECRET.encode(), PHRASE.encode()]
    dev_token = kept.folder / "conf" / "dev-token"
    assert stat.S_IMODE(dev_token.stat().st_mode) == 0o600
    looked_at = 0
    for path, content in files(kept.folder):
        looked_at += 1
        found = [one for one in said if one in content]
        assert found == ([said[0]] if path == dev_token else []), path
    # Logs, usage events and sessions were among them.
    assert looked_at > 20
    events = b"".join(path.read_bytes() for path in (kept.folder / "usage").iterdir())
    assert events.count(b'"client":"dev"') + events.count(b'"client": "dev"') >= 8

    assert len(kept.environments) > 5
    for where, line in kept.command_lines.items():
        assert not any(one in line.encode() for one in said), (where, line)
        assert kept.rays_token not in line, where
    for where, content in kept.environments.items():
        assert not any(one in content for one in said), where
    assert "t5_http_requests" in kept.metrics
    assert not any(one in kept.metrics.encode() for one in said)


def test_no_error_tells_a_token(kept: Kept) -> None:
    assert {answer.status_code for answer in kept.errors} == {401, 404, 408, 422}
    for answer in kept.errors:
        told = answer.content + b"".join(name + value for name, value in answer.headers.raw)
        if answer.status_code != 404:  # which names the path that was asked for
            assert kept.token.encode() not in told
        assert WRONG.encode() not in told
        assert PHRASE.encode() not in told


def test_ray_listens_on_this_machine_only(kept: Kept) -> None:
    open_to_all = {
        name
        for name, address in kept.listening
        if not ipaddress.ip_address(address).is_loopback
        # Serve's replicas take calls on all interfaces, from those who have Ray's own token.
        and not name.startswith("ray::ServeReplica:")
    }
    listening = " ".join(name for name, _ in kept.listening)
    for part in ("gcs_server", "raylet", "dashboard"):
        assert part in listening
    assert open_to_all == set()
