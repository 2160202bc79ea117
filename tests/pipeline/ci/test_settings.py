"""scripts/check-settings: the way of logging in, and what is said of settings that are missing."""

from __future__ import annotations

import re

import pytest

from kuberay.gcp.cli import report
from kuberay.gcp.settings import Settings
from tests.pipeline.ci.conftest import Pipeline

PROVIDER = "projects/123456789012/locations/global/workloadIdentityPools/github/providers/t5-serve"
BASE = {
    "GCP_PROJECT": "my-project",
    "GCP_REGION": "europe-west4",
    "ARGOCD_SERVER": "https://argocd.example.com",
    "ARGOCD_AUTH_TOKEN": "set",
    "GITHUB_REPOSITORY": "o/r",
}
WIF = {
    "GCP_WIF_PROVIDER": PROVIDER,
    "GCP_SERVICE_ACCOUNT": "t5-ci@my-project.iam.gserviceaccount.com",
}
KEY = {"GCP_SA_KEY": "set"}
WHERE = (
    "Set at https://github.com/o/r/settings/secrets/actions; docs/delivery.md tells what each is"
)


@pytest.mark.parametrize(
    ("settings", "auth", "argocd"),
    [
        (WIF, "wif", "token"),
        (KEY, "key", "token"),
        # The provider goes first, so that a key may stay until it is known that this works.
        ({**WIF, **KEY}, "wif", "token"),
        ({**WIF, "ARGOCD_AUTH_TOKEN": "", "ARGOCD_OIDC": "true"}, "wif", "oidc"),
        ({**KEY, "ARGOCD_OIDC": "true"}, "key", "oidc"),
        ({**KEY, "ARGOCD_SERVER": "argocd.example.com:8443"}, "key", "token"),
    ],
)
def test_both_ways_of_logging_in(
    pipeline: Pipeline, settings: dict[str, str], auth: str, argocd: str
) -> None:
    done = pipeline.script("check-settings", **{**BASE, **settings})
    assert done.returncode == 0, done.stderr
    host = "europe-west4-docker.pkg.dev"
    assert pipeline.outputs() == {
        "auth": auth,
        "argocd-auth": argocd,
        "registry": host,
        "image": f"{host}/my-project/images/t5-serve",
        "cache": f"{host}/my-project/images/cache",
        "charts": f"{host}/my-project/charts",
        "console": "https://console.cloud.google.com/artifacts/docker/my-project/europe-west4"
        "/images/t5-serve",
    }


def test_another_registry_and_a_domains_project(pipeline: Pipeline) -> None:
    done = pipeline.script(
        "check-settings",
        **{
            **BASE,
            **KEY,
            "GCP_REGISTRY": "127.0.0.1:5000",
            "GCP_PROJECT": "example.com:my-project",
        },
    )
    assert done.returncode == 0, done.stderr
    assert pipeline.outputs()["image"] == "127.0.0.1:5000/example.com/my-project/images/t5-serve"


@pytest.mark.parametrize(
    ("settings", "without", "told"),
    [
        (WIF, "GCP_PROJECT", "variable GCP_PROJECT"),
        (WIF, "GCP_REGION", "variable GCP_REGION"),
        (WIF, "GCP_SERVICE_ACCOUNT", "variable GCP_SERVICE_ACCOUNT"),
        (WIF, "ARGOCD_SERVER", "variable ARGOCD_SERVER"),
        (WIF, "ARGOCD_AUTH_TOKEN", "secret ARGOCD_AUTH_TOKEN or variable ARGOCD_OIDC=true"),
        (
            KEY,
            "GCP_SA_KEY",
            "variable GCP_WIF_PROVIDER (with GCP_SERVICE_ACCOUNT) or secret GCP_SA_KEY",
        ),
    ],
)
def test_what_is_missing_is_one_clear_line(
    pipeline: Pipeline, settings: dict[str, str], without: str, told: str
) -> None:
    # GitHub gives a variable that is not set as an empty one.
    given = {**BASE, **settings, without: ""}
    done = pipeline.script("check-settings", **given, GITHUB_ACTIONS="true")
    assert done.returncode == 2
    assert done.stderr == f"::error::check-settings: not set: {told}. {WHERE}\n"
    assert pipeline.outputs() == {}
    given.pop(without)
    assert pipeline.script("check-settings", **given, GITHUB_ACTIONS="true").stderr == done.stderr


def test_all_that_is_missing_is_told_at_once(pipeline: Pipeline) -> None:
    done = pipeline.script("check-settings")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    for name in ("GCP_PROJECT", "GCP_REGION", "GCP_WIF_PROVIDER", "GCP_SA_KEY",
                 "ARGOCD_SERVER", "ARGOCD_AUTH_TOKEN"):  # fmt: skip
        assert name in line
    assert pipeline.outputs() == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GCP_PROJECT", "My Project"),
        ("GCP_REGION", "europe-west4-docker.pkg.dev"),
        ("GCP_WIF_PROVIDER", "t5-serve"),
        ("GCP_SERVICE_ACCOUNT", "t5-ci"),
        ("ARGOCD_SERVER", "argocd example com"),
        ("ARGOCD_SERVER", "https://argocd.example.com\nimage=evil"),
    ],
)
def test_what_cannot_be_right_is_told_too(pipeline: Pipeline, name: str, value: str) -> None:
    done = pipeline.script(
        "check-settings", **{**BASE, **WIF, "ARGOCD_AUTH_TOKEN": "", name: value}
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"; variable {name} is to be like " in line
    assert "secret ARGOCD_AUTH_TOKEN" in line
    assert pipeline.outputs() == {}


def test_secrets_are_not_shown(pipeline: Pipeline) -> None:
    secrets = {"GCP_SA_KEY": "s3cret-key", "ARGOCD_AUTH_TOKEN": "s3cret-token"}
    for settings in ({}, BASE):
        done = pipeline.script("check-settings", **{**settings, **secrets})
        assert "s3cret" not in done.stdout + done.stderr + str(pipeline.outputs())


@pytest.mark.parametrize(("key", "auth"), [(None, "wif"), ("key.json", "key")])
def test_what_bootstrap_says_is_what_is_wanted(
    pipeline: Pipeline, settings: Settings, key: str | None, auth: str
) -> None:
    told = report(settings, key).replace("$PROJECT_NUMBER", "123456789012")
    given = dict(re.findall(r"^gh variable set (\w+) .* --body (\S+)$", told, re.MULTILINE))
    given |= dict.fromkeys(re.findall(r"^gh secret set (\w+) ", told, re.MULTILINE), "set")
    done = pipeline.script("check-settings", **given, ARGOCD_AUTH_TOKEN="set")
    assert done.returncode == 0, done.stderr
    outputs = pipeline.outputs()
    assert outputs["auth"] == auth
    assert f"repository: {outputs['image']}\n" in told
