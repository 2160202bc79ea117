"""kubectl, Helm and what an operator looks at."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

from tests.cluster import machine
from tests.cluster.components import BIN, HELM
from tests.cluster.daemons import KUBECONFIG
from tests.cluster.network import DNS

NAMESPACE = "t5"
RELEASE = "t5-summarizer"
INSTANCE = f"app.kubernetes.io/instance={RELEASE}"
Object = dict[str, Any]
T = TypeVar("T")


class CommandError(Exception):
    """A command failed; the message is what it wrote."""


def run(*command: object, text: str | None = None) -> str:
    """Its output."""
    done = subprocess.run(
        [str(part) for part in command],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "KUBECONFIG": str(KUBECONFIG)},
    )
    if done.returncode:
        raise CommandError(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def kubectl(*arguments: object, text: str | None = None, namespace: str = NAMESPACE) -> str:
    """Output of kubectl in the release's namespace."""
    return run(BIN / "kubectl", "--namespace", namespace, *arguments, text=text)


def helm(*arguments: object) -> str:
    """Output of Helm in the release's namespace."""
    return run(HELM, "--namespace", NAMESPACE, *arguments)


def get(kind: str, name: str) -> Object:
    """One object."""
    found: Object = json.loads(kubectl("get", kind, name, "--output=json"))
    return found


def items(kind: str, selector: str = INSTANCE) -> list[Object]:
    """All objects with these labels."""
    found: list[Object] = json.loads(
        kubectl("get", kind, f"--selector={selector}", "--output=json")
    )["items"]
    return found


def pods(component: str | None = None) -> list[Object]:
    """Pods of the cluster that serves, but for those that are being deleted."""
    more = f",ray.io/cluster={active_cluster()}"
    if component:
        more += f",app.kubernetes.io/component={component}"
    return [p for p in items("pods", INSTANCE + more) if "deletionTimestamp" not in p["metadata"]]


def images() -> set[str]:
    """Images of the cluster that serves."""
    return {c["image"] for pod in pods() for c in pod["spec"]["containers"]}


def names(objects: list[Object]) -> set[str]:
    """Their names."""
    return {one["metadata"]["name"] for one in objects}


def ready(pod: Object) -> bool:
    """Its condition Ready."""
    conditions = pod["status"].get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def until(what: str, true: Callable[[], T], seconds: float = 180, every: float = 1.0) -> T:
    """What `true` gives, once that is not false."""
    end = time.monotonic() + seconds
    last: Exception | None = None
    while time.monotonic() < end:
        try:
            if found := true():
                return found
        except (CommandError, KeyError, ValueError, httpx.HTTPError) as error:  # not there yet
            last = error
        time.sleep(every)
    raise AssertionError(f"{what}: not within {seconds:.0f} s" + (f" ({last})" if last else ""))


def serving() -> bool:
    """The service is up, and no change is under way.

    The condition Ready alone stays true while a change fails; docs/operations.md has the same four.
    """
    service = get("rayservice", RELEASE)
    status = service.get("status", {})
    conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
    applications = status.get("activeServiceStatus", {}).get("applicationStatuses") or {}
    return (
        status.get("observedGeneration") == service["metadata"]["generation"]
        and conditions.get("Ready") == "True"
        and conditions.get("UpgradeInProgress") != "True"
        and bool(applications)
        and all(one["status"] == "RUNNING" for one in applications.values())
    )


def active_cluster() -> str:
    """Name of the RayCluster that serves."""
    status = get("rayservice", RELEASE)["status"]
    name: str = status["activeServiceStatus"]["rayClusterName"]
    return name


def serve_details() -> Object:
    """The application as Serve itself tells it, asked at the dashboard with Ray's own token."""
    template = "--output=go-template={{.data.auth_token | base64decode}}"
    token = kubectl("get", "secret", active_cluster(), template)
    address = get("pod", head())["status"]["podIP"]
    answer = httpx.get(
        f"http://{address}:8265/api/serve/applications/",
        headers={"Authorization": f"Bearer {token}"},
        timeout=20,
    )
    found: Object = answer.raise_for_status().json()["applications"]["t5-serve"]
    return found


def running_replicas(deployment: str) -> int:
    """How many Serve says are running."""
    replicas = serve_details()["deployments"][deployment]["replicas"]
    return sum(one["state"] == "RUNNING" for one in replicas)


def head() -> str:
    """Name of the active cluster's head pod."""
    [pod] = pods("head")
    name: str = pod["metadata"]["name"]
    return name


def execute(pod: str, *command: str, container: str | None = None) -> str:
    """Output of a command in a pod."""
    where = ["--container", container] if container else []
    return kubectl("exec", pod, *where, "--", *command)


def replicas(deployment: str) -> dict[str, str]:
    """Serve's replicas as their processes show them: id and pod."""
    component = {"Api": "api", "Summarizer": "summarizer"}[deployment]
    found = {}
    for pod in names(pods(component)):
        try:
            titles = execute(pod, "ps", "-eo", "pid=,args=")
        except CommandError:
            continue
        for line in titles.splitlines():
            number, _, title = line.strip().partition(" ")
            if title.startswith(f"ray::ServeReplica:t5-serve:{deployment}"):
                found[f"{pod}/{number}"] = pod
    return found


def redis_keys() -> list[str]:
    """What KubeRay and Ray keep in Redis."""
    told = machine.inside("redis-cli", "-h", DNS, "keys", "*").stdout
    return told.split()
