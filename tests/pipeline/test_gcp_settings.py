"""What `kuberay/gcp/bootstrap` is told, and what it decides by that or by other files."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from starlette.types import Receive, Scope, Send

from kuberay.gcp import names
from kuberay.gcp.access import condition
from kuberay.gcp.settings import Settings, read
from kuberay.gcp.steps import REQUEST_LOGS, request_filter
from serve_app.api.middleware import RequestMiddleware
from serve_app.config import LogSettings
from serve_app.logs import configure_logging
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


@pytest.mark.anyio
async def test_the_filter_finds_the_services_own_lines(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = request_filter(settings)
    assert (ROOT / REQUEST_LOGS).read_text().startswith("--")
    assert "--" not in written
    assert 'namespace_name="t5"' in written

    # Pods bear the label it asks for. Cloud Logging writes `_` for a prefix's dots.
    [(label, value)] = re.findall(r'labels\."k8s-pod/([^"]+)"="([^"]+)"', written)
    manifest = yaml.safe_load_all((ROOT / "kuberay/rayservice.yaml").read_text())
    [service] = [thing for thing in manifest if thing["kind"] == "RayService"]
    [*groups] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for group in groups:
        labels = group["template"]["metadata"]["labels"]
        assert {key.replace(".", "_"): value for key, value in labels.items()}[label] == value

    # And a request's line has the fields.
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def nothing(*_: Any) -> Any: ...

    logger = logging.getLogger("serve_app")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logger.level)
    lines = io.StringIO()
    monkeypatch.setattr("sys.stderr", lines)
    configure_logging(LogSettings())
    telemetry = SimpleNamespace(request=lambda *_: None)
    scope = {"type": "http", "method": "POST", "headers": []}
    await RequestMiddleware(app, telemetry, echo_request_id=False)(scope, nothing, nothing)  # type: ignore[arg-type]
    line = json.loads(lines.getvalue())
    for field, wanted in re.findall(r'jsonPayload\.(\w+)(?:="(\w+)")?', written):
        assert line[field] == wanted or (not wanted and line[field])
