"""`kuberay/gcp/bootstrap` on a project that a stand-in for gcloud plays (fake_gcloud.py)."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

import pytest

from tests.pipeline.conftest import EXAMPLE, ROOT, Cloud
from tests.pipeline.fake_gcloud import NUMBER

HOST = "dns record-sets summarize.example.com."
PROVIDER = "iam workload-identity-pools providers t5-serve"


def account(name: str) -> str:
    return f"{name}@my-project.iam.gserviceaccount.com"


def test_a_dry_run_prints_the_commands_and_calls_nothing(cloud: Cloud) -> None:
    done = cloud.bootstrap()
    assert (done.returncode, done.stderr) == (0, "")
    assert cloud.calls() == []
    assert "gcloud container clusters create t5" in done.stdout
    assert "kuberay/gpu-node-pool.sh" in done.stdout


def test_the_first_run_makes_everything(cloud: Cloud) -> None:
    # That nothing is used before it is there, the stand-in sees to.
    done = cloud.bootstrap("--run")
    assert done.returncode == 0, done.stderr
    assert set(cloud.state()["things"]) == {
        "artifacts repositories images",
        "artifacts repositories charts",
        *(
            f"iam service-accounts {account(f't5-{name}')}"
            for name in ("ci", "nodes", "argocd", "dns")
        ),
        "compute networks t5",
        "compute networks subnets t5",
        "compute routers t5",
        "compute routers nats t5",
        "compute addresses t5-address",
        "dns managed-zones example-com",
        HOST,
        "iam workload-identity-pools github",
        PROVIDER,
        "container clusters t5",
        "container node-pools t5-l4",
        "bq t5_requests",
        "logging sinks t5-requests",
    }
    assert "[31/31]" in done.stderr


def test_afterwards_it_says_what_goes_where(ready: Cloud) -> None:
    said = ready.bootstrap("--run").stdout
    variables = dict(
        re.findall(r"^gh variable set (\w+) --repo owner/t5-serve --body (\S+)$", said, re.M)
    )
    assert variables == {
        "GCP_PROJECT": "my-project",
        "GCP_REGION": "europe-west4",
        "GCP_REGISTRY": "europe-west4-docker.pkg.dev",
        "GCP_SERVICE_ACCOUNT": account("t5-ci"),
        "GCP_WIF_PROVIDER": f"projects/{NUMBER}/locations/global/workloadIdentityPools/github"
        "/providers/t5-serve",
        "ARGOCD_SERVER": "argocd.example.com",
    }
    assert "europe-west4-docker.pkg.dev/my-project/images/t5-serve\n" in said
    assert "203.0.113.7" in said
    assert "ns1.example.,ns2.example." in said
    assert "$" not in said


def test_a_second_run_changes_nothing(ready: Cloud) -> None:
    before = ready.state()
    done = ready.bootstrap("--run")
    assert done.returncode == 0, done.stderr
    assert ready.changes() == []
    assert len(ready.calls()) > 30
    assert ready.state() == before


@pytest.mark.parametrize(
    ("failure", "step"),
    [
        ("services enable", "step 1/31, services of the project"),
        ("node-pools create", "step 27/31, GPU node pool t5-l4"),
        ("GRANT", "step 31/31, the sink may write into t5_requests"),
    ],
)
def test_after_a_failure_another_run_completes(
    cloud: Cloud, made: str, failure: str, step: str
) -> None:
    done = cloud.bootstrap("--run", failure=failure)
    assert done.returncode == 1
    assert step in done.stderr
    assert "quota exceeded" in done.stderr
    assert "run it again to go on" in done.stderr
    assert failure in " ".join(cloud.calls()[-1])
    assert done.stdout == ""

    assert cloud.bootstrap("--run").returncode == 0
    assert cloud.state() == json.loads(made)


def test_what_is_printed_makes_the_same_project(cloud: Cloud, made: str) -> None:
    done = cloud.shell("bash", "-c", cloud.bootstrap().stdout)
    assert done.returncode == 0, done.stderr
    assert cloud.state() == json.loads(made)


def test_what_has_drifted_is_set_right_and_nothing_else(ready: Cloud) -> None:
    before = ready.state()["things"]
    drifts: list[tuple[str, dict[str, Any], str]] = [
        ("artifacts repositories charts", {"cleanupPolicies": {}}, "set-cleanup-policies charts"),
        (HOST, {"rrdatas": ["198.51.100.1"]}, "record-sets update"),
        (PROVIDER, {"attributeCondition": "true"}, "providers update-oidc"),
        ("bq t5_requests", {"defaultPartitionExpirationMs": "1"}, "update --dataset"),
        ("logging sinks t5-requests", {"filter": ""}, "sinks update"),
        ("bq t5_requests", {"access": []}, "GRANT"),
    ]
    for thing, facts, _ in drifts:
        ready.edit(thing, **facts)
    assert ready.bootstrap("--run").returncode == 0
    for change, (_, _, command) in zip(ready.changes(), drifts, strict=True):
        assert command in " ".join(change)
    after = ready.state()["things"]
    for thing in before:  # what commands were given is not what they made
        assert {**after[thing], "flags": 0} == {**before[thing], "flags": 0}


def test_a_setting_that_changes_reaches_the_provider(ready: Cloud) -> None:
    ready.settings.write_text(EXAMPLE.read_text() + "GITHUB_BRANCHES=main,next\n")
    assert ready.bootstrap("--run").returncode == 0
    assert "refs/heads/next" in ready.state()["things"][PROVIDER]["attributeCondition"]
    assert len(ready.changes()) == 1


@pytest.mark.parametrize(
    ("thing", "facts", "complaint"),
    [
        ("container clusters t5", {"status": "PROVISIONING"}, "PROVISIONING, not RUNNING"),
        ("iam workload-identity-pools github", {"state": "DELETED"}, "DELETED, not ACTIVE"),
        (PROVIDER, {"state": "DELETED"}, "DELETED, not ACTIVE"),
        ("dns managed-zones example-com", {"dnsName": "example.org."}, "example.org."),
        ("bq t5_requests", {"location": "US"}, "in US"),
    ],
)
def test_what_is_there_as_something_else_is_left_and_told(
    ready: Cloud, thing: str, facts: dict[str, Any], complaint: str
) -> None:
    ready.edit(thing, **facts)
    done = ready.bootstrap("--run")
    assert done.returncode == 1
    assert complaint in done.stderr
    assert ready.changes() == []


def test_a_policy_that_the_zone_has_already_is_not_overwritten(ready: Cloud) -> None:
    state = ready.state()
    theirs = [{"role": "roles/dns.reader", "members": ["user:somebody@example.com"]}]
    state["policies"]["dns managed-zones example-com"] = theirs
    ready.file.write_text(json.dumps(state))
    done = ready.bootstrap("--run")
    assert done.returncode == 1
    assert "the zone has a policy of its own" in done.stderr
    assert ready.state() == state


def test_no_answer_is_not_taken_for_absence(ready: Cloud) -> None:
    state = ready.state()
    del state["things"]["compute networks t5"]
    ready.file.write_text(json.dumps(state | {"denied": ["compute"]}))
    done = ready.bootstrap("--run")
    assert done.returncode == 1
    assert "step 10/31, network: " in done.stderr
    assert "PERMISSION_DENIED: you may not ask compute" in done.stderr
    assert ready.changes() == []


def test_without_gcloud_it_says_so(cloud: Cloud) -> None:
    cloud.environment["PATH"] = str(cloud.folder)
    done = cloud.bootstrap("--run")
    assert done.returncode == 1
    assert "gcloud: No such file or directory" in done.stderr


def test_roles_are_these_and_no_others(ready: Cloud) -> None:
    table = {
        (binding["role"], member, resource)
        for resource, bindings in ready.state()["policies"].items()
        for binding in bindings
        for member in binding["members"]
    }
    ci, nodes = f"serviceAccount:{account('t5-ci')}", f"serviceAccount:{account('t5-nodes')}"
    argocd, dns = f"serviceAccount:{account('t5-argocd')}", f"serviceAccount:{account('t5-dns')}"
    workflows = (
        f"principalSet://iam.googleapis.com/projects/{NUMBER}/locations/global/"
        "workloadIdentityPools/github/attribute.repository/owner/t5-serve"
    )
    cert_manager = "serviceAccount:my-project.svc.id.goog[cert-manager/cert-manager]"
    sink = "serviceAccount:service-1@gcp-sa-logging.iam.gserviceaccount.com"
    assert table == {
        ("roles/artifactregistry.writer", ci, "artifacts repositories images"),
        ("roles/artifactregistry.writer", ci, "artifacts repositories charts"),
        ("roles/artifactregistry.reader", nodes, "artifacts repositories images"),
        ("roles/artifactregistry.reader", argocd, "artifacts repositories charts"),
        ("roles/container.defaultNodeServiceAccount", nodes, "projects my-project"),
        ("roles/dns.admin", dns, "dns managed-zones example-com"),
        (
            "roles/iam.workloadIdentityUser",
            workflows,
            f"iam service-accounts {account('t5-ci')}",
        ),
        (
            "roles/iam.workloadIdentityUser",
            cert_manager,
            f"iam service-accounts {account('t5-dns')}",
        ),
        ("roles/bigquery.dataEditor", sink, "bq t5_requests"),
    }


def test_nodes_and_the_gpu_pool_have_the_nodes_account(ready: Cloud) -> None:
    things = ready.state()["things"]
    for pool in ("container clusters t5", "container node-pools t5-l4"):
        assert things[pool]["flags"]["service-account"] == account("t5-nodes")
        assert things[pool]["flags"]["node-locations"].startswith("europe-west4-a,")


def test_with_a_key_there_is_no_federation(cloud: Cloud) -> None:
    file = cloud.folder / "key.json"
    done = cloud.bootstrap("--run", "--with-key", str(file))
    assert done.returncode == 0, done.stderr
    assert file.exists()
    assert not any("workload-identity-pools" in thing for thing in cloud.state()["things"])
    assert "GCP_WIF_PROVIDER" not in done.stdout
    assert f"gh secret set GCP_SA_KEY --repo owner/t5-serve < {file}" in done.stdout
    # The key is made once.
    assert cloud.bootstrap("--run", "--with-key", str(file)).returncode == 0
    assert cloud.changes() == []


def test_the_node_pools_script_wants_a_cluster() -> None:
    done = subprocess.run(
        [ROOT / "kuberay/gpu-node-pool.sh"],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "CLUSTER: name of the GKE cluster" in done.stderr
