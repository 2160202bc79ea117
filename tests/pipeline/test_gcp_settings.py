"""What `kuberay/gcp/bootstrap` is told, and what it decides by that or by other files."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from kuberay.gcp import names
from kuberay.gcp.access import condition
from kuberay.gcp.settings import Settings, read
from kuberay.gcp.steps import REQUEST_LOGS, request_filter
from serve_app.usage.events import usage_event
from tests.pipeline.conftest import EXAMPLE, ROOT, Cloud


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("GCP_PROJECT=My_Project", "GCP_PROJECT=My_Project: is not a project id"),
        ("GCP_PROJECT=", "GCP_PROJECT=: is not a project id"),
        ("GCP_REGION=europe-west4-a", "GCP_REGION=europe-west4-a: is not a region"),
        ("GCP_ZONES=europe-west4-a, b", "GCP_ZONES=europe-west4-a, b: is not zones"),
        ("GCP_ZONES=us-east1-b", "GCP_ZONES=us-east1-b: us-east1-b is not in europe-west4"),
        ("GITHUB_REPOSITORY=t5-serve", "GITHUB_REPOSITORY=t5-serve: is not a repository"),
        ("GITHUB_REPOSITORY=o/x' || 'a' == 'a", "x' || 'a' == 'a: is not a repository"),
        ("GITHUB_REPOSITORY_ID=owner", "GITHUB_REPOSITORY_ID=owner: is not a number"),
        ("GITHUB_BRANCHES=main'", "GITHUB_BRANCHES=main': is not branches"),
        ("GITHUB_EVENTS=pull_request_target", "pull_request_target may run what a stranger wrote"),
        ("HOST=https://summarize.example.com", "HOST=https://summarize.example.com: is not a host"),
        (
            "HOST=summarize.example.org",
            "example.org: is not in DNS_DOMAIN=example.com",
        ),
        ("DNS_DOMAIN=example.com.", "DNS_DOMAIN=example.com.: is not a domain name"),
        ("GPU_MAX_NODES=0", "GPU_MAX_NODES=0: is not a number from 1"),
        ("GPU_SPOT=yes", "GPU_SPOT=yes: is not true or false"),
        ("LOG_DAYS=forever", "LOG_DAYS=forever: is not a number of days"),
        ("GCP_REGON=europe-west4", "GCP_REGON=europe-west4: no such setting"),
        ("GCP_PROJECT", "GCP_PROJECT: is not KEY=VALUE"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(cloud: Cloud, line: str, complaint: str) -> None:
    key = line.split("=")[0]
    others = [old for old in EXAMPLE.read_text().splitlines() if not old.startswith(f"{key}=")]
    if "=" not in line:
        others = EXAMPLE.read_text().splitlines()
    cloud.settings.write_text("\n".join([*others, line]))
    done = cloud.bootstrap("--run")
    assert done.returncode == 2
    [said] = done.stderr.splitlines()
    assert said.startswith(str(cloud.settings))
    assert complaint in said
    assert cloud.calls() == []


def test_all_that_is_wrong_is_told_at_once(cloud: Cloud) -> None:
    cloud.settings.write_text("GCP_PROJECT=x\nGCP_REGION=europe-west4\nGCP_REGION=us-east1\n")
    said = cloud.bootstrap().stderr.splitlines()
    assert "GCP_PROJECT=x: is not a project id" in said[0]
    assert "GCP_REGION=us-east1: given twice" in said[1]
    missing = [line.split(": ")[1] for line in said[2:]]
    assert missing == ["GCP_ZONES", "GITHUB_REPOSITORY", "HOST", "DNS_DOMAIN"]
    assert all("is missing" in line for line in said[2:])


def test_without_settings_it_says_which_file(cloud: Cloud) -> None:
    cloud.settings.unlink()
    done = cloud.bootstrap()
    assert (done.returncode, done.stderr) == (2, f"{cloud.settings}: No such file or directory\n")


def takes(settings: Settings, **claims: str) -> bool:
    """Whether the condition takes such a token. Of CEL it uses what is Python, too, and `&&`."""
    token = {
        "repository": "owner/t5-serve",
        "repository_owner": "owner",
        "repository_id": "11",
        "repository_owner_id": "22",
        "ref": "refs/heads/main",
        "event_name": "push",
    } | claims
    expression = condition(settings)
    assert re.fullmatch(r"[\w\s.='\[\],/&-]+", expression)
    return bool(eval(expression.replace("&&", "and"), {"assertion": SimpleNamespace(**token)}))


def test_only_tokens_of_this_repository_and_its_branches_are_taken(
    settings: Settings, tmp_path: Path
) -> None:
    assert takes(settings)
    assert takes(settings, ref="refs/heads/feature/CICD", event_name="workflow_dispatch")
    for claims in (
        {"repository": "owner/other"},
        {"repository": "owner/t5-serve-fork"},
        {"repository": "stranger/t5-serve", "repository_owner": "stranger"},
        {"repository_owner": "stranger"},
        {"ref": "refs/heads/feature/other"},
        {"ref": "refs/tags/main"},
        {"ref": "refs/pull/7/merge", "event_name": "pull_request"},
        {"event_name": "pull_request_target"},
        {"event_name": "workflow_run"},
    ):
        assert not takes(settings, **claims), claims

    file = tmp_path / "settings.env"
    file.write_text(EXAMPLE.read_text() + "GITHUB_REPOSITORY_ID=11\nGITHUB_OWNER_ID=22\n")
    by_number = read(file)
    assert takes(by_number)
    assert not takes(by_number, repository_id="12")  # the name again, but another repository
    assert not takes(by_number, repository_owner_id="23")


def test_the_ingress_names_this_address() -> None:
    values = yaml.safe_load((ROOT / "helm/nginx-ingress/values.yaml").read_text())
    annotations = values["controller"]["service"]["annotations"]
    assert annotations["networking.gke.io/load-balancer-ip-addresses"] == names.ADDRESS


def test_the_filter_finds_the_lines_of_service_and_ingress(settings: Settings) -> None:
    written = request_filter(settings)
    assert (ROOT / REQUEST_LOGS).read_text().startswith("--")
    assert "--" not in written
    service, ingress = re.findall(r"\((resource[^()]*)\)", written)

    # What the sidecar passes on, and how it is named.
    asked = dict(re.findall(r'([\w.]+)="([^"]+)"', service))
    line = usage_event(
        request_id="one", traceparent="", method="POST", route="/", status=200, total_ms=1.0,
        request_bytes=1, response_bytes=1, facts={},
    )  # fmt: skip
    assert line["message"] == asked["jsonPayload.message"]
    assert line["request_id"]
    assert asked["resource.labels.namespace_name"] == "t5"
    helpers = (ROOT / "helm/t5-summarizer/templates/_helpers.tpl").read_text()
    sidecar = helpers.partition('define "t5.usageSidecar"')[2].partition("end -")[0]
    assert f"- name: {asked['resource.labels.container_name']}\n" in sidecar

    # What NGINX writes.
    asked = dict(re.findall(r'([\w.]+)="([^"]+)"', ingress))
    template = (ROOT / "helm/t5-summarizer/templates/_nginx.tpl").read_text()
    assert f'"message":"{asked["jsonPayload.message"]}"' in template
    assert asked["jsonPayload.host"] == settings.host
    assert '"host":"$host"' in template
    assert '"request_id":"$t5_request_id' in template
