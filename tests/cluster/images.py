"""The images: the project's own Dockerfile on a Debian base, the operator's, and the sandbox's."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cluster import components, machine
from tests.cluster.components import BIN, HOME, KUBERAY, ROOT
from tests.cluster.daemons import PAUSE_IMAGE
from tests.cluster.say import say

OPERATOR = f"t5.local/kuberay-operator:{KUBERAY}"
REPOSITORY = "t5.local/t5-serve"
ARGOCD_IMAGE = f"t5.local/argocd:{components.ARGOCD}"
BASE = "localhost/t5-base:bookworm"
_STORE = HOME / "buildah"
_BUILT_FROM = (
    "Dockerfile",
    ".dockerignore",
    "pyproject.toml",
    "requirements.lock",
    "requirements-build.lock",
    "serve_app",
)


def buildah(*arguments: str | Path) -> str:
    """Output of buildah, on the harness' own store."""
    command = ["buildah", *map(str, arguments)]
    found = subprocess.run(
        command, env=store_environment(), check=True, stdout=subprocess.PIPE, text=True
    )
    return found.stdout.strip()


def application_tag() -> str:
    """Names the content: what the Dockerfile copies, as it is now, but for README and licence."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *_BUILT_FROM],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    digest = hashlib.sha256()
    for name in sorted(filter(None, listed.stdout.split("\0"))):
        path = ROOT / name
        if path.exists():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def start() -> None:
    """The cluster, and what its nodes cannot do without; the image is built meanwhile."""
    if reasons := components.missing():
        sys.exit("the cluster cannot run here:\n  " + "\n  ".join(reasons))
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(prepare)
        machine.up()
        building.result()
    pause()


def prepare() -> None:
    """Build what the nodes will be given, as far as that needs no cluster: it takes minutes."""
    name = f"{REPOSITORY}:{application_tag()}"
    if not _stamp(name).exists() and not _stored(name):
        _build_application(name)


def application() -> str:
    """Name of the image of this working tree; built and loaded if the nodes do not have it."""
    name = f"{REPOSITORY}:{application_tag()}"
    _have(name, _build_application)
    return name


def operator() -> str:
    """The KubeRay operator's."""
    _have(OPERATOR, lambda name: _from_binary(name, BIN / "kuberay-operator", "/manager"))
    return OPERATOR


def pause() -> None:
    """The sandbox's."""
    _have(PAUSE_IMAGE, lambda name: _from_binary(name, BIN / "pause", "/pause"))


def _have(name: str, build: Callable[[str], None]) -> None:
    if machine.has_image(name):
        return
    if not _stored(name):
        build(name)
    say(f"loading {name} …")
    layout = _STORE / "layout"
    shutil.rmtree(layout, ignore_errors=True)
    # By skopeo: buildah compresses whatever it writes as a layout, for minutes.
    subprocess.run(
        [
            "skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers",
            f"containers-storage:{name}", f"oci:{layout}:{name}",
        ],
        env=store_environment(), check=True,
    )  # fmt: skip
    machine.load(layout)
    shutil.rmtree(layout)
    # Not before: layers that the images share are there already.
    machine.forget_others(name)
    _stamp(name).touch()
    say(f"loaded {name}")


def _stamp(name: str) -> Path:
    return HOME / "images" / f"{name.replace('/', '_')}.loaded"


def _stored(name: str) -> bool:
    return bool(buildah("images", "--quiet", "--filter", f"reference={name}"))


def _from_binary(name: str, binary: Path, target: str) -> None:
    container = buildah("from", "scratch")
    buildah("copy", "--quiet", "--chmod", "0755", container, binary, target)
    buildah("config", "--entrypoint", f'["{target}"]', "--user", "65532:65532", container)
    buildah("commit", "--quiet", "--rm", container, name)


def argocd() -> str:
    """Argo CD's, with git, Helm and Redis."""
    components.ARGOCD_COMPONENT.build()
    _have(ARGOCD_IMAGE, _build_argocd)
    return ARGOCD_IMAGE


def _build_argocd(name: str) -> None:
    context = _STORE / "argocd"
    context.mkdir(exist_ok=True)
    shutil.copy(BIN / "argocd", context)
    shutil.copy(components.HELM, context)
    dockerfile = components.HERE / "delivery" / "argocd.Dockerfile"
    _build(name, context, f"--file={dockerfile}")
    shutil.rmtree(context)


def _build_application(name: str) -> None:
    _build(name, ROOT)


def _build(name: str, context: Path, *more: str) -> None:
    if not _stored(BASE):
        _build_base()
    say(f"building {name} …")
    with open(_log(name.rpartition("/")[2].partition(":")[0]), "w") as log:
        subprocess.run(
            ["buildah", "build", "--format=docker", "--layers", *build_options(),
             f"--tag={name}", *more, context],
            env=store_environment(), check=True, stdout=log, stderr=log,
        )  # fmt: skip
    say(f"built {name}")


def store_environment() -> dict[str, str]:
    """For buildah and skopeo, to use the harness' own store: see containers-storage.conf(5)."""
    _STORE.mkdir(parents=True, exist_ok=True)
    path = _STORE / "storage.conf"
    folders = {"graphroot": _STORE / "storage", "runroot": _STORE / "run"}
    lines = ("[storage]", 'driver = "overlay"', *(f'{k} = "{v}"' for k, v in folders.items()))
    path.write_text("\n".join(lines) + "\n")
    return {**os.environ, "CONTAINERS_STORAGE_CONF": str(path)}


def build_options() -> list[str]:
    """What a build needs on this machine, whose only base is our own."""
    return [
        "--isolation=chroot", "--network=host",
        *_lent(), f"--build-arg=BASE_IMAGE={BASE}",
    ]  # fmt: skip


def _lent() -> list[str]:
    """How this machine reaches packages: lent to the build, and not in the image."""
    lent = {"/etc/apt": "/etc/apt", "/etc/ssl/certs": "/lent/certs"}
    if (settings := Path("/etc/pip.conf")).exists():
        # Certificates at a place of their own: the image's own package of them may be upgraded.
        copy = _STORE / "pip.conf"
        copy.write_text(settings.read_text().replace("/etc/ssl/certs", "/lent/certs"))
        lent[str(copy)] = "/etc/pip.conf"
    return [f"--volume={source}:{target}:ro" for source, target in lent.items()]


def _log(name: str) -> Path:
    folder = HOME / "build-logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"


def _build_base() -> None:
    say("building the Debian base …")
    folder = _STORE / "base"
    subprocess.run(["rm", "-rf", folder], check=True)
    mirror = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[0]
    with open(_log("base"), "w") as log:
        subprocess.run(
            [
                "debootstrap", "--variant=minbase",
                "--include=python3,python3-venv,ca-certificates", "bookworm", folder, mirror,
            ],
            check=True, stdout=log, stderr=log,
        )  # fmt: skip
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, folder, "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    subprocess.run(["rm", "-rf", folder], check=True)
    say("built the Debian base")
