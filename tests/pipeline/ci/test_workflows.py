"""The workflows: what GitHub would do with them, as far as that can be told without GitHub."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.chart.conftest import tool
from tests.pipeline.ci.conftest import ROOT

GITHUB = ROOT / ".github"
FILES = sorted([*GITHUB.glob("workflows/*.yml"), *GITHUB.glob("actions/*/action.yml")])
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in GITHUB.glob("workflows/*.yml")}
JOBS = {
    (name, key): job
    for name, workflow in WORKFLOWS.items()
    for key, job in workflow["jobs"].items()
}
RUN_JOBS = {where: job for where, job in JOBS.items() if "steps" in job}

INJECTION = """\
on: pull_request
permissions: {}
jobs:
  greet:
    runs-on: ubuntu-24.04
    steps:
      - run: echo ${{ github.event.pull_request.title }}
"""


class Step(NamedTuple):
    where: str
    step: dict[str, Any]


def steps() -> Iterator[Step]:
    for path in FILES:
        content = yaml.safe_load(path.read_text())
        groups = content["jobs"].items() if "jobs" in content else [("steps", content["runs"])]
        for name, group in groups:
            for number, step in enumerate(group.get("steps", [])):
                where = f"{path.relative_to(GITHUB)}:{name}:{step.get('name', number)}"
                yield Step(where, step)


STEPS = list(steps())
RUNS = [one for one in STEPS if "run" in one.step]
USES = [one for one in STEPS if "uses" in one.step]


def zizmor(*paths: Path) -> subprocess.CompletedProcess[str]:
    options = ("--offline", "--no-progress", "--persona=pedantic", "--strict-collection")
    return subprocess.run(
        [Path(sys.executable).with_name("zizmor"), *options, *paths],
        capture_output=True,
        text=True,
        check=False,
    )


def actionlint(*paths: Path) -> subprocess.CompletedProcess[str]:
    # Without shellcheck: steps run lines that call scripts, which `make lint` looks at.
    return subprocess.run(
        [tool("actionlint"), "-no-color", "-shellcheck=", "-pyflakes=", *paths],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_actionlint_finds_nothing() -> None:
    done = actionlint()
    assert (done.returncode, done.stdout) == (0, "")


def test_zizmor_finds_nothing() -> None:
    done = zizmor(GITHUB)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("check", [actionlint, zizmor])
def test_a_title_in_a_shell_is_found(check: Any, tmp_path: Path) -> None:
    workflow = tmp_path / ".github" / "workflows" / "greet.yml"
    workflow.parent.mkdir(parents=True)
    workflow.write_text(INJECTION)
    found = check(workflow)
    assert found.returncode != 0
    assert "github.event.pull_request.title" in found.stdout
    workflow.write_text(INJECTION.replace("${{ github.event.pull_request.title }}", "hello"))
    assert "github.event.pull_request.title" not in check(workflow).stdout


def test_a_pin_that_is_lost_is_found(tmp_path: Path) -> None:
    copy = tmp_path / ".github"
    shutil.copytree(GITHUB, copy)
    workflow = copy / "workflows" / "ci.yml"
    pinned = workflow.read_text()
    workflow.write_text(re.sub(r"actions/checkout@\S+ # \S+", "actions/checkout@v7", pinned))
    assert zizmor(copy).returncode != 0


def test_every_action_is_pinned_by_commit_with_its_version_beside() -> None:
    lines = [line for path in FILES for line in path.read_text().splitlines() if " uses: " in line]
    assert len(lines) == len(USES) + sum("uses" in job for job in JOBS.values())
    pinned = re.compile(r"\s*(- )?uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    own = re.compile(r"\s*(- )?uses: \./\.github/(actions/[\w-]+|workflows/[\w-]+\.yml)")
    for line in lines:
        assert pinned.fullmatch(line) or own.fullmatch(line), line
    # One commit for one version, everywhere.
    pins = {line.split("uses: ")[1] for line in lines if "./" not in line}
    assert len(pins) == len({pin.partition("@")[0] for pin in pins})


def test_actions_of_our_own_are_there() -> None:
    for one in USES:
        if one.step["uses"].startswith("./"):
            assert (ROOT / one.step["uses"] / "action.yml").is_file(), one.where
    for job in JOBS.values():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()


READ = {"contents": "read"}
PERMISSIONS = {
    ("ci", "lint"): READ,
    ("ci", "test"): READ,
    ("release", "settings"): READ,
    ("release", "ci"): READ,
    ("release", "build"): {**READ, "id-token": "write", "attestations": "write"},
    ("release", "chart"): {**READ, "id-token": "write"},
    ("release", "deploy"): {**READ, "id-token": "write"},
    ("release", "summary"): READ,
}


def test_permissions_are_these_and_no_more() -> None:
    assert {where: job["permissions"] for where, job in JOBS.items()} == PERMISSIONS
    assert all(workflow["permissions"] == {} for workflow in WORKFLOWS.values())


def test_secrets_go_where_they_are_used() -> None:
    used = {
        (name, key): set(re.findall(r"secrets\.(\w+)", yaml.safe_dump(job)))
        for (name, key), job in JOBS.items()
    }
    assert {where: names for where, names in used.items() if names} == {
        ("release", "settings"): {"GCP_SA_KEY", "ARGOCD_AUTH_TOKEN"},
        ("release", "build"): {"GCP_SA_KEY"},
        ("release", "chart"): {"GCP_SA_KEY"},
        ("release", "deploy"): {"ARGOCD_AUTH_TOKEN"},
    }
    assert all("secrets" not in job for job in JOBS.values())  # none are inherited
    check = next(one.step for one in RUNS if one.step["run"] == "scripts/check-settings")
    for name in ("GCP_SA_KEY", "ARGOCD_AUTH_TOKEN"):
        assert check["env"][name] == f"${{{{ secrets.{name} != '' && 'set' || '' }}}}"


def test_only_releases_see_secrets() -> None:
    def triggers(name: str) -> Any:
        return WORKFLOWS[name][True]  # YAML reads `on` as true

    assert set(triggers("release")) == {"push", "workflow_dispatch"}
    assert triggers("release")["push"] == {"branches": ["main", "feature/CICD"]}
    assert set(triggers("ci")) == {"pull_request", "workflow_call"}
    assert "secrets." not in (GITHUB / "workflows" / "ci.yml").read_text()
    refs = re.findall(r"refs/heads/[\w/]+", WORKFLOWS["release"]["jobs"]["settings"]["if"])
    assert refs == ["refs/heads/main", "refs/heads/feature/CICD"]


def test_every_job_has_an_end_and_a_known_machine() -> None:
    for where, job in RUN_JOBS.items():
        assert 0 < job["timeout-minutes"] <= 120, where
        assert job["runs-on"] == "ubuntu-24.04", where


def test_releases_wait_for_each_other_and_checks_do_not() -> None:
    release = WORKFLOWS["release"]["concurrency"]
    assert release == {"group": "release-${{ github.ref }}", "cancel-in-progress": False}
    checks = WORKFLOWS["ci"]["concurrency"]
    assert checks["cancel-in-progress"] == "${{ github.event_name == 'pull_request' }}"
    assert not checks["group"].startswith("release-")  # a workflow would wait for itself


def test_nothing_is_pushed_before_it_was_judged() -> None:
    names = [step["name"] for step in JOBS["release", "build"]["steps"]]
    order = ["Build", "Quality gate", "Vulnerabilities", "Bill of materials", "Push",
             "Attest provenance", "Attest the bill of materials"]  # fmt: skip
    assert [name for name in names if name in order] == order
    for step in JOBS["release", "build"]["steps"]:
        if step["name"] in order:
            assert step.get("if") in (None, "vars.ATTEST != 'false'")
            assert "continue-on-error" not in step
    needs = {key: job.get("needs") for (name, key), job in JOBS.items() if name == "release"}
    assert needs == {
        "settings": None,
        "ci": "settings",
        "build": ["settings", "ci"],
        "chart": ["settings", "build"],
        "deploy": ["settings", "build", "chart"],
        "summary": ["settings", "ci", "build", "chart", "deploy"],
    }


def test_the_scan_fails_on_critical_findings_that_have_a_fix() -> None:
    [scan] = [one.step for one in STEPS if one.step.get("name") == "Vulnerabilities"]
    assert (
        scan["with"].items()
        >= {
            "input": "dist/image",
            "severity": "CRITICAL",
            "ignore-unfixed": "true",
            "exit-code": "1",
        }.items()
    )


def test_what_is_attested_and_deployed_is_the_digest_that_was_pushed() -> None:
    attested = [one.step["with"] for one in USES if "actions/attest@" in one.step["uses"]]
    assert len(attested) == 2
    for given in attested:
        assert given["subject-digest"] == "${{ steps.push.outputs.digest }}"
        assert given["push-to-registry"] is True
    assert sorted("sbom-path" in given for given in attested) == [False, True]
    build = JOBS["release", "build"]
    assert build["outputs"]["image"] == "${{ steps.push.outputs.image }}"
    [deploy] = [one.step for one in RUNS if one.step["run"] == "scripts/deploy-release"]
    assert deploy["env"]["IMAGE"] == "${{ needs.build.outputs.image }}"
    assert deploy["env"]["REVISION"] == "${{ github.sha }}"


def test_a_branch_has_its_environment() -> None:
    name = "${{ github.ref == 'refs/heads/main' && 'production' || 'staging' }}"
    having = {key: job["environment"] for (_, key), job in JOBS.items() if "environment" in job}
    assert {key: environment["name"] for key, environment in having.items()} == {
        "settings": name,
        "deploy": name,
    }
    assert having["settings"]["deployment"] is False
    for one in RUNS:
        assert one.step.get("env", {}).get("ENVIRONMENT", name) == name, one.where


def test_checkouts_leave_no_credentials() -> None:
    checkouts = [one for one in USES if one.step["uses"].startswith("actions/checkout@")]
    assert len(checkouts) == len(RUN_JOBS)
    for one in checkouts:
        assert one.step["with"]["persist-credentials"] is False, one.where


def test_both_ways_of_logging_in_are_steps_of_their_own() -> None:
    action = yaml.safe_load((GITHUB / "actions/google-login/action.yml").read_text())
    federation, key, _ = action["runs"]["steps"]
    assert (federation["if"], key["if"]) == ("inputs.auth == 'wif'", "inputs.auth == 'key'")
    assert set(federation["with"]) == {"workload_identity_provider", "service_account"}
    assert set(key["with"]) == {"credentials_json"}


# What a step runs, and the tests that run it.
_CI = "pipeline/ci"
TESTED_BY = {
    "scripts/check-settings": f"{_CI}/test_settings.py",
    "scripts/free-disk-space": f"{_CI}/test_deploy.py",
    "scripts/registry-login": f"{_CI}/test_images.py",
    "scripts/build-image": f"{_CI}/test_images.py",
    "scripts/gate": "*/test_gate*.py",
    "scripts/push-image": f"{_CI}/test_images.py",
    "scripts/push-chart": f"{_CI}/test_chart.py",
    "scripts/deploy-release": f"{_CI}/test_deploy.py",
    "scripts/summary": f"{_CI}/test_deploy.py",
    "scripts/test-packages": f"{_CI}/test_deploy.py",
    "make helm": f"{_CI}/test_chart.py",
    "make deploy-tools": f"{_CI}/test_deploy.py",
    "make audit": f"{_CI}/test_audit.py",
    "make lint": f"{_CI}/test_deploy.py",
    "make test": f"{_CI}/test_deploy.py",
}


def called(run: str) -> str:
    program, *arguments = run.split()
    return f"make {arguments[0]}" if program == "make" else program


@pytest.mark.parametrize("run", sorted({called(one.step["run"]) for one in RUNS}))
def test_what_a_step_runs_is_run_by_a_test(run: str) -> None:
    assert run in TESTED_BY, f"no test for `{run}`"
    files = list((ROOT / "tests").glob(TESTED_BY[run]))
    assert files, f"{TESTED_BY[run]} is not there"
    name = re.split("[ /]", run)[-1]
    assert any(re.search(rf'["/]{name}"', file.read_text()) for file in files)
    if run.startswith("scripts/"):
        assert (ROOT / run).stat().st_mode & 0o111, f"{run} cannot be run"


def test_the_list_of_tested_steps_is_not_longer_than_needed() -> None:
    assert set(TESTED_BY) == {called(one.step["run"]) for one in RUNS}


@pytest.mark.parametrize("one", RUNS, ids=lambda one: one.where)
def test_a_step_is_one_line_that_calls_a_script(one: Step) -> None:
    run = one.step["run"]
    assert "\n" not in run
    assert "${{" not in run
    assert not re.search(r"[;|&<>`]|\$\(", run)
    # What it names is in its own environment.
    for name in re.findall(r"\$(\w+)", run):
        assert f'"${name}"' in run
        assert name in one.step["env"]


def test_variables_and_secrets_are_documented() -> None:
    text = "".join(path.read_text() for path in FILES)
    table = (ROOT / "docs/delivery.md").read_text()
    documented = set(re.findall(r"^\| `([A-Z_]+)` \|", table, re.MULTILINE))
    assert set(re.findall(r"\b(?:vars|secrets)\.(\w+)", text)) == documented


def test_dependabot_looks_at_all_there_is() -> None:
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text())["updates"]
    places = {
        one["package-ecosystem"]: one.get("directories", [one.get("directory")]) for one in updates
    }
    assert set(places) == {"github-actions", "pip", "gomod"}
    for path in [*ROOT.glob("tests/cluster/go/*/go.mod"), *FILES]:
        folder = f"/{path.parent.relative_to(ROOT)}"
        covered = [place for found in places.values() for place in found]
        assert folder == "/.github/workflows" or any(
            Path(folder).match(place) for place in covered if place != "/"
        ), folder
    assert all(one["cooldown"]["default-days"] >= 7 for one in updates)
