"""What the installed gcloud would send to make cluster and GPU nodes, caught on this machine.

gcloud checks some of its flags only when it builds a request. It is pointed at a server here, with
no credentials and with a proxy that goes nowhere for all other addresses.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import ROOT

REFUSALS = {
    404: json.dumps({"error": {"code": 404, "message": "empty here", "status": "NOT_FOUND"}}),
    400: json.dumps({"error": {"code": 400, "message": "caught", "status": "INVALID_ARGUMENT"}}),
}


class Caught:
    """A server where nothing is and nothing can be made; it keeps what it was sent."""

    def __init__(self) -> None:
        caught = self
        self.bodies: dict[str, Any] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.refuse(404)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                caught.bodies[self.path.split("?")[0]] = json.loads(body)
                self.refuse(400)

            def refuse(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(REFUSALS[status])))
                self.end_headers()
                self.wfile.write(REFUSALS[status].encode())

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/"


@pytest.fixture
def caught() -> Iterator[Caught]:
    caught = Caught()
    thread = threading.Thread(target=caught.server.serve_forever)
    thread.start()
    yield caught
    caught.server.shutdown()
    thread.join()
    caught.server.server_close()


@pytest.fixture
def send(caught: Caught, tmp_path: Path) -> Any:
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not installed: it builds the requests that are looked at")
    token = tmp_path / "token"
    token.write_text("none")
    environment = {
        "PATH": f"{Path(gcloud).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(token),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
    }
    for service in ("CONTAINER", "SERVICEUSAGE"):
        environment[f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service}"] = caught.address

    def send(argv: list[str], to: str) -> Any:
        done = subprocess.run(
            argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert "caught" in done.stderr, done.stderr
        return caught.bodies[f"/v1/projects/my-project/locations/europe-west4/{to}"]

    return send


NODES = "t5-nodes@my-project.iam.gserviceaccount.com"
ZONES = ["europe-west4-a", "europe-west4-b", "europe-west4-c"]


def test_the_cluster_is_private_and_enforces_network_policies(
    send: Any, all_commands: list[list[str]]
) -> None:
    [create] = [argv for argv in all_commands if argv[1:4] == ["container", "clusters", "create"]]
    cluster = send(create, "clusters")["cluster"]
    assert cluster["networkConfig"] == {
        "datapathProvider": "ADVANCED_DATAPATH",
        "defaultEnablePrivateNodes": True,
    }
    assert cluster["controlPlaneEndpointsConfig"] == {
        "dnsEndpointConfig": {"allowExternalTraffic": True},
        "ipEndpointsConfig": {"enabled": False},
    }
    assert cluster["workloadIdentityConfig"] == {"workloadPool": "my-project.svc.id.goog"}
    logged = cluster["loggingConfig"]["componentConfig"]["enableComponents"]
    assert logged == ["SYSTEM_COMPONENTS", "WORKLOADS"]
    assert cluster["nodePoolDefaults"]["nodeConfigDefaults"]["gcfsConfig"] == {"enabled": True}
    assert cluster["locations"] == ZONES
    [pool] = cluster["nodePools"]
    assert pool["config"]["serviceAccount"] == NODES
    assert pool["config"]["workloadMetadataConfig"] == {"mode": "GKE_METADATA"}


@pytest.mark.parametrize("spot", [False, True])
def test_gpu_nodes_come_and_go_with_the_work(
    send: Any, all_commands: list[list[str]], spot: bool
) -> None:
    [create] = [argv for argv in all_commands if argv[0] == "env"]
    argv = ["SPOT=1" if spot and word == "SPOT=0" else word for word in create]
    pool = send(argv, "clusters/t5/nodePools")["nodePool"]
    autoscaling = pool["autoscaling"]
    assert (autoscaling.get("totalMinNodeCount", 0), autoscaling["totalMaxNodeCount"]) == (0, 8)
    assert pool.get("initialNodeCount", 0) == 0
    assert pool["locations"] == ZONES
    config = pool["config"]
    assert config["serviceAccount"] == NODES
    [gpu] = config["accelerators"]
    assert (gpu["acceleratorType"], int(gpu["acceleratorCount"])) == ("nvidia-l4", 1)
    assert config.get("spot", False) is spot
    taints = [(taint["key"], taint["effect"]) for taint in config.get("taints", [])]
    assert taints == ([("cloud.google.com/gke-spot", "NO_SCHEDULE")] if spot else [])
