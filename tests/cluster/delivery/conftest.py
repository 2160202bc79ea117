"""The pipeline's own scripts, run by hand as a workflow runs them, against this cluster's edges."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.cluster import images, kube
from tests.cluster.components import HELM, ROOT
from tests.cluster.delivery import argocd, edges
from tests.cluster.release import Release
from tests.cluster.say import say

VALUES_FILES = (
    "helm/t5-summarizer/ci/cpu-minimal-values.yaml",
    "kuberay/argocd/values/test.yaml",
)
_VALUES = yaml.safe_load((ROOT / "tests" / "cluster" / "values.yaml").read_text()) | {
    # Pulled from the registry, like anywhere else.
    "image": {"pullPolicy": "IfNotPresent"},
    "smokeTest": {"enabled": True, "tokenSecret": {"name": "t5-smoke-token"}},
}


@dataclass
class Pipeline:
    """What the workflow does between a push and a served summary."""

    token: str
    folder: str

    def script(self, name: str, *arguments: str, ok: bool = True, **more: str) -> str:
        """Run `scripts/NAME`. Gives what it wrote; its last line is on stdout alone."""
        environment = {
            **images.store_environment(),
            # As on a runner: programs of this environment, Helm, and trust in the registry.
            "PATH": f"{os.path.dirname(sys.executable)}:{HELM.parent}:{os.environ['PATH']}",
            "SSL_CERT_FILE": str(edges.CERTIFICATE),
            "ARGOCD_SERVER": argocd.server(),
            "ARGOCD_AUTH_TOKEN": self.token,
            "GITHUB_OUTPUT": str(Path(self.folder, "outputs")),
            **more,
        }
        began = time.monotonic()
        done = subprocess.run(
            [ROOT / "scripts" / name, *arguments],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        say(f"scripts/{name}: exit status {done.returncode}, {time.monotonic() - began:.0f} s")
        if (done.returncode == 0) != ok:
            pytest.fail(f"scripts/{name}: exit status {done.returncode}\n{done.stdout}")
        return done.stdout

    def built(self) -> str:
        """Name of what `scripts/build-image` has built, as it tells the workflow."""
        return Path(self.folder, "outputs").read_text().rpartition("name=")[2].splitlines()[0]

    def deploy(self, image: str, values: str, *more: str, ok: bool = True) -> str:
        """`scripts/deploy`, of an image and a commit of the values."""
        files = (f"--values-file={path}" for path in VALUES_FILES)
        return self.script(
            "deploy", f"--image={image}", f"--values-revision={values}",
            f"--values-repository={edges.GIT}", f"--chart-repository={edges.CHARTS}", *files,
            "--timeout=420", *more, ok=ok,
        )  # fmt: skip


def values(**changes: object) -> str:
    """Commit the test's values with changes. Gives the commit."""
    text = yaml.safe_dump(_VALUES | changes)
    return edges.commit({VALUES_FILES[1]: text}, "Values of the test")


@pytest.fixture(scope="session")
def edge(cluster: None) -> Iterator[None]:
    """Registry and git."""
    with edges.running():
        yield


@pytest.fixture(scope="session")
def pipeline(
    edge: None, operator: None, gpu_node: None, tmp_path_factory: pytest.TempPathFactory
) -> Pipeline:
    """Argo CD is there, and has a role for the pipeline."""
    argocd.install()
    return Pipeline(argocd.ci_token(), str(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="session")
def smoke_token(pipeline: Pipeline) -> str:
    """The smoke test's and the tests' own token, made before the first release as the docs say."""
    kube.kubectl("create", "namespace", kube.NAMESPACE, namespace="default")
    token = Release("").tokens("create", "smoke-test", "--secret-type", "Opaque")
    kube.kubectl("create", "secret", "generic", "t5-smoke-token", f"--from-literal=token={token}")
    return token
