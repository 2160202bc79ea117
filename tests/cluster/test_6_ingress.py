"""Clients through the real ingress controller.

It is not built here (its releases are no Go modules), so it comes as an image archive:

    T5_NGINX_INGRESS_IMAGE=/path/archive.tar    (OCI or Docker, of version 5.5 or newer)
    T5_NGINX_INGRESS_CHART=/path/nginx-ingress  (its chart)
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster import kube, machine
from tests.cluster.components import ROOT
from tests.cluster.load import TEXT, Load
from tests.cluster.release import NGINX_CRDS, Release

IMAGE = os.environ.get("T5_NGINX_INGRESS_IMAGE", "")
CONTROLLER_CHART = os.environ.get("T5_NGINX_INGRESS_CHART", "")
HOST = "summarize.example.com"
CONTROLLER = "nginx-ingress"
BODY_LIMIT = 100_000
_RATE = 8.0  # requests per second

pytestmark = pytest.mark.skipif(
    not (IMAGE and CONTROLLER_CHART and NGINX_CRDS.is_dir()),
    reason="needs the ingress controller: T5_NGINX_INGRESS_IMAGE, T5_NGINX_INGRESS_CHART and its "
    "CRDs; without it the same directives are tested in a plain NGINX (tests/chart/test_nginx.py)",
)

_SETTINGS = (
    f"--set=ingress.enabled=true,ingress.host={HOST},limits.body_bytes={BODY_LIMIT}",
    "--set=ingress.rateLimit.rate=30r/m,ingress.rateLimit.burst=5",
    "--set=ingress.rateLimit.tiers[0].name=heavy,ingress.rateLimit.tiers[0].match=load",
    "--set=ingress.rateLimit.tiers[0].rate=1200r/m,ingress.rateLimit.tiers[0].burst=100",
)


def _controller(*arguments: object) -> str:
    return kube.kubectl(*arguments, namespace=CONTROLLER)


@pytest.fixture(scope="module")
def edge(release: Release, figure: Callable[[str, str], None]) -> Iterator[httpx.Client]:
    """A client of the controller's Service, for the release's host."""
    reference = json.loads(
        subprocess.run(
            ["tar", "-xOf", IMAGE, "index.json"], check=True, capture_output=True, text=True
        ).stdout
    )["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"]
    if not machine.has_image(reference):
        machine.load(Path(IMAGE))
    repository, _, tag = reference.rpartition(":")
    kube.kubectl("apply", "--server-side", "--filename", NGINX_CRDS, namespace="default")
    kube.run(
        kube.HELM, "upgrade", "--install", CONTROLLER, CONTROLLER_CHART, "--skip-crds",
        "--skip-schema-validation", "--namespace", CONTROLLER, "--create-namespace",
        "--values", ROOT / "helm" / "nginx-ingress" / "values.yaml",
        "--set", f"controller.image.repository={repository},controller.image.tag={tag}",
        "--set", "controller.image.pullPolicy=Never,controller.replicaCount=1",
        # No such operators and no load balancers here.
        "--set", "controller.enableCertManager=false,controller.enableExternalDNS=false",
        "--set", "controller.service.type=ClusterIP,controller.podDisruptionBudget.enabled=false",
        "--set", "controller.service.externalTrafficPolicy=",
        "--set", "controller.resources.requests.cpu=50m",
    )  # fmt: skip
    _controller("rollout", "status", f"deployment/{CONTROLLER}-controller", "--timeout=180s")
    began = time.monotonic()
    release.upgrade(*_SETTINGS)
    kube.until("the service is up", kube.serving, 420)
    state = "--output=jsonpath={.status.state}"
    kube.until(
        "NGINX took the host over",
        lambda: kube.kubectl("get", "virtualserver", kube.RELEASE, state) == "Valid",
    )
    figure("ingress switched on (a new cluster)", f"{time.monotonic() - began:.0f} s")
    address = "--output=jsonpath={.spec.clusterIP}"
    service = _controller("get", "service", f"{CONTROLLER}-controller", address)
    with httpx.Client(base_url=f"http://{service}", headers={"Host": HOST}, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def key(edge: httpx.Client, release: Release) -> str:
    """Of a client, once NGINX knows it."""
    token = release.tokens("create", "shop", secret="api-keys")
    kube.until("NGINX knows the key", lambda: _ask(edge, token).status_code == 200, 60)
    return token


def _ask(edge: httpx.Client, token: str | None = None, **more: Any) -> httpx.Response:
    headers = dict(more.pop("headers", {}))
    if token:
        headers["Authorization"] = f"Bearer {token}"
    more.setdefault("json", {"text": TEXT})
    return edge.post("/v1/summarize", headers=headers, **more)


def _problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["type"] == f"urn:t5-serve:problem:{kind}"
    assert answer.headers.get_list("x-request-id") == [document["request_id"]]
    return document


def _rest() -> None:
    time.sleep(12)  # the bucket of 30 a minute with a burst of 5 empties


def test_policies_are_valid(edge: httpx.Client) -> None:
    states = {
        p["metadata"]["name"]: p["status"]["state"] for p in kube.items("policies.k8s.nginx.org")
    }
    assert states
    assert set(states.values()) == {"Valid"}, states


def test_missing_and_wrong_keys(edge: httpx.Client, key: str) -> None:
    _rest()
    _problem(_ask(edge), 401, "unauthorized")
    _problem(_ask(edge, "t5s_wrong"), 403, "forbidden")
    assert _ask(edge, key).json()["summary"].strip()


def test_a_spoofed_client_is_replaced_and_the_request_id_goes_through(
    edge: httpx.Client, key: str
) -> None:
    _rest()
    answer = _ask(edge, key, headers={"X-Api-Client": "admin", "X-Request-Id": "trace-edge-1"})
    assert answer.status_code == 200
    assert answer.headers.get_list("x-request-id") == ["trace-edge-1"]
    lines = []
    for pod in kube.names(kube.pods("api")):
        found = kube.execute(
            pod,
            "bash",
            "-c",
            "grep -h trace-edge-1 /var/log/t5-serve/usage-*.jsonl || true",
        )
        lines += [json.loads(line) for line in found.splitlines()]
    assert {line["client"] for line in lines if "client" in line} == {"shop"}
    access = _controller("logs", f"deployment/{CONTROLLER}-controller", "--tail=200")
    [edge_line] = [json.loads(x) for x in access.splitlines() if '"trace-edge-1"' in x]
    assert (edge_line["client"], edge_line["status"]) == ("shop", 200)
    assert edge_line["api_key"].startswith("shop.")


def test_a_large_body(edge: httpx.Client, key: str) -> None:
    _rest()
    [error] = _problem(_ask(edge, key, json={"text": "x" * BODY_LIMIT}), 413, "body-too-large")[
        "errors"
    ]
    assert (error["field"], error["limit"]) == ("body", BODY_LIMIT)
    assert (
        _ask(edge, key, json={"text": "word " * 15_000, "on_overflow": "truncate"}).status_code
        == 200
    )


def test_each_client_has_its_own_rate(edge: httpx.Client, key: str, release: Release) -> None:
    other = release.tokens("create", "job", secret="api-keys")
    kube.until("NGINX knows the key", lambda: _ask(edge, other).status_code == 200, 60)
    _rest()
    answers = [_ask(edge, key) for _ in range(8)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:6] == [200] * 6
    assert 429 in statuses
    refused = next(answer for answer in answers if answer.status_code == 429)
    _problem(refused, 429, "rate-limited")
    assert refused.headers["retry-after"] == "2"
    assert _ask(edge, other).status_code == 200


def test_streams_are_not_buffered(edge: httpx.Client, key: str) -> None:
    _rest()
    body = {"text": (TEXT + " ") * 300, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    sent = time.monotonic()
    with edge.stream("POST", "/v1/summarize", json=body, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [
            (time.monotonic(), line.removeprefix("event:").strip())
            for line in answer.iter_lines()
            if line.startswith("event:")
        ]
    kinds = [kind for _, kind in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert kinds.count("chunk") > 5
    # Buffered, the first would come with the last. (Parts are done together, or nearly so.)
    assert events[0][0] - sent < (events[-1][0] - sent) / 2


def test_a_revoked_key(edge: httpx.Client, key: str, release: Release) -> None:
    _rest()
    release.tokens("revoke", "shop", secret="api-keys")
    kube.until("NGINX forgot the key", lambda: _ask(edge, key).status_code == 403, 60, every=3)


def test_the_page_is_open_and_serves_own_paths_are_not(edge: httpx.Client) -> None:
    page = edge.get("/")
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]
    assert edge.get("/-/routes").json()["type"] == "urn:t5-serve:problem:not-found"
    assert edge.get("/v1/models").status_code == 401


def test_no_request_fails_when_an_api_replica_dies(
    edge: httpx.Client, release: Release, figure: Callable[[str, str], None]
) -> None:
    token = release.tokens("create", "load", secret="api-keys")
    kube.until("NGINX knows the key", lambda: _ask(edge, token).status_code == 200, 60)
    before = kube.replicas("Api")
    victim = next(iter(before))
    with Load(str(edge.base_url).rstrip("/"), token, _RATE, HOST) as load:
        time.sleep(5)
        pod, number = victim.split("/")
        kube.execute(pod, "kill", "-9", number)
        kube.until(
            "another replica in its place",
            lambda: len(now := kube.replicas("Api")) == len(before) and victim not in now,
        )
        time.sleep(5)
    figure("Api replica killed, behind the ingress", load.summary())
    # Its tier lets it have more than the 30 a minute of others, and NGINX asked another pod.
    assert len(load.answers) > 60
    assert load.failed == []


def test_expired_keys_are_pruned(edge: httpx.Client, release: Release) -> None:
    release.tokens("create", "brief", "--expires", "1m", secret="api-keys")
    release.tokens("create", "steady", secret="api-keys")
    time.sleep(61)
    # What the CronJob does every five minutes.
    kube.kubectl("create", "job", "prune-now", f"--from=cronjob/{kube.RELEASE}-tokens")
    kube.kubectl("wait", "job/prune-now", "--for=condition=complete", "--timeout=120s")
    left = json.loads(release.tokens("list", "--json", secret="api-keys"))
    clients = {one["client"] for one in left}
    assert "brief" not in clients
    assert "steady" in clients


def test_the_dashboard_needs_its_password(
    edge: httpx.Client, release: Release, tmp_path: Path
) -> None:
    host = "ray.example.com"
    made = subprocess.run(
        ["openssl", "passwd", "-apr1", "secret"], check=True, capture_output=True, text=True
    )
    (tmp_path / "htpasswd").write_text(f"operator:{made.stdout}")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host}",
         "-keyout", tmp_path / "key", "-out", tmp_path / "crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    kube.kubectl(
        "create", "secret", "generic", "ray-dashboard", "--type=nginx.org/htpasswd",
        f"--from-file={tmp_path / 'htpasswd'}",
    )  # fmt: skip
    kube.kubectl(
        "create",
        "secret",
        "tls",
        "ray-tls",
        f"--cert={tmp_path / 'crt'}",
        f"--key={tmp_path / 'key'}",
    )
    cluster = kube.active_cluster()
    release.upgrade(
        *_SETTINGS,
        f"--set=ingress.dashboard.enabled=true,ingress.dashboard.host={host}",
        "--set=ingress.dashboard.basicAuthSecret=ray-dashboard,ingress.dashboard.tlsSecretName=ray-tls",
    )
    address = _controller(
        "get", "service", f"{CONTROLLER}-controller", "--output=jsonpath={.spec.clusterIP}"
    )
    template = "--output=go-template={{.data.auth_token | base64decode}}"
    rays = kube.kubectl("get", "secret", cluster, template)
    trust = ssl.create_default_context(cafile=tmp_path / "crt")
    with httpx.Client(base_url=f"https://{address}", headers={"Host": host}, verify=trust) as ray:
        names = {"sni_hostname": host}
        password = ("operator", "secret")

        def ask(path: str = "/", **more: Any) -> int:
            return ray.get(path, extensions=names, **more).status_code

        def login(token: str) -> httpx.Response:
            return ray.post(
                "/api/authenticate",
                headers={"Authorization": f"Bearer {token}"},
                extensions=names,
            )

        kube.until("the route is there", lambda: ask() == 401, 60)
        assert ask(auth=("operator", "wrong")) == 401
        assert ask(auth=password) == 200
        # The page then asks for Ray's own token, and keeps it in a cookie.
        state = "/api/serve/applications/"
        assert ask(state, auth=password) == 401
        assert login("wrong").status_code == 403
        answer = login(rays)
        assert answer.status_code == 200
        assert "; secure" in answer.headers["set-cookie"].lower()
        assert ask(state, auth=password) == 200
        assert ask(state) == 401
        plain = httpx.get(f"http://{address}/", headers={"Host": host})
        assert (plain.status_code, plain.headers["location"]) == (308, f"https://{host}/")
    assert kube.active_cluster() == cluster
