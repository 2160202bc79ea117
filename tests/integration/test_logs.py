"""What a real service's processes write during requests: each line with an id, none with a text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.integration.conftest import Deploy, Service, until
from tests.texts import long_text, texts

SECRET = "Zanzibar"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@dataclass(frozen=True)
class Logs:
    """Ray's folder of logs, and the lines in it of one application's replicas."""

    folder: Path
    application: str

    def lines(self) -> Iterator[str]:
        """What its replicas wrote to stderr, without Ray's own two lines at its beginning."""
        for path in self.folder.glob("worker-*.err"):
            written = path.read_text(errors="replace").splitlines()
            if any(x.startswith(f":actor_name:ServeReplica:{self.application}:") for x in written):
                yield from (x for x in written if not re.match(r":(job_id|actor_name):", x))

    def about(self, request_id: str) -> list[dict[str, Any]]:
        """Its lines with a request's id."""
        found = [json.loads(line) for line in self.lines()]
        return [line for line in found if line.get("request_id") == request_id]


@pytest.fixture(scope="module")
def talkative(deploy: Deploy) -> Service:
    return deploy(
        "talkative",
        "/talkative",
        log={"level": "DEBUG"},
        model={"name": "demo", "max_input_tokens": 96},
        engine={"max_waiting_requests": 4},
    )


@pytest.fixture(scope="module")
def logs(talkative: Service) -> Logs:
    node = ray._private.worker._global_node
    return Logs(Path(node.get_session_dir_path()) / "logs", talkative.name)


def test_every_line_of_a_request_has_its_id_and_none_has_a_text(
    talkative: Service, logs: Logs
) -> None:
    text, long = f"{SECRET}. {texts(1)[0]}", f"{SECRET}. {long_text(2000)}"
    bodies: dict[str, tuple[str, Any, int]] = {
        "log-1": ("/v1/summarize", {"text": text}, 200),
        "log-2": ("/v1/summarize", {"text": text, "stream": True}, 200),
        "log-3": ("/v1/summarize", {"text": text, SECRET: SECRET}, 422),
        "log-4": ("/v1/summarize/batch", {"texts": [text] * 40}, 200),  # some find the queue full
        "log-5": ("/v1/summarize", {"text": long}, 503),
        "log-6": (f"/{SECRET}", {"text": text}, 404),
        "log-7": ("/hf/summarization", {"inputs": text, "parameters": {SECRET: 1}}, 422),
    }
    for request_id, (path, body, status) in bodies.items():
        headers = {"X-Request-Id": request_id, "traceparent": TRACE}
        answer = talkative.post(f"{path}?query={SECRET}", body, headers=headers)
        assert answer.status_code == status, answer.text
    summary = talkative.post("/v1/summarize", {"text": text}).json()["summary"]
    until(lambda: all(logs.about(request_id) for request_id in bodies), "all are logged")

    # One style: nothing but JSON objects, with the same four names.
    found = [json.loads(line) for line in logs.lines()]
    assert all(line.keys() >= {"time", "severity", "logger", "message"} for line in found)
    started = [line for line in found if line["message"] == "engine ready"]
    during = [line for line in found if line not in started]
    assert during
    assert [line for line in during if not line.get("request_id")] == []
    traced = [line for line in during if line["request_id"] in bodies]
    assert {line["trace_id"] for line in traced} == {TRACE.split("-")[1]}
    # Neither here nor in what Ray and Serve write of it.
    for path in logs.folder.rglob("*"):
        if path.is_file():
            written = path.read_text(errors="replace")
            for said in (SECRET, talkative.token, texts(1)[0][:40], summary):
                assert said not in written, path


def test_a_level_is_kept(deploy: Deploy) -> None:
    service = deploy("quiet", "/quiet", log={"level": "WARNING"})
    service.post("/v1/summarize", {"text": texts(1)[0]})
    node = ray._private.worker._global_node
    quiet = Logs(Path(node.get_session_dir_path()) / "logs", "quiet")
    assert list(quiet.lines()) == []
