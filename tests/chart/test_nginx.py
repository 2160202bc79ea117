"""The VirtualServer's directives in a real NGINX, asked by a real client.

The ingress controller itself cannot be had here. What it generates of a VirtualServer with an
apiKey and a rateLimit policy on a route is written down in `configuration` (its template
`nginx.virtualserver.tmpl`, version 5.5); the snippets come from the chart, as rendered.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.usage.reader import Tally, read_files
from serve_app.usage.views import Usage
from tests.chart.conftest import INGRESS, Object, Rendered, missing

BODY_LIMIT = 4096
KEYS = {"shop.0123abcd": "t5s_first", "shop.89ef4567": "t5s_second", "job.11111111": "t5s_job"}
RATE = {"rate": "6r/m", "burst": 3}

# The controller's check: SHA-256 of the header, looked up in a map of names.
NJS = """
import crypto from 'crypto';
function hash(r) {
    return crypto.createHash('sha256').update(r.variables.header_query_value).digest('hex');
}
function validate(r) {
    if (!r.variables.header_query_value) { r.return(401); return; }
    r.return(r.variables[r.variables.apikey_auth_local_map] ? 204 : 403);
}
export default { hash, validate };
"""


class Service(BaseHTTPRequestHandler):
    """Stands for the service: says what reached it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def do_GET(self) -> None:
        if self.path == "/v1/stream":
            self._stream()
            return
        status = int(self.path.rpartition("/own/")[2]) if "/own/" in self.path else 200
        data = json.dumps(
            {"from": "service", "headers": [list(one) for one in self.headers.items()]}
        ).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        # As Serve's proxy does.
        self.send_header("X-Request-Id", self.headers.get("X-Request-Id", "none"))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(3):
            event = f"data: {number}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            time.sleep(0.4)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        pass


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def indented(text: str) -> str:
    return "\n".join(f"        {line}" for line in text.splitlines())


def location(route: Object, policies: dict[str, Object]) -> str:
    path = route["path"].replace("=/", "= /") if route["path"].startswith("=") else route["path"]
    action = route["action"]
    if "return" in action:
        made = action["return"]
        return (
            f"    location {path} {{\n        default_type {made['type']};\n"
            f'        return {made["code"]} "{made["body"]}";\n    }}\n'
        )
    lines = [indented(route["location-snippets"])]
    for policy in route.get("policies", []):
        spec = policies[policy["name"]]
        if "rateLimit" in spec:
            limit = spec["rateLimit"]
            zone = policy["name"].replace("-", "_")
            status = f"        limit_req_status {limit['rejectCode']};"
            if status not in lines:
                lines.append(status)
            lines.append(f"        limit_req zone={zone} burst={limit['burst']} nodelay;")
        if "apiKey" in spec:
            lines.append(
                '        set $apikey_auth_local_map "apikeys";\n'
                "        set $header_query_value $http_authorization;\n"
                "        set $apikey_auth_token $apikey_auth_hash;\n"
                "        auth_request /_validate_apikey_njs;\n"
                "        set $apikey_client_name $apikeys;"
            )
    return f"    location {path} {{\n" + "\n".join(lines) + "\n@UPSTREAM@    }\n"


def zone(name: str, limits: dict[str, Object]) -> str:
    """A rate limit's zone. One with a condition counts only the requests that it is for."""
    limit = limits[name]
    key = limit["key"].replace("{", "").replace("}", "")
    condition = limit.get("condition")
    maps = ""
    if condition is not None:
        tiers = [one["condition"] for one in limits.values() if "condition" in one]
        matches = [one["variables"][0]["match"] for one in tiers if not one.get("default")]
        default, matching = (key, '""') if condition.get("default") else ('""', key)
        if not condition.get("default"):
            matches = [condition["variables"][0]["match"]]
        cases = "".join(f'    "{match}" {matching};\n' for match in matches)
        maps = f"map {key} ${name}_key {{\n    default {default};\n{cases}}}\n"
        key = f"${name}_key"
    return f"{maps}limit_req_zone {key} zone={name}:1m rate={limit['rate']};\n"


def configuration(
    release: Rendered,
    port: int,
    service: int,
    folder: Path,
    module: Path,
    clients: dict[str, str] = KEYS,
) -> str:
    spec = release.one("VirtualServer")["spec"]
    policies = {one["metadata"]["name"]: one["spec"] for one in release.all("Policy")}
    [upstream] = spec["upstreams"]
    limits = {
        name.replace("-", "_"): held["rateLimit"]
        for name, held in policies.items()
        if "rateLimit" in held
    }
    zones = "".join(zone(name, limits) for name in limits)
    keys = "".join(
        f'    "{hashlib.sha256(f"Bearer {token}".encode()).hexdigest()}" "{name}";\n'
        for name, token in clients.items()
    )
    pass_on = (
        f"        proxy_connect_timeout {upstream['connect-timeout']};\n"
        f"        proxy_read_timeout {upstream['read-timeout']};\n"
        f"        client_max_body_size {upstream['client-max-body-size']};\n"
        f"        proxy_buffering {'on' if upstream['buffering'] else 'off'};\n"
        "        proxy_http_version 1.1;\n"
        "        proxy_set_header Host $host;\n"
        f"        proxy_next_upstream {upstream['next-upstream']};\n"
        f"        proxy_pass http://127.0.0.1:{service};\n"
    )
    locations = "".join(location(one, policies) for one in spec["routes"])
    user = "user root;\n" if os.geteuid() == 0 else ""
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return (
        f"load_module {module};\n{user}daemon off;\nworker_processes 1;\npid {folder}/pid;\n"
        "events {}\nhttp {\nerror_log stderr error;\nmap_hash_bucket_size 256;\n"
        f"js_path {folder};\njs_import apikey_auth from apikey_auth.js;\n"
        f"js_set $apikey_auth_hash apikey_auth.hash;\n{temporary}"
        f'map $apikey_auth_token $apikeys {{\n    default "";\n{keys}}}\n'
        f"{spec['http-snippets']}\n{zones}"
        f"server {{\n    listen 127.0.0.1:{port};\n    server_name {spec['host']};\n"
        "    location = /_validate_apikey_njs {\n        internal;\n"
        "        js_content apikey_auth.validate;\n    }\n"
        f"{spec['server-snippets']}\n"
        f"{locations.replace('@UPSTREAM@', pass_on)}}}\n}}\n"
    )


@dataclass
class Edge:
    client: httpx.Client
    log: Path
    stop_service: Callable[[], None]

    def post(self, path: str, token: str | None = None, **options: Any) -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        headers |= options.pop("headers", {})
        return self.client.post(path, headers=headers, **options)

    def logged(self, request_id: str) -> Object:
        """The access log's line of a request."""
        for _ in range(50):
            for line in self.log.read_text().splitlines():
                if line.startswith("{") and json.loads(line)["request_id"] == request_id:
                    return json.loads(line)
            time.sleep(0.05)
        raise AssertionError(f"no line of {request_id}")


def installed() -> tuple[str, Path]:
    """NGINX and its JavaScript module, of the system or a folder in NGINX_ROOT."""
    root = Path(os.environ.get("NGINX_ROOT", "/"))
    program = root / "usr/sbin/nginx"
    found = str(program) if program.exists() else shutil.which("nginx")
    module = root / "usr/lib/nginx/modules/ngx_http_js_module.so"
    if found is None or not module.exists():
        missing("no NGINX with its njs module: apt-get install nginx libnginx-mod-http-js")
    assert found is not None
    return found, module.absolute()


@contextmanager
def running(program: str, text: str, port: int, folder: Path) -> Iterator[Path]:
    """NGINX with this configuration, listening on this port; gives what it logs."""
    (folder / "apikey_auth.js").write_text(NJS)
    config, log = folder / "nginx.conf", folder / "stdout"
    config.write_text(text)
    with log.open("wb") as out, (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [program, "-e", "stderr", "-c", config], stdout=out, stderr=errors
        )
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "stderr").read_text()
            time.sleep(0.05)
        yield log
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def edge(render: Callable[..., Rendered], tmp_path: Path) -> Iterator[Edge]:
    program, module = installed()
    values = {
        "ingress": {**INGRESS["ingress"], "rateLimit": RATE},
        "limits": {"body_bytes": BODY_LIMIT},
    }
    service = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    port = free_port()
    text = configuration(render(values), port, service.server_port, tmp_path, module)
    base = f"http://127.0.0.1:{port}"
    try:
        with (
            running(program, text, port, tmp_path) as log,
            httpx.Client(base_url=base, headers={"Host": "summarize.example.com"}) as client,
        ):
            yield Edge(client, log, service.server_close)
    finally:
        service.shutdown()
        thread.join()
        service.server_close()


def problem(response: httpx.Response, status: int, kind: str) -> Object:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    document: Object = response.json()
    assert document["status"] == status
    assert document["type"] == f"urn:t5-serve:problem:{kind}"
    assert response.headers.get_list("x-request-id") == [document["request_id"]]
    return document


def test_only_a_known_key_gets_through(edge: Edge) -> None:
    missing_key = edge.post("/v1/summarize")
    problem(missing_key, 401, "unauthorized")
    assert missing_key.headers["www-authenticate"] == 'Bearer realm="t5-serve"'
    wrong = edge.post("/v1/summarize", "t5s_wrong")
    problem(wrong, 403, "forbidden")
    assert 'error="invalid_token"' in wrong.headers["www-authenticate"]
    assert edge.post("/v1/summarize", "t5s_job").json()["from"] == "service"


def test_both_keys_of_a_client_mean_that_client(edge: Edge) -> None:
    for token, key in (("t5s_first", "shop.0123abcd"), ("t5s_second", "shop.89ef4567")):
        response = edge.post("/v1/summarize", token)
        sent = dict(response.json()["headers"])
        assert sent["X-Api-Client"] == "shop"
        line = edge.logged(response.headers["x-request-id"])
        assert (line["client"], line["api_key"], line["status"]) == ("shop", key, 200)


def test_what_a_client_could_spoof_is_replaced(edge: Edge) -> None:
    spoofed = {
        "X-Api-Client": "admin",
        "X-Request-Timeout-Seconds": "1",
        "X-Request-Disconnect-Disabled": "true",
        "serve_multiplexed_model_id": "other",
    }
    received = edge.post("/v1/summarize", "t5s_job", headers=spoofed).json()["headers"]
    names = [name.lower() for name, _ in received]
    assert [value for name, value in received if name == "X-Api-Client"] == ["job"]
    for name in ("authorization", *(one.lower() for one in spoofed if one != "X-Api-Client")):
        assert name not in names
    page = edge.client.get("/", headers=spoofed).json()["headers"]
    assert "x-api-client" not in [name.lower() for name, _ in page]


def test_a_request_id_goes_from_end_to_end(edge: Edge) -> None:
    given = edge.post("/v1/summarize", "t5s_job", headers={"X-Request-Id": "trace-1"})
    assert dict(given.json()["headers"])["X-Request-Id"] == "trace-1"
    assert given.headers["x-request-id"] == "trace-1"
    assert edge.logged("trace-1")["path"] == "/v1/summarize"
    refused = edge.post("/v1/summarize", headers={"X-Request-Id": "trace-2"})
    assert problem(refused, 401, "unauthorized")["request_id"] == "trace-2"
    bad = edge.post("/v1/summarize", "t5s_job", headers={"X-Request-Id": 'a b"c'})
    assert re.fullmatch(r"[0-9a-f]{32}", bad.headers["x-request-id"])


def test_a_trace_goes_through(edge: Edge) -> None:
    trace = {
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "tracestate": "a=b",
    }
    reached = dict(edge.post("/v1/summarize", "t5s_job", headers=trace).json()["headers"])
    assert trace.items() <= {name.lower(): value for name, value in reached.items()}.items()


def test_a_body_above_the_limit_is_refused_with_its_limit(edge: Edge) -> None:
    assert edge.post("/v1/summarize", "t5s_job", content=b"x" * BODY_LIMIT).status_code == 200
    above = edge.post("/v1/summarize", "t5s_job", content=b"x" * (BODY_LIMIT + 1))
    [error] = problem(above, 413, "body-too-large")["errors"]
    assert (error["field"], error["limit"]) == ("body", BODY_LIMIT)


def test_each_client_has_its_own_rate(edge: Edge) -> None:
    answers = [edge.post("/v1/summarize", "t5s_first") for _ in range(6)]
    # One, and a burst of three; the next may come ten seconds later.
    assert [one.status_code for one in answers] == [200] * 4 + [429] * 2
    problem(answers[-1], 429, "rate-limited")
    assert answers[-1].headers["retry-after"] == "10"
    assert edge.post("/v1/summarize", "t5s_job").status_code == 200
    # Those without a key share a bucket, which is not that of any client.
    assert edge.post("/v1/summarize").status_code == 401


@pytest.mark.parametrize("status", [401, 403, 413, 429, 500, 503, 504])
def test_the_services_own_errors_pass_as_they_are(edge: Edge, status: int) -> None:
    response = edge.post(f"/v1/own/{status}", "t5s_job")
    assert response.status_code == status
    assert response.json()["from"] == "service"


def test_streams_arrive_event_by_event(edge: Edge) -> None:
    arrivals: list[float] = []
    headers = {"Authorization": "Bearer t5s_job"}
    with edge.client.stream("GET", "/v1/stream", headers=headers) as response:
        for chunk in response.iter_raw():
            arrivals += [time.monotonic()] * chunk.count(b"data:")
    assert len(arrivals) == 3
    assert arrivals[2] - arrivals[0] > 0.5


def test_the_page_is_open_and_serves_own_paths_are_not_there(edge: Edge) -> None:
    for path in ("/", "/static/app.js", "/docs", "/docs-static/x.js", "/openapi.json"):
        assert edge.client.get(path).json()["from"] == "service", path
    for path in ("/healthz", "/readyz", "/v1/models", "/docs/x"):
        assert edge.client.get(path).status_code in (401, 429), path
    hidden = edge.client.get("/-/routes", headers={"Authorization": "Bearer t5s_job"})
    assert hidden.status_code == 404
    assert hidden.json()["type"] == "urn:t5-serve:problem:not-found"


def test_a_service_that_is_gone_is_a_problem_document(edge: Edge) -> None:
    edge.stop_service()
    problem(edge.post("/v1/summarize", "t5s_job"), 502, "unavailable")


def test_the_reports_on_usage_read_what_nginx_logs(edge: Edge, tmp_path: Path) -> None:
    edge.post("/v1/summarize")
    edge.post("/v1/summarize", "t5s_wrong", headers={"User-Agent": 'a "quoted" \\ agent'})
    edge.post("/v1/summarize", "t5s_job", content=b"x" * (BODY_LIMIT + 1))
    for number in range(5):
        edge.post("/v1/summarize", "t5s_first", headers={"X-Request-Id": f"shop-{number}"})
    edge.logged("shop-4")
    event = {
        "time": "2026-11-23T10:00:00.000Z", "message": "request", "source": "service",
        "schema_version": 1, "request_id": "shop-0", "client": "shop", "status": 200,
        "route": "/v1/summarize", "total_ms": 7.0, "compute_ms": 5.0,
    }  # fmt: skip
    events = tmp_path / "usage.jsonl"
    events.write_text(json.dumps(event))
    tally = Tally()
    usage = Usage(read_files([edge.log, events], tally))
    assert tally.broken_lines == 0
    rows = usage.report("requests").records()
    seen = sorted(
        (row["status"], row["client"] or "-", row["error_type"] or "-", row["source"])
        for row in rows
        if not row["auth_failure"]
    )
    # 6 a minute with 3 more at once: the fifth is refused. What is too large is refused before its
    # key is looked at.
    assert seen == [
        (200, "shop", "-", "nginx"),
        (200, "shop", "-", "nginx"),
        (200, "shop", "-", "nginx"),
        (200, "shop", "-", "service"),
        (413, "-", "body-too-large", "nginx"),
        (429, "shop", "rate-limited", "nginx"),
    ]
    failures = usage.report("auth_failures").records()
    assert [(one["status"], one["address"]) for one in failures] == [
        (401, "127.0.0.1"),
        (403, "127.0.0.1"),
    ]
    [joined] = [row for row in rows if row["source"] == "service"]
    assert (joined["total_ms"], joined["address"]) == (7.0, "127.0.0.1")


def raw(edge: Edge, head: str, body: str = "") -> tuple[int, str]:
    """Status and rest of the answer to bytes that no client library would send."""
    address = edge.client.base_url
    with socket.create_connection((address.host, address.port or 80), 60) as connection:
        with suppress(ConnectionError):  # it need not read to the end
            connection.sendall(f"{head}\r\nConnection: close\r\n\r\n{body}".encode())
        pieces = []
        with suppress(ConnectionResetError):
            while piece := connection.recv(65_536):
                pieces.append(piece)
    answer = b"".join(pieces).decode()
    return int(answer.split(" ", 2)[1]), answer


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        pytest.param("/", f"X-A: {'a' * 65_536}", 400, id="a long header"),
        pytest.param(
            "/", "\r\n".join(f"X-{n}: y" for n in range(100_000)), 400, id="100,000 headers"
        ),
        pytest.param(f"/{'a' * 65_536}", "X-A: b", 414, id="a long path"),
        pytest.param(
            "/", "Content-Length: 5\r\nTransfer-Encoding: chunked", 400, id="length and chunks"
        ),
        pytest.param("/", "Content-Length: 5\r\nContent-Length: 6", 400, id="two lengths"),
        pytest.param("/", "Host: another.example.com", 400, id="two hosts"),
        pytest.param("/", "Content-Length : 5", 400, id="space before the colon"),
    ],
)
def test_what_serves_proxy_has_no_bound_for_stops_here(
    edge: Edge, path: str, headers: str, status: int
) -> None:
    got, answer = raw(edge, f"POST {path} HTTP/1.1\r\nHost: summarize.example.com\r\n{headers}")
    assert got == status
    assert '"from"' not in answer  # the service was not asked


def test_headers_after_a_body_are_no_headers(edge: Edge) -> None:
    head = (
        "POST /v1/summarize HTTP/1.1\r\nHost: summarize.example.com\r\n"
        "Authorization: Bearer t5s_job\r\nTransfer-Encoding: chunked\r\nTrailer: X-Api-Client"
    )
    status, answer = raw(edge, head, "2\r\n{}\r\n0\r\nX-Api-Client: shop\r\n\r\n")
    assert status == 200
    seen = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])["headers"]
    assert [value for name, value in seen if name.lower() == "x-api-client"] == ["job"]
