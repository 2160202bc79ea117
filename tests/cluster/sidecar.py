"""What the usage sidecars pass on, as a node's log agent reads it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from types import TracebackType
from typing import IO

from tests.cluster import kube
from tests.cluster.components import BIN
from tests.cluster.daemons import KUBECONFIG
from tests.cluster.kube import NAMESPACE

_CONTAINER = "usage"
_PASSED_ON_S = 3.0  # the writer's thread, the tail's half second, the kubelet


class SidecarLogs:
    """Output of the sidecars of all Api pods in the block, those that go meanwhile included."""

    def __enter__(self) -> SidecarLogs:
        # A pod's log goes with the pod; an agent on the node has followed it, as is done here.
        self._followed: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        for pod in kube.names(kube.pods("api")):
            file = tempfile.TemporaryFile()
            command = [
                str(BIN / "kubectl"), "--namespace", NAMESPACE,
                "logs", pod, "--container", _CONTAINER, "--follow",
            ]  # fmt: skip
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "KUBECONFIG": str(KUBECONFIG)},
            )
            self._followed[pod] = process, file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: object, trace: TracebackType | None
    ) -> None:
        time.sleep(_PASSED_ON_S)
        self._texts = []
        there = kube.names(kube.pods("api"))
        for pod in there:
            self._texts.append(kube.kubectl("logs", pod, "--container", _CONTAINER, "--tail=-1"))
        for pod, (process, file) in self._followed.items():
            process.terminate()
            process.wait()
            if pod not in there:
                file.seek(0)
                self._texts.append(file.read().decode())
            file.close()

    def requests(self) -> Counter[str]:
        """How often each request id was passed on. All lines must be events."""
        events = [json.loads(line) for text in self._texts for line in text.splitlines()]
        return Counter(event["request_id"] for event in events)
