"""From `helm install` to the first summary; where pods land; what guards them."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
import yaml

from tests.cluster import kube
from tests.cluster.components import ROOT
from tests.cluster.kube import NAMESPACE, RELEASE, kubectl
from tests.cluster.release import CHART, GPU_NODE, NGINX_CRDS, Release


def test_from_install_to_the_first_summary(
    release: Release, token: str, figure: Callable[[str, str], None]
) -> None:
    assert release.ask(token).json()["summary"].strip()
    figure("helm install to RUNNING", f"{release.took:.0f} s")
    figure("helm install to the first summary", f"{release.first_summary:.0f} s")


def test_helm_test_passes(release: Release) -> None:
    assert "Succeeded" in kube.helm("test", RELEASE, "--timeout=120s")


def test_the_head_has_no_replicas_and_takes_no_traffic(release: Release) -> None:
    processes = kube.execute(kube.head(), "ps", "-eo", "args=", container="ray-head")
    assert "ray::ServeController" in processes
    assert "ray::ServeReplica" not in processes
    address = kube.get("pod", kube.head())["status"]["podIP"]
    slices = kube.items("endpointslices", f"kubernetes.io/service-name={RELEASE}-serve-svc")
    served = {a for one in slices for e in one["endpoints"] for a in e["addresses"]}
    assert served
    assert address not in served


def test_the_engine_is_on_the_gpu_node_and_the_api_never(release: Release) -> None:
    assert {p["spec"]["nodeName"] for p in kube.pods("summarizer")} == {GPU_NODE}
    others = kube.pods("api") + kube.pods("head")
    assert GPU_NODE not in {p["spec"]["nodeName"] for p in others}
    assert set(kube.replicas("Summarizer").values()) == kube.names(kube.pods("summarizer"))
    assert set(kube.replicas("Api").values()) == kube.names(kube.pods("api"))
    [engine] = kube.pods("summarizer")
    [container] = engine["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_pods_run_at_the_restricted_level(release: Release) -> None:
    namespace = kube.get("namespace", NAMESPACE)
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = kube.pods()
    assert {p["status"]["phase"] for p in pods} == {"Running"}
    # What the policy says is what processes find.
    for pod in kube.names(pods):
        with pytest.raises(kube.CommandError, match="Read-only file system"):
            kube.execute(pod, "touch", "/opt/venv/x")
        assert kube.execute(pod, "id", "-u").strip() == "1000"


def test_a_privileged_pod_is_refused_there(release: Release) -> None:
    with pytest.raises(kube.CommandError, match="violates PodSecurity"):
        kubectl("run", "root", "--image=none", "--privileged", "--dry-run=server")


def test_guards_exist(release: Release) -> None:
    assert kube.names(kube.items("networkpolicies")) == {RELEASE, f"{RELEASE}-apiserver"}
    [budget] = kube.items("poddisruptionbudgets")
    assert budget["metadata"]["name"] == f"{RELEASE}-api"
    expected = {"currentHealthy": 2, "desiredHealthy": 1, "disruptionsAllowed": 1}
    assert expected.items() <= budget["status"].items()


def test_the_dashboard_asks_for_rays_token(release: Release) -> None:
    address = kube.get("pod", kube.head())["status"]["podIP"]
    url = f"http://{address}:8265/api/serve/applications/"
    assert httpx.get(url, timeout=20).status_code == 401
    assert kube.serve_details()["status"] == "RUNNING"


@pytest.fixture(scope="module")
def crds(release: Release) -> bool:
    """Of what the chart makes besides; whether the ingress controller's are among them."""
    for kind in ("podmonitors", "prometheusrules"):
        definition = ROOT / ".tools" / "schemas" / f"monitoring.coreos.com_{kind}.yaml"
        kubectl("apply", "--server-side", "--filename", definition)
    if NGINX_CRDS.is_dir():
        kubectl("apply", "--server-side", "--filename", NGINX_CRDS)
    kubectl("wait", "crd", "--all", "--for=condition=Established", "--timeout=30s")
    return NGINX_CRDS.is_dir()


@pytest.mark.parametrize("path", sorted((CHART / "ci").glob("*-values.yaml")), ids=lambda p: p.stem)
def test_the_api_server_accepts_every_example(path: object, crds: bool) -> None:
    rendered = kube.helm("template", "example", CHART, f"--values={path}")
    objects = [one for one in yaml.safe_load_all(rendered) if one]
    nginx = [one for one in objects if one["apiVersion"].startswith("k8s.nginx.org/")]
    wanted = objects if crds else [one for one in objects if one not in nginx]
    told = kubectl("apply", "--dry-run=server", "--filename=-", text=yaml.safe_dump_all(wanted))
    assert len(told.splitlines()) == len(wanted)
    if nginx and not crds:
        pytest.skip(
            f"the ingress controller's CRDs are not at {NGINX_CRDS.relative_to(ROOT.parent)}"
        )


def test_the_plain_rayservice_is_accepted(crds: bool) -> None:
    told = kubectl(
        "apply",
        "--dry-run=server",
        "--filename",
        ROOT / "kuberay" / "rayservice.yaml",
        "--namespace=default",
    )
    assert "rayservice.ray.io/t5-summarizer" in told
