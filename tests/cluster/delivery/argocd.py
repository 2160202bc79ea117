"""Argo CD on the cluster: its own manifests, and this project's settings of it."""

from __future__ import annotations

import base64
import json
import os
import re
from typing import Any

import httpx
import yaml

from tests.cluster import components, images, kube
from tests.cluster.components import HOME, ROOT
from tests.cluster.delivery.edges import CHARTS, GIT

NAMESPACE = "argocd"
SETTINGS = ROOT / "kuberay" / "argocd"
_PARTS = (
    "crds", "cluster-rbac/application-controller", "cluster-rbac/server", "base/config",
    "base/application-controller", "base/repo-server", "base/redis", "base/server",
)  # fmt: skip
_WORKLOADS = (
    "deployment/argocd-redis", "deployment/argocd-repo-server", "deployment/argocd-server",
    "statefulset/argocd-application-controller",
)  # fmt: skip


def install() -> None:
    """Its API server, controller, repository server and Redis, without Dex and notifications."""
    image = images.argocd()
    objects = _manifests(image)
    _apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}])
    # On the server: the CRDs are too long for the annotation that a client would write.
    _apply(objects)
    # As docs/delivery.md says.
    argocd("patch", "configmap", "argocd-cm", f"--patch-file={SETTINGS / 'argocd-cm.yaml'}")
    project = yaml.safe_load(_here((SETTINGS / "project.yaml").read_text()))
    _apply([project, _registry()])
    for workload in _WORKLOADS:
        argocd("rollout", "status", workload, "--timeout=240s")


def argocd(*arguments: object, text: str | None = None) -> str:
    """kubectl in Argo CD's namespace."""
    return kube.kubectl(*arguments, text=text, namespace=NAMESPACE)


def server() -> str:
    """Its address; without TLS here."""
    address = argocd("get", "service", "argocd-server", "--output=jsonpath={.spec.clusterIP}")
    return f"http://{address}"


def ci_token() -> str:
    """Of the project's role `ci`, as `argocd proj role create-token t5 ci` makes it."""
    secret = argocd(
        "get", "secret", "argocd-initial-admin-secret", "--output=jsonpath={.data.password}"
    )
    login = {"username": "admin", "password": base64.b64decode(secret).decode()}
    with httpx.Client(base_url=server(), timeout=30) as client:
        session = client.post("/api/v1/session", json=login).raise_for_status().json()["token"]
        made = client.post(
            "/api/v1/projects/t5/roles/ci/token",
            headers={"Authorization": f"Bearer {session}"},
            json={"project": "t5", "role": "ci", "expiresIn": 7200},
        )
        token: str = made.raise_for_status().json()["token"]
        return token


def application(name: str = kube.RELEASE) -> dict[str, Any]:
    """As the API server has it."""
    found: dict[str, Any] = json.loads(argocd("get", "application", name, "--output=json"))
    return found


def refresh(name: str = kube.RELEASE) -> None:
    """Let it compare anew with the cluster and the repositories."""
    argocd("annotate", "application", name, "argocd.argoproj.io/refresh=normal", "--overwrite")
    kube.until(
        "the comparison is new",
        lambda: (
            "argocd.argoproj.io/refresh" not in application(name)["metadata"].get("annotations", {})
        ),
        60,
    )


def _here(text: str) -> str:
    """With this cluster's edges in the places that say REPLACE."""
    text = text.replace("https://github.com/OWNER/t5-serve.git", GIT)
    return text.replace("REGION-docker.pkg.dev/PROJECT/charts", CHARTS)


def _registry() -> dict[str, Any]:
    secret: dict[str, Any] = yaml.safe_load(_here((SETTINGS / "registry-secret.yaml").read_text()))
    # An account of Google's there; here nobody is asked for one, and the certificate is our own.
    del secret["stringData"]["username"], secret["stringData"]["password"]
    secret["stringData"]["insecure"] = "true"
    return secret


def _apply(objects: list[dict[str, Any]]) -> None:
    argocd(
        "apply", "--server-side", "--force-conflicts", "--filename=-",
        text=yaml.safe_dump_all(objects),
    )  # fmt: skip


def _manifests(image: str) -> list[dict[str, Any]]:
    folder = HOME / "argocd"
    folder.mkdir(exist_ok=True)
    source = os.path.relpath(components.argocd_manifests(), folder)
    parts = ", ".join(f"{source}/{part}" for part in _PARTS)
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"namespace: {NAMESPACE}\nresources: [{parts}]\n"
    )
    found = [one for one in yaml.safe_load_all(argocd("kustomize", folder)) if one]
    for one in found:
        if one["kind"] in ("Deployment", "StatefulSet"):
            _adapt(one["spec"]["template"]["spec"], image)
        if one["metadata"]["name"] == "argocd-cmd-params-cm":
            one["data"] = {"server.insecure": "true"}
    return found


def _adapt(pod: dict[str, Any], image: str) -> None:
    for container in pod["containers"] + pod.get("initContainers", []):
        if re.search("/redis:", container["image"]):
            container["command"] = ["redis-server"]
        container["image"] = image
        container["imagePullPolicy"] = "Never"
        # Signed commits are not asked for, so gpg is not in the image.
        container.setdefault("env", []).append({"name": "ARGOCD_GPG_ENABLED", "value": "false"})
