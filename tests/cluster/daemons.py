"""The cluster's processes. Runs as process 1 of namespaces of its own (machine.py makes them).

Whatever is started, mounted or routed in here goes when this process goes: there is nothing that
could be left behind but control groups, which machine.py removes.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml

from tests.cluster.components import BIN, HOME
from tests.cluster.network import (
    API_PORT,
    BRIDGE,
    BRIDGE_NETWORK,
    DNS,
    INSIDE,
    NODES,
    SERVICES,
    Node,
)
from tests.cluster.say import say

RUN = HOME / "run"
LOGS = RUN / "logs"
READY = RUN / "ready"
KUBECONFIG = RUN / "kubeconfig"
CERTIFICATES = RUN / "certificates"
REGISTRIES = RUN / "registries"  # containerd's certs.d: how to reach a registry
PAUSE_IMAGE = "t5.local/pause:1"
_SERVER = f"https://{INSIDE}:{API_PORT}"


@dataclass
class Daemon:
    """A process that must live as long as the cluster."""

    name: str
    process: subprocess.Popen[bytes]


_daemons: list[Daemon] = []


def _start(name: str, *command: str | Path) -> None:
    log = open(LOGS / f"{name}.log", "ab")  # noqa: SIM115 (the child's)
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
    )
    _daemons.append(Daemon(name, process))


def _until(what: str, true: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for it; end the cluster when a daemon ends or time is up."""
    end = time.monotonic() + seconds
    while not true():
        _check()
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {seconds:.0f} s; logs are in {LOGS}")
        time.sleep(0.2)


def _check() -> None:
    for daemon in _daemons:
        if daemon.process.poll() is not None:
            tail = (LOGS / f"{daemon.name}.log").read_text(errors="replace").splitlines()[-15:]
            sys.exit(f"{daemon.name} ended with {daemon.process.returncode}:\n" + "\n".join(tail))


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _sh(*command: str) -> None:
    subprocess.run(command, check=True)


def _namespaces() -> None:
    # The kubelet's mounts must reach the containers and nothing outside.
    _sh("mount", "--make-rshared", "/")
    _sh("mount", "-t", "tmpfs", "tmpfs", "/run")
    _sh("ip", "link", "set", "lo", "up")
    _sh("ip", "link", "add", BRIDGE, "type", "bridge")
    _sh("ip", "address", "add", f"{DNS}/16", "dev", BRIDGE)
    _sh("ip", "link", "set", BRIDGE, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _linked() -> bool:
    found = subprocess.run(["ip", "-4", "address"], capture_output=True, text=True, check=True)
    return INSIDE in found.stdout


def _reap() -> None:
    """What lost its parent, such as containers' shims, is process 1's to bury."""
    own = {daemon.process.pid for daemon in _daemons}
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (ended := os.waitid(os.P_ALL, 0, options)) and ended.si_pid not in own:
        os.waitpid(ended.si_pid, 0)


def _keys() -> str:
    CERTIFICATES.mkdir(mode=0o700)
    key = CERTIFICATES / "service-accounts.key"
    _sh("openssl", "genrsa", "-out", str(key), "2048")
    token = secrets.token_hex(32)
    tokens = CERTIFICATES / "tokens.csv"
    tokens.touch(mode=0o600)
    tokens.write_text(f'{token},admin,admin,"system:masters"\n')
    return token


def _control_plane() -> None:
    token = _keys()
    _start(
        "etcd", "etcd", "--data-dir", RUN / "etcd", "--unsafe-no-fsync",
        "--listen-client-urls", "http://127.0.0.1:2379",
        "--advertise-client-urls", "http://127.0.0.1:2379",
        "--listen-peer-urls", "http://127.0.0.1:2380",
    )  # fmt: skip
    _until("etcd", lambda: _answers("http://127.0.0.1:2379/health"))
    _start(
        "kube-apiserver", BIN / "kube-apiserver",
        "--etcd-servers=http://127.0.0.1:2379",
        f"--advertise-address={INSIDE}", f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={SERVICES}",
        f"--cert-dir={CERTIFICATES}", f"--token-auth-file={CERTIFICATES / 'tokens.csv'}",
        "--authorization-mode=Node,RBAC", "--allow-privileged=true",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={CERTIFICATES / 'service-accounts.key'}",
        f"--service-account-signing-key-file={CERTIFICATES / 'service-accounts.key'}",
        # Else `kubectl logs` and `exec` would look nodes up by name.
        "--kubelet-preferred-address-types=InternalIP",
    )  # fmt: skip
    certificate = CERTIFICATES / "apiserver.crt"
    _until("kube-apiserver's certificate", certificate.exists)
    KUBECONFIG.touch(mode=0o600)
    KUBECONFIG.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "t5",
                "contexts": [{"name": "t5", "context": {"cluster": "t5", "user": "admin"}}],
                "clusters": [
                    {
                        "name": "t5",
                        "cluster": {"server": _SERVER, "certificate-authority": str(certificate)},
                    }
                ],
                "users": [{"name": "admin", "user": {"token": token}}],
            }
        )
    )
    _until("kube-apiserver", lambda: _kubectl("get", "--raw", "/readyz"))
    _start(
        "kube-controller-manager", BIN / "kube-controller-manager", f"--kubeconfig={KUBECONFIG}",
        f"--service-account-private-key-file={CERTIFICATES / 'service-accounts.key'}",
        f"--root-ca-file={certificate}", "--use-service-account-credentials",
        "--leader-elect=false",
    )  # fmt: skip
    _start(
        "kube-scheduler", BIN / "kube-scheduler", f"--kubeconfig={KUBECONFIG}",
        "--leader-elect=false",
    )  # fmt: skip


def _kubectl(*arguments: str) -> bool:
    command = [BIN / "kubectl", f"--kubeconfig={KUBECONFIG}", *arguments]
    return subprocess.run(command, capture_output=True).returncode == 0


def _dns() -> None:
    corefile = RUN / "Corefile"
    corefile.write_text(
        f".:53 {{\n"
        f"    bind {DNS}\n"
        f"    errors\n"
        f"    kubernetes cluster.local in-addr.arpa {{\n"
        f"        kubeconfig {KUBECONFIG} t5\n"
        f"    }}\n"
        f"}}\n"
    )
    _start("coredns", BIN / "coredns", "-conf", corefile)


def _redis() -> None:
    """Keeps its state on disk, and is started again when a test has killed it."""
    folder = RUN / "redis"
    folder.mkdir()
    command = (
        f"redis-server --bind {DNS} --protected-mode no --dir {folder} --save '' "
        "--appendonly yes --appendfsync always"
    )
    _start("redis", "sh", "-c", f"while :; do {command}; sleep 1; done")


def _containerd(node: Node) -> None:
    config = RUN / f"containerd-{node.name}.toml"
    config.write_text(
        f"""version = 2
root = "{node.images}"
state = "/run/{node.name}/containerd"
[grpc]
address = "{node.socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
restrict_oom_score_adj = true
enable_unprivileged_ports = true
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "{REGISTRIES}"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{RUN / "cni"}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"""
    )
    _start(f"containerd-{node.name}", "containerd", "--config", config)
    _until("containerd", lambda: Path(node.socket).exists())


def _kubelet(node: Node) -> None:
    folder = RUN / f"kubelet-{node.name}"
    folder.mkdir()
    resolv = RUN / "resolv.conf"
    resolv.write_text(f"nameserver {DNS}\n")
    config = RUN / f"kubelet-{node.name}.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kubelet.config.k8s.io/v1beta1",
                "kind": "KubeletConfiguration",
                "address": node.address,
                "port": node.port,
                "healthzPort": 0,
                "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
                "authorization": {"mode": "AlwaysAllow"},
                "containerRuntimeEndpoint": f"unix://{node.socket}",
                "cgroupDriver": "cgroupfs",
                "cgroupRoot": f"/{node.cgroup}",
                "failCgroupV1": False,
                "failSwapOn": False,
                "clusterDNS": [DNS],
                "clusterDomain": "cluster.local",
                "resolvConf": str(resolv),
                "podLogsDir": str(LOGS / f"pods-{node.name}"),
                "volumePluginDir": str(folder / "volume-plugins"),
                "evictionHard": {"memory.available": "200Mi", "nodefs.available": "200Mi"},
                "imageGCHighThresholdPercent": 100,
                "imageGCLowThresholdPercent": 99,
                # How soon a mounted Secret follows its object; a minute by default.
                "syncFrequency": "10s",
            }
        )
    )
    _start(
        f"kubelet-{node.name}", BIN / "kubelet", f"--kubeconfig={KUBECONFIG}",
        f"--config={config}", f"--root-dir={folder}", f"--cert-dir={folder / 'pki'}",
        f"--hostname-override={node.name}", f"--node-ip={node.address}",
    )  # fmt: skip


def _nodes() -> None:
    (RUN / "cni").mkdir()
    (RUN / "cni" / "10-bridge.conflist").write_text(
        json.dumps(
            {
                "cniVersion": "0.4.0",
                "name": "t5",
                "plugins": [
                    {
                        "type": "bridge",
                        "bridge": BRIDGE,
                        "isGateway": True,
                        "ipMasq": True,
                        "hairpinMode": True,
                        "ipam": {
                            "type": "host-local",
                            "ranges": [[{"subnet": BRIDGE_NETWORK, "gateway": DNS}]],
                            "routes": [{"dst": "0.0.0.0/0"}],
                            "dataDir": "/run/cni",
                        },
                    },
                    {"type": "portmap", "capabilities": {"portMappings": True}},
                ],
            }
        )
    )
    for node in NODES:
        _containerd(node)
        _kubelet(node)
    _start(
        "kube-proxy", BIN / "kube-proxy", f"--kubeconfig={KUBECONFIG}", "--proxy-mode=iptables",
        f"--hostname-override={NODES[0].name}", f"--cluster-cidr={BRIDGE_NETWORK}",
        "--conntrack-max-per-core=0",
    )  # fmt: skip
    for node in NODES:
        _until(
            f"node {node.name}",
            lambda name=node.name: _kubectl(  # type: ignore[misc]
                "wait", "--for=condition=Ready", f"node/{name}", "--timeout=1s"
            ),
        )


def _end(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)  # process 1 of its namespace: the kernel ends all others


def main() -> None:
    """Start everything, say that it is ready, and watch over it."""
    signal.signal(signal.SIGTERM, _end)
    LOGS.mkdir(parents=True, exist_ok=True)
    _namespaces()
    _until("the link to the host", _linked, 30)
    _control_plane()
    _dns()
    _redis()
    _nodes()
    READY.touch()
    say("the cluster runs")
    while True:
        _reap()
        _check()
        time.sleep(1)


if __name__ == "__main__":
    main()
