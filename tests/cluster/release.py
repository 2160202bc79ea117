"""The chart, installed as a user would."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.cluster.components import ROOT
from tests.cluster.kube import NAMESPACE, RELEASE, get, helm, run
from tests.cluster.load import TEXT
from tests.cluster.network import NODES

GPU_NODE = NODES[1].name
NGINX_CRDS = ROOT.parent / "shared" / "crds" / "nginx-ingress"
CHART = ROOT / "helm" / "t5-summarizer"
VALUES = (CHART / "ci" / "cpu-minimal-values.yaml", Path(__file__).parent / "values.yaml")


class Release:
    """The chart, installed."""

    def __init__(self, image: str) -> None:
        self.image = image
        self.began = 0.0
        self.took = 0.0
        self.first_summary = 0.0

    def arguments(self, *more: object, image: str | None = None) -> list[object]:
        """Of `helm install` and `helm upgrade`."""
        repository, _, tag = (image or self.image).rpartition(":")
        return [
            RELEASE, CHART, *(f"--values={path}" for path in VALUES),
            f"--set=image.repository={repository},image.tag={tag}", *more,
        ]  # fmt: skip

    def upgrade(self, *more: object, image: str | None = None) -> None:
        """`helm upgrade`, without waiting."""
        helm("upgrade", *self.arguments(*more, image=image))

    @property
    def url(self) -> str:
        """Of the Service, which can be called from here."""
        address = get("service", f"{RELEASE}-serve-svc")["spec"]["clusterIP"]
        return f"http://{address}:8000"

    def tokens(self, *command: str, secret: str = "tokens") -> str:
        """`t5-serve tokens …`, the real command; NGINX has its own Secret, `api-keys`."""
        where = f"{NAMESPACE}/{RELEASE}-{secret}"
        return run(ROOT / ".venv/bin/t5-serve", "tokens", *command, "--secret", where).strip()

    def ask(self, token: str | None) -> httpx.Response:
        """For a summary."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"{self.url}/v1/summarize"
        return httpx.post(url, json={"text": TEXT}, headers=headers, timeout=60)

    def always(self, token: str, status: int) -> bool:
        """Whether that is the status of several requests, each with a connection of its own."""
        return [self.ask(token).status_code for _ in range(8)] == [status] * 8
