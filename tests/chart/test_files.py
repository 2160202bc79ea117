"""Files that follow from others: the chart's README, the plain RayService, versions, the image."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import serve_app
from tests.chart.conftest import CHART, CI_VALUES, INGRESS, ROOT, Helm, Object, Rendered, tool

PYPROJECT = (ROOT / "pyproject.toml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def pinned(package: str) -> str:
    [version] = re.findall(rf'^    "{re.escape(package)}==([\d.]+)",$', PYPROJECT, re.MULTILINE)
    return str(version)


def test_ray_in_the_chart_is_ray_in_the_image(render: Callable[..., Rendered]) -> None:
    wanted = pinned("ray[serve]")
    assert render().cluster["rayVersion"] == wanted
    # The image installs this lock and nothing else.
    assert f"\nray[serve]=={wanted} " in (ROOT / "requirements.lock").read_text() or (
        f"\nray=={wanted} " in (ROOT / "requirements.lock").read_text()
    )


def test_the_application_in_the_chart_is_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == serve_app.__version__


def test_the_readme_of_the_chart_is_current(tmp_path: Path) -> None:
    program = tool("helm-docs")
    copy = tmp_path / CHART.name
    shutil.copytree(CHART, copy)
    (copy / "README.md").unlink()
    subprocess.run(
        [program, "--chart-search-root", copy, "--log-level", "warning"], check=True, cwd=tmp_path
    )
    made = (copy / "README.md").read_text()
    assert made == (CHART / "README.md").read_text(), "run `make chart`"


def test_every_value_is_described() -> None:
    rows = re.findall(
        r"^\| (\S+) \| \w+ \| .* \| (.*) \|$", (CHART / "README.md").read_text(), re.M
    )
    assert len(rows) > 150
    assert [key for key, description in rows if not description.strip()] == []


def test_the_plain_rayservice_is_current(helm: Helm) -> None:
    shown = ("serviceaccount", "rayservice")
    done = helm(
        "template",
        "t5-summarizer",
        CHART,
        "--namespace",
        "default",
        *(part for name in shown for part in ("--show-only", f"templates/{name}.yaml")),
    )
    assert done.returncode == 0, done.stderr

    def plain(text: str) -> list[Object]:
        objects = [one for one in yaml.safe_load_all(text) if one]
        for one in objects:
            for key in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
                one["metadata"]["labels"].pop(key, None)
        return objects

    kept = (ROOT / "kuberay" / "rayservice.yaml").read_text()
    assert plain(done.stdout) == plain(kept), "run `make chart`"
    assert "Helm" not in kept


@pytest.mark.parametrize("values", CI_VALUES, ids=lambda path: path.stem)
def test_the_notes_tell_the_next_command(helm: Helm, values: Path) -> None:
    done = helm(
        "install", "t5", CHART, "--namespace", "prod", "--dry-run=client", "--values", values
    )
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    given = yaml.safe_load(values.read_text())
    ingress = given.get("ingress", {}).get("enabled")
    existing = given.get("tokens", {}).get("existingSecret")
    secret = existing or f"t5-t5-summarizer-{'api-keys' if ingress else 'tokens'}"
    assert f"t5-serve tokens create my-client --secret prod/{secret})" in notes
    assert "kubectl -n prod wait --for=condition=Ready" in notes
    if ingress:
        scheme = "https" if given["ingress"]["tls"]["secretName"] else "http"
        assert f"curl -sS {scheme}://summarize.example.com/v1/summarize" in notes
    else:
        assert "port-forward svc/t5-t5-summarizer-serve-svc 8000" in notes
    fault_tolerant = given.get("gcsFaultTolerance", {}).get("enabled", False)
    assert ("gcsFaultTolerance is off" in notes) is not fault_tolerant


def test_the_notes_warn_of_tokens_in_clear(helm: Helm, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(INGRESS))
    done = helm("install", "t5", CHART, "--dry-run=client", "--values", values)
    assert "cross the network in clear" in done.stdout


def test_the_image_runs_as_nobody_in_particular_on_the_base_it_is_given() -> None:
    assert re.search(r"^ARG BASE_IMAGE=python:3\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.MULTILINE)
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert bases == ["${BASE_IMAGE}", "runtime", "runtime"]
    build = DOCKERFILE[DOCKERFILE.index("AS build") : DOCKERFILE.rindex("\nFROM ")]
    run = DOCKERFILE.replace(build, "")
    user = re.findall(r"^USER (\d+):(\d+)$", run, re.MULTILINE)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert user == [(str(values["securityContext"]["runAsUser"]),) * 2]
    for package in ("bash", "wget", "libgomp1"):
        assert re.search(rf"\b{package}\b", run)
    assert "g++" not in run


def test_the_image_installs_nothing_without_a_hash() -> None:
    for line in re.findall(r"pip install[^&]*", DOCKERFILE):
        own = "--no-deps" in line and "/dist/*.whl" in line
        assert "--require-hashes" in line or own, line
    for lock in ("requirements.lock", "requirements-build.lock"):
        text = (ROOT / lock).read_text()
        requirements = re.findall(r"^[a-z0-9].*?(?=^[a-z0-9]|\Z)", text, re.MULTILINE | re.DOTALL)
        assert requirements
        assert all("--hash=sha256:" in one for one in requirements)
    backend = re.findall(r'^requires = \["(.*)"\]$', PYPROJECT, re.MULTILINE)
    assert f"{backend[0]} " in (ROOT / "requirements-build.lock").read_text()


def test_the_build_context_holds_all_that_is_copied() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    copied = [
        name
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for name in line.split()
    ]
    assert copied
    for name in copied:
        assert f"!{name}" in ignored, name
        assert (ROOT / name).exists(), name


def test_the_node_pool_is_as_asked() -> None:
    script = ROOT / "kuberay" / "gpu-node-pool.sh"

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        path = {"PATH": os.environ["PATH"]}
        return subprocess.run(
            ["bash", script], env={**path, **environment}, capture_output=True, text=True
        )

    made = run(CLUSTER="c", LOCATION="l")
    assert made.returncode == 0, made.stderr
    assert "type=nvidia-l4\\,count=1" in made.stdout
    assert "--machine-type g2-standard-4" in made.stdout
    assert "--spot" not in made.stdout
    spot = run(CLUSTER="c", LOCATION="l", SPOT="1", ZONES="a,b").stdout
    assert "--spot --node-taints cloud.google.com/gke-spot=true:NoSchedule" in spot
    refused = run(LOCATION="l")
    assert refused.returncode != 0
    assert "CLUSTER" in refused.stderr
