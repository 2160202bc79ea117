"""The pipeline's scripts as its jobs start them, and a real registry in place of Google's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.chart.conftest import missing
from tests.cluster.components import BIN, COMPONENTS

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "not-a-real-token"
# It, as htpasswd keeps it.
_LOCK = "oauth2accesstoken:$2b$04$LQsq9mbeeSu53kSqqmFZe.0iyqTvnIXHhs.Pzb05fHfrhAxjYnzVW\n"

DOCKERFILE = """\
ARG BASE_IMAGE=scratch
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-c"]
COPY hello.txt /hello.txt
ARG HUB_MODEL=""
ARG VERSION=""
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
LABEL model="${HUB_MODEL}" version="${VERSION}" revision="${REVISION}" created="${CREATED}" \\
      source="${SOURCE}"
CMD ["/hello.txt"]
"""


def program(name: str, package: str | None = None) -> str:
    """A program that CI must have; elsewhere its tests skip."""
    found = shutil.which(name)
    return found or missing(f"{name} is not here: apt-get install {package or name}")


class Pipeline:
    """A job's machine: a home, a store of images, a file of outputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.home = folder / "home"
        self.home.mkdir()
        self.layout = folder / "image"
        self._outputs = folder / "outputs"
        self.context = folder / "context"
        self.context.mkdir()
        (self.context / "Dockerfile").write_text(DOCKERFILE)
        (self.context / "hello.txt").write_text("hello\n")
        self.new_store("store")

    def new_store(self, name: str) -> None:
        """As on a new machine: no image is there."""
        store = self.folder / name
        self._storage = self.folder / f"{name}.conf"
        self._storage.write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{store}/images"\nrunroot = "{store}/run"\n'
        )

    def environment(self, **more: str) -> dict[str, str]:
        self._outputs.touch()
        return {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "CONTAINERS_STORAGE_CONF": str(self._storage),
            "CONTEXT": str(self.context),
            "LAYOUT": str(self.layout),
            "GITHUB_OUTPUT": str(self._outputs),
            **more,
        }

    def script(
        self, name: str, *arguments: str, root: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return self.command(str(root / "scripts" / name), *arguments, **environment)

    def command(
        self, *command: str, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            check=False,
        )

    def outputs(self) -> dict[str, str]:
        """What later steps can read."""
        lines = self._outputs.read_text().splitlines() if self._outputs.exists() else []
        return dict(line.split("=", 1) for line in lines)

    def build(self, **environment: str) -> str:
        """Gives the digest."""
        program("buildah")
        done = self.script("build-image", **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def stand_in(self, name: str, text: str) -> None:
        """A program of that name comes first on the PATH."""
        (self.programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self.programs / name).chmod(0o755)


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(tmp_path)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a registry."""
    with _serving(tmp_path_factory.mktemp("registry"), "") as address:
        yield address


@pytest.fixture(scope="session")
def locked_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of one that wants TOKEN."""
    folder = tmp_path_factory.mktemp("locked-registry")
    (folder / "lock").write_text(_LOCK)
    lock = f"auth: {{htpasswd: {{realm: registry, path: {folder}/lock}}}}\n"
    with _serving(folder, lock) as address:
        yield address


@contextmanager
def _serving(folder: Path, more: str) -> Iterator[str]:
    [component] = [one for one in COMPONENTS if one.folder == "registry"]
    if not (BIN / "registry").exists() and shutil.which("go") is None:
        missing("a registry is built with go, which is not here")
    BIN.mkdir(parents=True, exist_ok=True)
    component.build()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = folder / "registry.yml"
    settings.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n"
        f"http: {{addr: '{address}'}}\n{more}"
    )
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [BIN / "registry", "serve", settings],
            stdout=log,
            stderr=log,
            env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
        )
    try:
        for _ in range(300):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                httpx.get(f"http://{address}/v2/")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        else:
            pytest.fail("the registry does not answer")
        yield address
    finally:
        process.terminate()
        process.wait()
