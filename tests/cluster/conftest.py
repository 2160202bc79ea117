"""The cluster, the operator and the release, once for all tests; they run in the files' order."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator

import pytest
import yaml

from tests.cluster import components, images, kube, machine
from tests.cluster.components import ROOT
from tests.cluster.kube import NAMESPACE, RELEASE, get, helm, kubectl, until
from tests.cluster.release import GPU_NODE, Release
from tests.cluster.say import say

_FIGURES: list[tuple[str, str]] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was counted and timed."""
    if _FIGURES:
        terminalreporter.section("figures")
        for name, value in _FIGURES:
            terminalreporter.line(f"{name}: {value}")


@pytest.fixture(scope="session")
def figure() -> Callable[[str, str], None]:
    """Notes a figure for the report."""

    def note(name: str, value: str) -> None:
        say(f"{name}: {value}")
        _FIGURES.append((name, value))

    return note


@pytest.hookimpl(tryfirst=True, hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Collect what the cluster says when a test fails."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed and machine.running():
        report.sections.append(("cluster", _state()))


def _state() -> str:
    parts = []
    for command in (
        ("get", "pods", "--output=wide"),
        ("get", "rayservice,raycluster"),
        ("get", "events", "--sort-by=.lastTimestamp"),
        ("get", "rayservice", RELEASE, "--output=jsonpath={.status}"),
    ):
        try:
            parts.append("\n".join(kubectl(*command).splitlines()[-40:]))
        except kube.CommandError as error:
            parts.append(str(error))
    for what in ("ray-head", "autoscaler"):
        try:
            parts.append(
                kubectl(
                    "logs", "--selector=ray.io/node-type=head", f"--container={what}", "--tail=40"
                )
            )
        except kube.CommandError as error:
            parts.append(str(error))
    return "\n\n".join(parts)


@pytest.fixture(scope="session", autouse=True)
def cluster() -> Iterator[None]:
    """A running cluster; one that ran before stays."""
    if reasons := components.missing():
        pytest.fail("the cluster cannot run here:\n" + "\n".join(reasons), pytrace=False)
    found = machine.running() is not None
    images.start()
    yield
    if not found and not os.environ.get("T5_KEEP_CLUSTER"):
        machine.down()


@pytest.fixture(scope="session")
def image(cluster: None) -> str:
    """The project's own image, on all nodes."""
    return images.application()


@pytest.fixture(scope="session")
def operator(cluster: None) -> None:
    """KubeRay's, with its own manifests and rights."""
    images.operator()
    folder = components.HOME / "operator"
    folder.mkdir(exist_ok=True)
    config = os.path.relpath(components.kuberay_config(), folder)
    name, _, version = images.OPERATOR.rpartition(":")
    values = yaml.safe_load((ROOT / "kuberay" / "operator-values.yaml").read_text())
    resources = json.dumps(values["resources"])
    (folder / "kustomization.yaml").write_text(
        f"apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"namespace: kuberay-system\n"
        f"resources: [{config}/crd, {config}/rbac, {config}/manager]\n"
        f"images: [{{name: kuberay/operator, newName: {name}, newTag: {version}}}]\n"
        f"patches:\n"
        f"- target: {{kind: Deployment}}\n"
        f'  patch: \'[{{"op": "replace", "value": {resources},'
        f' "path": "/spec/template/spec/containers/0/resources"}}]\'\n'
    )
    _namespace("kuberay-system")
    # On the server: the CRDs are too long for the annotation that a client would write.
    apply = ("apply", "--server-side", "--force-conflicts", "--kustomize", folder)
    kubectl(*apply, namespace="kuberay-system")
    kubectl(
        "rollout", "status", "deployment/kuberay-operator", "--timeout=180s",
        namespace="kuberay-system",
    )  # fmt: skip


def _namespace(name: str) -> None:
    kubectl(
        "apply", "--filename=-", namespace="default",
        text=f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n",
    )  # fmt: skip


@pytest.fixture(scope="session")
def gpu_node(cluster: None) -> None:
    """One node has GPUs, as far as the scheduler knows; only the device is missing."""
    node = ("node", GPU_NODE)
    kubectl("label", *node, "cloud.google.com/gke-accelerator=nvidia-l4", "--overwrite")
    kubectl("taint", *node, "nvidia.com/gpu=present:NoSchedule", "--overwrite")
    capacity = '{"status": {"capacity": {"nvidia.com/gpu": "6"}}}'
    kubectl("patch", *node, "--subresource=status", "--type=merge", f"--patch={capacity}")

    def allocatable() -> bool:
        return "nvidia.com/gpu" in get("node", GPU_NODE)["status"]["allocatable"]

    until("the node offers GPUs", allocatable, 60)


@pytest.fixture(scope="session")
def release(operator: None, gpu_node: None, image: str) -> Release:
    """Installed into a namespace that enforces the strictest Pod Security level."""
    made = Release(image)
    if f"namespace/{NAMESPACE}" in kubectl("get", "namespaces", "--output=name").split():
        pytest.fail(
            f"namespace {NAMESPACE} is there already: helm uninstall, then delete it", pytrace=False
        )
    kubectl("create", "namespace", NAMESPACE, namespace="default")
    kubectl(
        "label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted",
        namespace="default",
    )  # fmt: skip
    made.began = time.monotonic()
    helm("install", *made.arguments())
    until("the service is up", kube.serving, 420)
    made.took = time.monotonic() - made.began
    return made


@pytest.fixture(scope="session")
def token(release: Release) -> str:
    """A client's, once the service knows it: the mounted Secret reaches pods a little later."""
    made = release.tokens("create", "tester")
    until("a summary", lambda: release.ask(made).status_code == 200, 120)
    release.first_summary = time.monotonic() - release.began
    # Each replica follows the Secret by itself.
    until("all know the token", lambda: release.always(made, 200), 120)
    return made
