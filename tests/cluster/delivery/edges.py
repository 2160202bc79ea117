"""What lies outside the cluster: a registry in place of Artifact Registry, git in place of GitHub.

Both are the real programs, in the cluster's network.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from tests.cluster import kube, machine
from tests.cluster.components import BIN, ROOT
from tests.cluster.daemons import LOGS, REGISTRIES, RUN
from tests.cluster.network import DNS

REGISTRY = DNS  # at port 443: Argo CD takes no port in the address of a chart repository
IMAGES = f"{REGISTRY}/t5/images/t5-serve"
CHARTS = f"{REGISTRY}/t5/charts"
GIT = f"git://{DNS}/t5-serve.git"
CERTIFICATE = RUN / "registry.crt"
_GIT = RUN / "git"


@contextmanager
def running() -> Iterator[None]:
    """The registry and the git server."""
    _certificate()
    _git()
    started = [
        _inside("registry", BIN / "registry", "serve", _registry_settings()),
        _inside(
            "git", "git", "daemon", f"--base-path={_GIT}", "--export-all", f"--listen={DNS}",
            "--reuseaddr",
        ),
    ]  # fmt: skip
    try:
        kube.until("the registry", lambda: _registry("/v2/").raise_for_status(), 30, every=0.2)
        yield
    finally:
        for process in started:
            process.terminate()
            process.wait()


def commit(files: dict[str, str], message: str) -> str:
    """Put files into the repository. Gives the commit."""
    work = _GIT / "work"
    for path, text in files.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_text(text)
    _run("add", "--all")
    _run("commit", "--quiet", "--allow-empty", f"--message={message}")
    _run("push", "--quiet", str(_GIT / "t5-serve.git"), "HEAD:main")
    return _run("rev-parse", "HEAD").strip()


def tags(repository: str) -> set[str]:
    """Of a repository of the registry, such as `t5/images/t5-serve`."""
    answer = _registry(f"/v2/{repository}/tags/list")
    return set(answer.json().get("tags") or []) if answer.status_code == 200 else set()


def _registry(path: str) -> httpx.Response:
    trust = ssl.create_default_context(cafile=CERTIFICATE)
    return httpx.get(f"https://{REGISTRY}{path}", verify=trust)


def _run(*arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=_GIT / "work", check=True, capture_output=True, text=True
    ).stdout


def _inside(name: str, *command: str | Path) -> subprocess.Popen[bytes]:
    with open(LOGS / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            [
                # They end with the tests, however these end.
                "nsenter", f"--target={machine.running()}", "--mount", "--net",
                "setpriv", "--pdeathsig=TERM", *command,
            ],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
        )  # fmt: skip


def _certificate() -> None:
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-subj", "/CN=registry", "-addext", f"subjectAltName=IP:{DNS}",
            "-keyout", RUN / "registry.key", "-out", CERTIFICATE,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    folder = REGISTRIES / REGISTRY
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.toml").write_text(
        f'server = "https://{REGISTRY}"\n[host."https://{REGISTRY}"]\nca = "{CERTIFICATE}"\n'
    )


def _registry_settings() -> Path:
    path = RUN / "registry.yaml"
    http = {
        "addr": f"{REGISTRY}:443",
        "tls": {"certificate": str(CERTIFICATE), "key": str(RUN / "registry.key")},
    }
    storage = {"filesystem": {"rootdirectory": str(RUN / "registry")}}
    path.write_text(yaml.safe_dump({"version": 0.1, "storage": storage, "http": http}))
    return path


def _git() -> None:
    shutil.rmtree(_GIT, ignore_errors=True)
    (_GIT / "work").mkdir(parents=True)
    subprocess.run(
        ["git", "init", "--quiet", "--bare", "--initial-branch=main", _GIT / "t5-serve.git"],
        check=True,
    )
    _run("init", "--quiet", "--initial-branch=main")
    # The chart and the values as they are in this checkout, committed or not.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "helm", "kuberay"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    files = {name: (ROOT / name).read_text() for name in listed.split() if (ROOT / name).exists()}
    commit(files, "Chart and values")
