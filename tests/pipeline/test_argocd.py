"""What Argo CD is told of a RayService's health, on statuses recorded from a real cluster.

`statuses/*.json` are RayServices as the API server had them while a release went its way (`kubectl
get rayservice --watch`), each with what there was to be seen of the cluster at that moment.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa import lua51

ROOT = Path(__file__).resolve().parents[2]
ARGOCD = ROOT / "kuberay" / "argocd"
SETTINGS = yaml.safe_load((ARGOCD / "argocd-cm.yaml").read_text())["data"]
RECORDED = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "statuses").glob("*.json"))
}
Object = dict[str, Any]


def health(resource: Object, key: str = "ray.io_RayService") -> tuple[str, str]:
    """Status and message, by the script as Argo CD runs it: given `obj`, it returns a table."""
    lua = lua51.LuaRuntime()
    lua.globals().obj = lua.table_from(resource, recursive=True)
    answer = lua.execute(SETTINGS[f"resource.customizations.health.{key}"])
    return answer["status"], answer["message"]


def recorded(name: str) -> Object:
    return copy.deepcopy(RECORDED[name]["object"])


@pytest.mark.parametrize("name", RECORDED)
def test_every_phase(name: str) -> None:
    status, message = health(recorded(name))
    assert status == RECORDED[name]["health"], message
    assert message
    assert RECORDED[name].get("says", "") in message


def test_all_phases_were_recorded() -> None:
    assert {one["health"] for one in RECORDED.values()} == {"Progressing", "Healthy", "Degraded"}
    assert len(RECORDED) >= 8


def test_ready_on_the_old_cluster_is_not_healthy() -> None:
    service = recorded("upgrade-new-cluster-starts")
    conditions = {c["type"]: c["status"] for c in service["status"]["conditions"]}
    assert conditions["Ready"] == "True"
    assert health(service)[0] == "Progressing"


def test_a_change_that_kuberay_has_not_seen_is_not_healthy() -> None:
    service = recorded("running")
    service["metadata"]["generation"] += 1
    assert health(service)[0] == "Progressing"


def test_suspended() -> None:
    service = recorded("running")
    service["spec"] = {"rayClusterConfig": {"suspend": True}}
    assert health(service)[0] == "Suspended"


@pytest.mark.parametrize("reason", ["ValidationFailed", "InitializingTimeout"])
def test_what_kuberay_gives_up_on_is_degraded(reason: str) -> None:
    service = recorded("running")
    [ready] = [c for c in service["status"]["conditions"] if c["type"] == "Ready"]
    ready.update(status="False", reason=reason, message="because")
    assert health(service) == ("Degraded", f"{reason}: because")


@pytest.mark.parametrize(
    ("state", "wanted"),
    [("Valid", "Healthy"), ("Warning", "Degraded"), ("Invalid", "Degraded"), (None, "Progressing")],
)
@pytest.mark.parametrize("kind", ["VirtualServer", "Policy"])
def test_the_ingress_controllers_kinds(kind: str, state: str | None, wanted: str) -> None:
    resource = {"status": {"state": state, "message": "told"}} if state else {}
    assert health(resource, f"k8s.nginx.org_{kind}")[0] == wanted


def test_restart_is_an_annotation_of_the_head() -> None:
    actions = yaml.safe_load(SETTINGS["resource.customizations.actions.ray.io_RayService"])
    [action] = actions["definitions"]
    lua = lua51.LuaRuntime()
    service = {"spec": {"rayClusterConfig": {"headGroupSpec": {"template": {}}, "x": 1}}}
    lua.globals().obj = lua.table_from(service, recursive=True)
    changed = lua.execute(action["action.lua"])["spec"]["rayClusterConfig"]
    annotations = changed["headGroupSpec"]["template"]["metadata"]["annotations"]
    assert annotations["t5-serve/restartedAt"].endswith("Z")
    assert changed["x"] == 1


_APPLICATIONS = ("application", "operator")


@pytest.mark.parametrize("name", _APPLICATIONS)
def test_an_application_stays_within_its_project(name: str) -> None:
    application = yaml.safe_load((ARGOCD / f"{name}.yaml").read_text())
    project = yaml.safe_load((ARGOCD / "project.yaml").read_text())
    assert application["spec"]["project"] == project["metadata"]["name"]
    assert {one["repoURL"] for one in application["spec"]["sources"]} <= set(
        project["spec"]["sourceRepos"]
    )
    assert application["spec"]["destination"] in project["spec"]["destinations"]
    files = [
        path
        for source in application["spec"]["sources"]
        for path in source.get("helm", {}).get("valueFiles", [])
    ]
    assert files
    for path in files:
        assert (ROOT / path.removeprefix("$values/")).is_file(), path


def test_the_pipelines_role_is_for_one_application() -> None:
    project = yaml.safe_load((ARGOCD / "project.yaml").read_text())
    [role] = project["spec"]["roles"]
    rules = [[part.strip() for part in line.split(",")] for line in role["policies"]]
    assert {(rule[1], rule[4], rule[5]) for rule in rules} == {
        ("proj:t5:ci", "t5/t5-summarizer", "allow")
    }
    assert {rule[3] for rule in rules} == {
        "get", "create", "update", "sync", "action/ray.io/RayService/restart",
    }  # fmt: skip


def test_the_operators_crds_are_never_pruned() -> None:
    operator = yaml.safe_load((ARGOCD / "operator.yaml").read_text())
    assert operator["spec"]["syncPolicy"]["automated"]["prune"] is False
