"""`scripts/deploy` before it does anything: wrong use, and how it gets into Argo CD.

What it does with an application is tested on a real Argo CD (tests/cluster/delivery). Here a small
server stands in for GitHub's token service and Argo CD's Dex, which this project cannot run.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "registry.example.com/t5-serve@sha256:" + "a" * 64
COMMIT = "b" * 40


class Edge(ThreadingHTTPServer):
    """Remembers what it was asked; knows the tokens `known`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.known = {"Bearer argo-token"}
        self.trees: list[tuple[int, dict[str, Any]]] = []  # answers, in turn

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Edge

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        address = urlsplit(self.path)
        request = {
            "path": address.path,
            "query": parse_qs(address.query),
            "authorization": self.headers.get("Authorization"),
            "form": parse_qs(self.rfile.read(length).decode()),
            "type": self.headers.get("Content-Type"),
        }
        self.server.asked.append(request)
        status, answer = 404, {"message": "there is no application here"}
        if address.path == "/github":
            status, answer = 200, {"value": "github-token"}
        elif address.path == "/api/dex/token":
            status, answer = 200, {"access_token": "argo-token"}
        elif address.path == "/api/v1/session/userinfo":
            known = request["authorization"] in self.server.known
            status, answer = 200, {"loggedIn": True} if known else {}
        elif address.path.endswith("/resource-tree"):
            status, answer = self.server.trees.pop(0)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer  # noqa: N815 (the base class names them)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def edge() -> Iterator[Edge]:
    server = Edge()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def deploy(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = arguments or (f"--image={IMAGE}", f"--values-revision={COMMIT}")
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "deploy", *given],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([f"--image={IMAGE}"], "--values-revision"),
        ([f"--values-revision={COMMIT}"], "--image"),
        (["--image=t5-serve:latest", f"--values-revision={COMMIT}"], "'t5-serve:latest'"),
        ([f"--image={IMAGE}", "--values-revision=main"], "'main'"),
        ([f"--image={IMAGE}", f"--values-revision={COMMIT}", "--file=none.yaml"], "none.yaml"),
        ([f"--image={IMAGE}", f"--values-revision={COMMIT}", "--speed=9"], "--speed"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], told: str) -> None:
    done = deploy(*arguments, ARGOCD_SERVER="x", ARGOCD_AUTH_TOKEN="x")
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_missing_settings_are_one_line() -> None:
    without_server = deploy()
    assert without_server.returncode == 2
    assert "ARGOCD_SERVER" in without_server.stderr
    without_token = deploy(ARGOCD_SERVER="argocd.example.com")
    assert without_token.returncode == 2
    assert "ARGOCD_AUTH_TOKEN" in without_token.stderr
    assert len(without_token.stderr.splitlines()) == 1


def test_githubs_token_is_exchanged(edge: Edge) -> None:
    deploy(
        ARGOCD_SERVER=edge.url,
        ACTIONS_ID_TOKEN_REQUEST_URL=f"{edge.url}/github?api-version=2",
        ACTIONS_ID_TOKEN_REQUEST_TOKEN="runner-token",
    )
    github, dex, first = edge.asked[:3]
    assert github["authorization"] == "Bearer runner-token"
    assert github["query"] == {"api-version": ["2"], "audience": [edge.url]}
    assert dex["path"] == "/api/dex/token"
    assert dex["authorization"] == "Basic " + base64.b64encode(b"argo-cd-cli:").decode()
    assert dex["type"] == "application/x-www-form-urlencoded"
    # RFC 8693, 2.1
    assert dex["form"]["grant_type"] == ["urn:ietf:params:oauth:grant-type:token-exchange"]
    assert dex["form"]["subject_token"] == ["github-token"]
    assert dex["form"]["subject_token_type"] == ["urn:ietf:params:oauth:token-type:id_token"]
    assert dex["form"]["connector_id"] == ["github-actions"]
    assert first["authorization"] == "Bearer argo-token"


def test_a_stored_token_goes_before(edge: Edge) -> None:
    deploy(
        ARGOCD_SERVER=edge.url,
        ARGOCD_AUTH_TOKEN="argo-token",
        ACTIONS_ID_TOKEN_REQUEST_URL=f"{edge.url}/github",
        ACTIONS_ID_TOKEN_REQUEST_TOKEN="runner-token",
    )
    assert {request["authorization"] for request in edge.asked} == {"Bearer argo-token"}


def test_a_token_that_argo_cd_does_not_know_ends_it(edge: Edge) -> None:
    done = deploy(ARGOCD_SERVER=edge.url, ARGOCD_AUTH_TOKEN="old")
    assert done.returncode == 1
    assert "ARGOCD_AUTH_TOKEN" in done.stderr
    assert "old" not in done.stderr
    assert [request["path"] for request in edge.asked] == ["/api/v1/session/userinfo"]


def test_a_server_that_is_not_there_is_one_line() -> None:
    done = deploy(ARGOCD_SERVER="http://127.0.0.1:9", ARGOCD_AUTH_TOKEN="x")
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def api(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`scripts/argocd_api.py` as a client of the stand-in; it does not wait between questions."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    module = importlib.import_module("argocd_api")
    monkeypatch.setattr(module.time, "sleep", lambda _seconds: None)
    return module.ArgoCD(edge.url, "argo-token")


def test_an_argo_cd_that_cannot_answer_for_a_while_is_asked_again(edge: Edge, api: Any) -> None:
    node = {"kind": "Pod", "name": "a"}
    edge.trees = [(500, {"message": "i/o timeout"}), (503, {}), (200, {"nodes": [node]})]
    assert api.pods("t5") == [node]
    assert edge.trees == []


def test_what_argo_cd_refuses_is_asked_once(edge: Edge, api: Any) -> None:
    edge.trees = [(403, {"message": "permission denied"}), (200, {})]
    with pytest.raises(Exception, match=r"permission denied \(HTTP 403"):
        api.pods("t5")
    assert len(edge.trees) == 1


@pytest.fixture
def pods(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `deploy` knows of the pods of IMAGE."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return runpy.run_path(str(ROOT / "scripts" / "deploy"))["Pods"](IMAGE)


def pod(name: str, reason: str, health: str = "Progressing", image: str = IMAGE) -> dict[str, Any]:
    """As Argo CD's resource tree has it."""
    return {
        "name": name,
        "images": [image],
        "health": {"status": health},
        "info": [{"name": "Status Reason", "value": reason}],
    }


def test_pods_that_go_with_the_old_cluster_have_not_failed(pods: Any) -> None:
    old = [pod(f"old-{n}", "Running") for n in range(5)]
    new = [pod("new", "Running")]
    pods.look(old, 0.0)
    pods.look([*old, *new], 10.0)
    assert pods.look([*(pod(one["name"], "Error", "Degraded") for one in old), *new], 90.0) == ""
    pods.look(new, 100.0)
    assert pods.failed == 0


def test_workers_that_ran_and_are_no_longer_needed_have_not_failed(pods: Any) -> None:
    pods.look([], 0.0)
    pods.look([pod(f"worker-{n}", "Running") for n in range(5)], 10.0)
    assert pods.look([pod(f"worker-{n}", "Error", "Degraded") for n in range(5)], 80.0) == ""
    pods.look([], 90.0)
    assert pods.failed == 0


def test_pods_that_end_as_often_as_they_are_made_have_failed(pods: Any) -> None:
    pods.look([pod("old", "Running")], 0.0)
    for n in range(3):
        pods.look([pod("old", "Running"), pod(f"head-{n}", "PodInitializing")], 3.0 * n)
    pods.look([pod("old", "Running"), pod("head-3", "Error", "Degraded")], 9.0)
    assert pods.failed == 4
    assert "head-" in pods.last


def test_a_pod_that_crashes_soon_after_it_ran_has_failed(pods: Any) -> None:
    pods.look([], 0.0)
    pods.look([pod("head", "Running")], 3.0)
    assert "head" in pods.look([pod("head", "CrashLoopBackOff", "Degraded")], 9.0)
    assert pods.failed == 1


def test_pods_of_another_image_are_not_looked_at(pods: Any) -> None:
    pods.look([], 0.0)
    assert pods.look([pod("other", "Error", "Degraded", "registry.example.com/x")], 3.0) == ""
