"""The rest of what steps run: scripts/deploy-release and summary, the machine, make."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.chart.conftest import missing
from tests.pipeline.ci.conftest import ROOT, Pipeline

IMAGE = "europe-west4-docker.pkg.dev/p/images/t5-serve@sha256:" + 64 * "a"
COMMIT = 40 * "b"
RELEASE = {
    "IMAGE": IMAGE,
    "REVISION": COMMIT,
    "ENVIRONMENT": "staging",
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "o/t5-serve",
    "ARGOCD_SERVER": "https://argocd.example.com",
    "ARGOCD_AUTH_TOKEN": "s3cret",
}
CHART = {"CHARTS": "europe-west4-docker.pkg.dev/p/charts", "CHART_VERSION": "0.1.0-1.gabc"}

RECORDER = """\
import json, os, sys
given = [sys.argv[1:], os.environ["ARGOCD_SERVER"], os.environ["ARGOCD_AUTH_TOKEN"]]
print(json.dumps(given), flush=True)
print("said to stderr", file=sys.stderr)
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose scripts/deploy tells what it was given."""
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("common.sh", "deploy-release"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    (root / "scripts" / "deploy").write_text(RECORDER)
    for name in ("production", "staging"):
        values = root / "kuberay" / "argocd" / "values" / f"{name}.yaml"
        values.parent.mkdir(parents=True, exist_ok=True)
        values.touch()
    (root / ".tools" / "deploy" / "bin").mkdir(parents=True)
    (root / ".tools" / "deploy" / "bin" / "python").symlink_to(sys.executable)
    return root


@pytest.mark.parametrize(
    ("chart", "told"),
    [
        (CHART, ["--chart-repository", CHART["CHARTS"], "--chart-version", "0.1.0-1.gabc"]),
        # No chart was pushed: GitHub gives an output that is not there as an empty one.
        ({**CHART, "CHART_VERSION": ""}, []),
    ],
)
def test_deploy_is_given_what_was_pushed(
    pipeline: Pipeline, checkout: Path, chart: dict[str, str], told: list[str]
) -> None:
    done = pipeline.script("deploy-release", "--restart", root=checkout, **RELEASE, **chart)
    assert done.returncode == 0, done.stderr
    arguments, server, token = json.loads(done.stdout.splitlines()[0])
    assert arguments == [
        "--image", IMAGE, *told, "--values-revision", COMMIT,
        "--values-repository", "https://github.com/o/t5-serve.git",
        "--values-file", "kuberay/argocd/values/staging.yaml", "--timeout", "1800", "--restart",
    ]  # fmt: skip
    assert (server, token) == ("https://argocd.example.com", "s3cret")


def test_what_deploy_says_is_kept_and_its_failure_is_the_steps(
    pipeline: Pipeline, checkout: Path
) -> None:
    done = pipeline.script("deploy-release", root=checkout, **RELEASE, STATUS="1")
    assert done.returncode == 1
    kept = (checkout / "dist" / "deploy.txt").read_text()
    assert kept == done.stdout
    assert "said to stderr" in kept


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"IMAGE": ""}, "IMAGE is not set"),
        ({"ARGOCD_SERVER": ""}, "ARGOCD_SERVER is not set"),
        ({"ENVIRONMENT": "moon"}, "ENVIRONMENT=moon: kuberay/argocd/values/moon.yaml is not there"),
        ({"CHART_VERSION": "1.0.0"}, "CHARTS is not set"),
    ],
)
def test_deploy_release_tells_what_is_wrong(
    pipeline: Pipeline, checkout: Path, change: dict[str, str], told: str
) -> None:
    done = pipeline.script("deploy-release", root=checkout, **{**RELEASE, **change})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"deploy-release: {told}\n"


def test_deploy_release_needs_its_tools(pipeline: Pipeline, checkout: Path) -> None:
    shutil.rmtree(checkout / ".tools")
    done = pipeline.script("deploy-release", root=checkout, **RELEASE)
    assert done.returncode == 2
    assert done.stderr.endswith("python is not here: make deploy-tools\n")


def test_deploy_tools_are_what_deploy_imports(pipeline: Pipeline) -> None:
    for name in ("Makefile", "requirements-deploy.lock"):
        shutil.copy(ROOT / name, pipeline.folder)
    done = pipeline.command("make", "deploy-tools", f"PYTHON={sys.executable}", cwd=pipeline.folder)
    if done.returncode:
        missing(f"packages cannot be installed here: {done.stderr.splitlines()[-1]}")
    python = str(pipeline.folder / ".tools/deploy/bin/python")
    found = pipeline.command(python, "-c", "import httpx, yaml; print(httpx.__file__)")
    assert found.stdout.startswith(str(pipeline.folder))
    again = pipeline.command("make", "deploy-tools", cwd=pipeline.folder)
    assert "Nothing to be done" in again.stdout


NEEDS: dict[str, Any] = {
    "settings": {
        "result": "success",
        "outputs": {"console": "https://console.example/images/t5-serve"},
    },
    "ci": {"result": "success", "outputs": {}},
    "build": {
        "result": "success",
        "outputs": {"image": IMAGE, "digest": "sha256:" + 64 * "a", "tag": "0.1.0-bb"},
    },
    "chart": {"result": "success", "outputs": {"version": "0.1.0-1.gabc", "digest": "sha256:cc"}},
    "deploy": {"result": "success", "outputs": {}},
}


def summary(pipeline: Pipeline, needs: dict[str, Any], **environment: str) -> str:
    file = pipeline.folder / "summary.md"
    file.write_text("before\n")
    done = pipeline.script(
        "summary",
        **{**RELEASE, **environment},
        NEEDS=json.dumps(needs),
        GITHUB_STEP_SUMMARY=str(file),
    )
    assert done.returncode == 0, done.stderr
    text = file.read_text()
    assert text.startswith("before\n")
    return text


def test_the_summary_links_what_was_made(pipeline: Pipeline) -> None:
    text = summary(pipeline, NEEDS, SERVICE_URL="https://summarize.example.com")
    assert "## Deployed to staging; the smoke test got a summary." in text
    links = dict(re.findall(r"\[([^]]+)\]\(([^)]+)\)", text))
    assert links == {
        f"`{COMMIT[:12]}`": f"https://github.com/o/t5-serve/commit/{COMMIT}",
        f"`{IMAGE}`": f"https://console.example/images/t5-serve/sha256:{64 * 'a'}",
        "t5-summarizer": "https://argocd.example.com/applications/t5-summarizer",
    }
    assert "`0.1.0-1.gabc`" in text
    assert "<https://summarize.example.com>" in text
    assert "s3cret" not in text


@pytest.mark.parametrize(
    ("results", "verdict"),
    [
        ({"deploy": "failure"}, "Not deployed to staging: deploy failed."),
        ({"chart": "skipped"}, "Deployed to staging; the smoke test got a summary."),
        (
            {"build": "failure", "chart": "skipped", "deploy": "skipped"},
            "Not deployed to staging: build failed.",
        ),
        ({"deploy": "cancelled"}, "Not deployed to staging."),
    ],
)
def test_the_summary_says_how_it_ended(
    pipeline: Pipeline, results: dict[str, str], verdict: str
) -> None:
    needs = {
        job: {"result": results[job], "outputs": {}} if job in results else found
        for job, found in NEEDS.items()
    }
    text = summary(pipeline, needs)
    assert f"## {verdict}\n" in text
    for job, result in results.items():
        assert re.search(rf"^\| {job} \| \S* {result} \|$", text, re.MULTILINE)
    if results.get("build"):
        assert "Image" not in text


def test_a_file_is_added_to_the_summary_and_a_missing_one_is_not(pipeline: Pipeline) -> None:
    report = pipeline.folder / "report.txt"
    report.write_text("line 1\n```\nline 3\n")
    done = pipeline.script("summary", "A title", str(report))
    assert done.stdout.startswith("<details><summary>A title</summary>\n\n````text\nline 1\n```\n")
    report.write_text("x" * 100_000 + "the end")
    assert len(pipeline.script("summary", "A title", str(report)).stdout) < 61_000
    assert "the end" in pipeline.script("summary", "A title", str(report)).stdout
    gone = pipeline.script("summary", "A title", "/nowhere")
    assert (gone.returncode, gone.stdout) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["one"], "summary: summary, or summary TITLE FILE\n"), ([], "summary: NEEDS is no JSON\n")],
)
def test_summary_tells_what_is_wrong(pipeline: Pipeline, arguments: list[str], told: str) -> None:
    done = pipeline.script("summary", *arguments)
    assert (done.returncode, done.stderr) == (2, told)


def test_room_is_made_on_githubs_runners_only(pipeline: Pipeline) -> None:
    top = pipeline.folder / "root"
    unused, used = top / "usr/local/lib/android/sdk", top / "usr/local/lib/python"
    for folder in (unused, used, top / "usr/local/julia1.12"):
        folder.mkdir(parents=True)
    done = pipeline.script("free-disk-space", str(top), RUNNER_ENVIRONMENT="self-hosted")
    assert done.returncode == 0
    assert unused.exists()
    done = pipeline.script("free-disk-space", str(top), RUNNER_ENVIRONMENT="github-hosted")
    assert done.returncode == 0, done.stderr
    assert not unused.exists()
    assert not (top / "usr/local/julia1.12").exists()
    assert used.exists()


def test_packages_that_are_not_here_are_installed(pipeline: Pipeline) -> None:
    seen = pipeline.folder / "seen"
    record = f'echo "${{0##*/}} $*" >>{seen}'
    pipeline.stand_in("apt-get", record)
    pipeline.stand_in("sudo", f'{record}; "$@"')
    tools = ("env", "bash", "id", "dirname", "cat")
    for name in tools:
        (pipeline.programs / name).symlink_to(shutil.which(name) or "")
    alone = {"PATH": str(pipeline.programs)}
    for name in ("chromium", "buildah", "skopeo"):
        pipeline.stand_in(name, "")
    done = pipeline.script("test-packages", "debootstrap", **alone)
    assert done.returncode == 0, done.stderr
    [install] = [
        line for line in seen.read_text().splitlines() if line.startswith("apt-get install")
    ]
    wanted = install.partition("--no-install-recommends ")[2].split()
    assert wanted[0] == "debootstrap"
    assert not {"chromium", "buildah", "skopeo"} & set(wanted)
    seen.unlink()
    (pipeline.programs / "skopeo").unlink()
    assert pipeline.script("test-packages", **alone).returncode == 0
    assert re.search(r"^apt-get install .* skopeo$", seen.read_text(), re.MULTILINE)


def test_ci_runs_lint_and_all_tests(pipeline: Pipeline) -> None:
    lint = pipeline.command("make", "--dry-run", "lint").stdout
    for program in ("ruff check", "ruff format --check", "mypy", "shellcheck"):
        assert f".venv/bin/{program}" in lint
    test = pipeline.command("make", "--dry-run", "test").stdout
    assert lint in test
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    runs = re.findall(r"^.*\.venv/bin/pytest (.*)$", test, re.MULTILINE)
    folders = [word for run in runs for word in run.split() if not word.startswith("-")]
    assert sorted(folders) == sorted(settings["testpaths"])
    for script in (ROOT / "scripts").iterdir():
        if script.is_file() and script.read_text().startswith("#!/usr/bin/env bash"):
            assert f"scripts/{script.name}" in lint
