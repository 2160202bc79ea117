"""The chart through the real Helm: rendered objects, and schemas to hold them against."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "t5-summarizer"
CI_VALUES = sorted((CHART / "ci").glob("*-values.yaml"))
TOOLS = ROOT / ".tools"
SCHEMAS = TOOLS / "schemas"
NGINX_CRDS = ROOT.parent / "shared" / "crds" / "nginx-ingress"

Object = dict[str, Any]


def tool(name: str) -> str:
    """A tool that `make chart-tools` builds. CI must have it; elsewhere its tests skip."""
    found = TOOLS / "bin" / name
    path = str(found) if found.exists() else shutil.which(name)
    if path is None:
        missing(f"{name} is not here: `make chart-tools` builds it and needs go")
    return path


def missing(reason: str) -> Any:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Rendered:
    """What a release consists of."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.objects: list[Object] = [one for one in yaml.safe_load_all(text) if one]

    def all(self, kind: str) -> list[Object]:
        return [one for one in self.objects if one["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Object:
        found = [one for one in self.all(kind) if name in (None, one["metadata"]["name"])]
        assert len(found) == 1, [one["metadata"]["name"] for one in self.all(kind)]
        return found[0]

    @property
    def cluster(self) -> Object:
        return self.one("RayService")["spec"]["rayClusterConfig"]

    @property
    def serve(self) -> Object:
        return yaml.safe_load(self.one("RayService")["spec"]["serveConfigV2"])

    @property
    def arguments(self) -> Object:
        [application] = self.serve["applications"]
        return application["args"]

    def deployment(self, name: str) -> Object:
        [application] = self.serve["applications"]
        [found] = [one for one in application["deployments"] if one["name"] == name]
        return found

    def group(self, name: str) -> Object:
        [found] = [one for one in self.cluster["workerGroupSpecs"] if one["groupName"] == name]
        return found

    def pod(self, name: str) -> Object:
        """The pod spec of the head or of a worker group."""
        held = self.cluster["headGroupSpec"] if name == "head" else self.group(name)
        return held["template"]["spec"]


class Helm:
    def __init__(self, program: str) -> None:
        self._program = program

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, *map(str, arguments)], capture_output=True, text=True, timeout=120
        )

    @cache  # noqa: B019  # one Helm for the whole session
    def _template(self, values: str, files: tuple[Path, ...], name: str) -> Any:
        files_given = [part for file in files for part in ("--values", file)]
        return subprocess.run(
            [self._program, "template", name, CHART, "-n", "prod", *files_given, "--values", "-"],
            input=values,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def render(self, values: Object | None = None, *files: Path, name: str = "t5") -> Rendered:
        done = self._template(json.dumps(values or {}), files, name)
        assert done.returncode == 0, done.stderr
        return Rendered(done.stdout)

    def refuse(self, values: Object, name: str = "t5") -> str:
        """What Helm says of values that it must not take."""
        done = self._template(json.dumps(values), (), name)
        assert done.returncode != 0, "taken, and should not have been"
        return done.stderr


@pytest.fixture(scope="session")
def helm() -> Helm:
    return Helm(tool("helm"))


@pytest.fixture(scope="session")
def render(helm: Helm) -> Callable[..., Rendered]:
    return helm.render


@pytest.fixture(scope="session")
def refuse(helm: Helm) -> Callable[..., str]:
    return helm.refuse


@pytest.fixture(params=CI_VALUES, ids=lambda path: path.stem.removesuffix("-values"))
def ci_release(request: pytest.FixtureRequest, helm: Helm) -> Rendered:
    return helm.render(None, request.param)


INGRESS: Object = {"ingress": {"enabled": True, "host": "summarize.example.com"}}
