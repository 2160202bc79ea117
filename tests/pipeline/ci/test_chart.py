"""scripts/push-chart with the real Helm and a real registry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml

from tests.chart.conftest import CHART, tool
from tests.pipeline.ci.conftest import Pipeline

# The expression that semver.org recommends, in parts.
_NUMBER = r"(?:0|[1-9]\d*)"
_IDENTIFIER = rf"(?:{_NUMBER}|\d*[a-zA-Z-][0-9a-zA-Z-]*)"
SEMVER = re.compile(rf"({_NUMBER})\.({_NUMBER})\.({_NUMBER})-({_IDENTIFIER}(?:\.{_IDENTIFIER})*)")
OCI_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")


class Checkout:
    """A git repository with a chart in it."""

    def __init__(self, folder: Path) -> None:
        self.chart = folder / "t5-summarizer"
        shutil.copytree(CHART, self.chart)
        self._git("init", "--quiet")

    def commit(self, when: int) -> str:
        self._git("add", "--all")
        self._git("commit", "--quiet", "--allow-empty", "--message=test", date=f"@{when} +0000")
        return self._git("rev-parse", "HEAD").strip()

    def write(self, text: str) -> None:
        (self.chart / "templates" / "more.yaml").write_text(f"# {text}\n")

    def _git(self, *arguments: str, date: str = "") -> str:
        who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        dates = {"GIT_COMMITTER_DATE": date, "GIT_AUTHOR_DATE": date} if date else {}
        return subprocess.run(
            ["git", *who, *arguments], cwd=self.chart.parent, check=True, capture_output=True,
            text=True, env={**os.environ, **dates},
        ).stdout  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    folder = tmp_path / "checkout"
    folder.mkdir()
    return Checkout(folder)


@pytest.fixture
def charts(registry: str, tmp_path: Path) -> str:
    """A place of its own in the registry."""
    return f"{registry}/{re.sub('[^a-z0-9]', '-', tmp_path.name.lower()).strip('-')}/charts"


@pytest.fixture
def helm() -> str:
    return tool("helm")


def push(
    pipeline: Pipeline, helm: str, charts: str, chart: Path = CHART, **environment: str
) -> subprocess.CompletedProcess[str]:
    return pipeline.script(
        "push-chart", charts, HELM=helm, CHART=str(chart), PLAIN_HTTP="1", **environment
    )


def pull(helm: str, charts: str, version: str, folder: Path) -> Path:
    done = subprocess.run(
        [helm, "pull", f"oci://{charts}/t5-summarizer", "--version", version, "--plain-http",
         "--untar", "--untardir", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "t5-summarizer"


def test_the_pushed_chart_is_the_chart_for_that_image(
    pipeline: Pipeline, checkout: Checkout, charts: str, helm: str
) -> None:
    commit = checkout.commit(1_800_000_000)
    done = push(pipeline, helm, charts, checkout.chart, APP_VERSION="9.8.7-0123456789ab")
    assert done.returncode == 0, done.stderr
    own = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    version = f"{own}-1800000000.g{commit[:12]}"
    assert done.stdout == f"{version}\n"
    pulled = pull(helm, charts, version, pipeline.folder / "pulled")
    said = yaml.safe_load((pulled / "Chart.yaml").read_text())
    assert (said["version"], said["appVersion"]) == (version, "9.8.7-0123456789ab")

    def rendered(chart: Path, *more: str) -> str:
        done = subprocess.run(
            [helm, "template", "t5", chart, *more], capture_output=True, text=True, check=True
        )
        return re.sub(r" *(helm.sh/chart|app.kubernetes.io/version): .*\n", "", done.stdout)

    tag = ("--set-string", "image.tag=1")
    assert rendered(pulled, *tag) == rendered(CHART, *tag)
    assert re.search(r"image: \S+:9\.8\.7-0123456789ab\b", rendered(pulled).replace('"', ""))


def test_the_outputs_are_version_and_digest(
    pipeline: Pipeline, checkout: Checkout, charts: str, helm: str
) -> None:
    checkout.commit(1_800_000_000)
    version = push(pipeline, helm, charts, checkout.chart).stdout.strip()
    host, _, path = charts.partition("/")
    answer = httpx.get(
        f"http://{host}/v2/{path}/t5-summarizer/manifests/{version}",
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
    )
    digest = subprocess.run(["sha256sum"], input=answer.content, capture_output=True, check=True)
    assert pipeline.outputs() == {
        "version": version,
        "digest": f"sha256:{digest.stdout.decode().split()[0]}",
    }


def test_a_later_commit_has_the_higher_version(
    pipeline: Pipeline, checkout: Checkout, charts: str, helm: str
) -> None:
    order = []
    for when in (999_999_999, 1_700_000_000, 1_700_000_001, 10_000_000_000):
        checkout.commit(when)
        version = push(pipeline, helm, charts, checkout.chart).stdout.strip()
        assert OCI_TAG.fullmatch(version)
        parts = SEMVER.fullmatch(version)
        assert parts, version
        # Numbers by their value, and lower than words: that is SemVer's order.
        order.append([(0, int(one), "") if one.isdigit() else (1, 0, one)
                      for one in parts[4].split(".")])  # fmt: skip
    assert order == sorted(order)
    assert len(order) == 4


def test_the_same_content_may_be_pushed_twice(
    pipeline: Pipeline, checkout: Checkout, charts: str, helm: str
) -> None:
    checkout.commit(1_800_000_000)
    first = push(pipeline, helm, charts, checkout.chart)
    told = pipeline.outputs()
    second = push(pipeline, helm, charts, checkout.chart)
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert "is there already" in second.stderr
    assert pipeline.outputs() == told


def test_other_content_under_a_version_is_refused(
    pipeline: Pipeline, checkout: Checkout, charts: str, helm: str
) -> None:
    checkout.commit(1_800_000_000)
    checkout.write("one")
    first = push(pipeline, helm, charts, checkout.chart)
    version = first.stdout.strip()
    assert version.endswith(".dirty")
    checkout.write("another")
    second = push(pipeline, helm, charts, checkout.chart)
    assert second.returncode == 1
    assert second.stdout == ""
    assert f"t5-summarizer {version} is in {charts} with other content" in second.stderr
    kept = pull(helm, charts, version, pipeline.folder / "pulled")
    assert (kept / "templates" / "more.yaml").read_text() == "# one\n"


def test_a_registry_that_is_not_there_is_told(pipeline: Pipeline, helm: str) -> None:
    done = push(pipeline, helm, "127.0.0.1:1/charts")
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("push-chart: cannot look for t5-summarizer ")


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        ([], {}, "push-chart REGISTRY/PATH, not ''"),
        (["host"], {}, "push-chart REGISTRY/PATH, not 'host'"),
        (["host/charts"], {"CHART": "/nowhere"}, "/nowhere has no Chart.yaml"),
        (["host/charts"], {"HELM": "/no/helm"}, "/no/helm is not here: make helm"),
    ],
)
def test_push_chart_tells_what_is_wrong(
    pipeline: Pipeline, arguments: list[str], environment: dict[str, str], told: str
) -> None:
    done = pipeline.script("push-chart", *arguments, **environment)
    assert (done.returncode, done.stderr) == (2, f"push-chart: {told}\n")


def test_make_helm_builds_the_pinned_one(pipeline: Pipeline) -> None:
    makefile = (Path(__file__).parents[3] / "Makefile").read_text()
    shutil.copy(Path(__file__).parents[3] / "Makefile", pipeline.folder)
    done = pipeline.command("make", "--dry-run", "helm", cwd=pipeline.folder)
    [version] = re.findall(r"^HELM_VERSION := (v4\.\d+\.\d+)$", makefile, re.MULTILINE)
    assert f"go install helm.sh/helm/v4/cmd/helm@{version}" in done.stdout
    assert f"GOBIN={pipeline.folder}/.tools/bin" in done.stdout
