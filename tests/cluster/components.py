"""What the cluster is made of, and where each part comes from.

| part | version | from |
|---|---|---|
| kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy, kubectl | 1.34.4 | Go module `k8s.io/kubernetes` |
| KubeRay operator, its CRDs and roles | 1.6.2 | Go module `github.com/ray-project/kuberay/ray-operator` |
| CoreDNS | 1.15.0 | Go module `github.com/coredns/coredns` |
| OCI registry | 3.1.2 | Go module `github.com/distribution/distribution/v3` |
| Argo CD (`make test-delivery` only) | 3.2.6 | Go module `github.com/argoproj/argo-cd/v3` |
| Helm | as in the Makefile | Go module `helm.sh/helm/v4` (`make chart-tools`) |
| etcd, containerd, runc, CNI plugins, iptables, buildah, skopeo, debootstrap, Redis | Debian's | `PACKAGES` |

Versions are pinned by the `go.mod` and `go.sum` in `go/`.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.say import say

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOME = ROOT / ".tools" / "cluster"  # everything that is built, kept or run
BIN = HOME / "bin"
HELM = ROOT / ".tools" / "bin" / "helm"

# Of which the image takes most, CUDA's libraries being in it: built once, unpacked on two nodes.
DISK = 45e9

KUBERNETES = "v1.34.4"
KUBERAY = "v1.6.2"
KUBERAY_MODULE = "github.com/ray-project/kuberay/ray-operator"
ARGOCD = "v3.2.6"
ARGOCD_MODULE = "github.com/argoproj/argo-cd/v3"

# Debian package: a program or file by which it is known to be there.
PACKAGES = {
    "etcd-server": "/usr/bin/etcd",
    "containerd": "/usr/bin/containerd",
    "runc": "/usr/sbin/runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iptables": "/usr/sbin/iptables",
    "conntrack": "/usr/sbin/conntrack",
    "iproute2": "/usr/sbin/ip",
    "buildah": "/usr/bin/buildah",
    "skopeo": "/usr/bin/skopeo",
    "debootstrap": "/usr/sbin/debootstrap",
    "redis-server": "/usr/bin/redis-server",
}


@dataclass(frozen=True)
class Component:
    """Programs of one Go module; `folder` of `go/` has its go.mod."""

    folder: str
    packages: tuple[str, ...]
    ldflags: str = "-s -w"
    names: dict[str, str] = field(default_factory=dict)  # package: another name of the program

    def build(self) -> None:
        """Build what is not there at this version."""
        source = HERE / "go" / self.folder
        key = hashlib.sha256(self.ldflags.encode())
        for path in sorted(source.iterdir()):
            key.update(path.read_bytes())
        stamp = BIN / f".{self.folder}-{key.hexdigest()[:16]}"
        if stamp.exists():
            return
        say(f"building {self.folder} …")
        for package in self.packages:
            name = self.names.get(package, package.rpartition("/")[2])
            subprocess.run(
                ["go", "build", "-trimpath", f"-ldflags={self.ldflags}", "-o", BIN / name, package],
                cwd=source,
                env={**os.environ, "CGO_ENABLED": "0"},
                check=True,
            )
        for old in BIN.glob(f".{self.folder}-*"):
            old.unlink()
        stamp.touch()
        say(f"built {self.folder}")


_VERSION = "k8s.io/component-base/version"
COMPONENTS = (
    Component(
        "kubernetes",
        tuple(
            f"k8s.io/kubernetes/cmd/{name}"
            for name in (
                "kube-apiserver",
                "kube-controller-manager",
                "kube-scheduler",
                "kubelet",
                "kube-proxy",
                "kubectl",
            )
        ),
        f"-s -w -X {_VERSION}.gitVersion={KUBERNETES} -X {_VERSION}.gitMajor=1 "
        f"-X {_VERSION}.gitMinor=34",
    ),
    Component("kuberay", (KUBERAY_MODULE,), names={KUBERAY_MODULE: "kuberay-operator"}),
    Component("coredns", ("github.com/coredns/coredns",)),
    Component("registry", ("github.com/distribution/distribution/v3/cmd/registry",)),
    Component("pause", (".",), names={".": "pause"}),
)


ARGOCD_COMPONENT = Component(
    "argocd",
    (f"{ARGOCD_MODULE}/cmd",),
    f"-s -w -X {ARGOCD_MODULE}/common.version={ARGOCD.removeprefix('v')}",
    {f"{ARGOCD_MODULE}/cmd": "argocd"},
)


def build() -> None:
    """All components."""
    BIN.mkdir(parents=True, exist_ok=True)
    for component in COMPONENTS:
        component.build()


def kuberay_config() -> Path:
    """KubeRay's own manifests: CRDs, roles and the operator's Deployment."""
    return _source("kuberay", KUBERAY_MODULE) / "config"


def argocd_manifests() -> Path:
    """Argo CD's own manifests."""
    return _source("argocd", ARGOCD_MODULE) / "manifests"


def _source(folder: str, module: str) -> Path:
    found = subprocess.run(
        ["go", "list", "-m", "-f", "{{.Dir}}", module],
        cwd=HERE / "go" / folder,
        check=True,
        capture_output=True,
        text=True,
    )
    return Path(found.stdout.strip())


def absent() -> list[str]:
    """Debian packages that are not here."""
    return [name for name, path in PACKAGES.items() if not Path(path).exists()]


def missing() -> list[str]:
    """Why this machine cannot run the cluster; empty if it can."""
    found = []
    if os.geteuid() != 0:
        found.append("must be run as root: it makes namespaces, mounts and a bridge")
    if shutil.which("go") is None:
        found.append("go is not here: Kubernetes is built from its module")
    if not Path("/sys/fs/cgroup").is_dir() or not os.access("/sys/fs/cgroup", os.W_OK):
        found.append("/sys/fs/cgroup cannot be written to: the kubelet needs control groups")
    elif subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"]).returncode:
        found.append("namespaces cannot be made here")
    free = shutil.disk_usage(ROOT).free
    if not (HOME / "images").exists() and free < DISK:
        found.append(f"{free / 1e9:.0f} GB are free on this disk, {DISK / 1e9:.0f} are needed")
    if packages := absent():
        found.append(f"Debian packages are missing: apt-get install {' '.join(packages)}")
    return found
