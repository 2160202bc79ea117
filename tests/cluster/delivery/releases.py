"""Images of releases that go well and of such that do not, and how they reach the registry."""

from __future__ import annotations

import re
from pathlib import Path

from tests.cluster.delivery import edges
from tests.cluster.delivery.conftest import Pipeline
from tests.cluster.images import buildah

_BREAK = {
    # Ray itself does not start: the head's container crashes.
    "crashes": ("/opt/venv/bin/ray", "#!/bin/sh\necho broken >&2\nexit 1\n"),
    # Ray starts, Serve cannot import the application.
    "does-not-deploy": (
        "/opt/t5-serve/package/serve_app/app.py",
        "raise RuntimeError('this release is broken')\n",
    ),
}


def push(pipeline: Pipeline, image: str) -> str:
    """An image of the store to the registry, as a release does it. Gives it by digest."""
    layout = Path(pipeline.folder) / "image"
    buildah("push", "--quiet", "--disable-compression", image, f"oci:{layout}:release")
    tag = image.rpartition(":")[2]
    told = pipeline.script("push-image", f"{edges.IMAGES}:{tag}", LAYOUT=str(layout))
    return told.split()[-1]


def chart(pipeline: Pipeline) -> str:
    """The chart to the registry. Gives its version."""
    told = pipeline.script("push-chart", edges.CHARTS)
    return told.split()[-1]


def changed(image: str, name: str) -> str:
    """The same under another commit: what an image says of itself is part of its digest."""
    container = buildah("from", "--pull-never", image)
    buildah("config", "--label", f"org.opencontainers.image.revision={name}", container)
    buildah("commit", "--quiet", "--rm", container, f"{image}-{name}")
    return f"{image}-{name}"


def broken(image: str, name: str) -> str:
    """One that builds and is pushed, but cannot serve."""
    path, text = _BREAK[name]
    container = buildah("from", "--pull-never", image)
    mounted = Path(buildah("mount", container)) / path.removeprefix("/")
    mode = mounted.stat().st_mode
    mounted.write_text(text)
    mounted.chmod(mode)
    buildah("umount", container)
    buildah("commit", "--quiet", "--rm", container, f"{image}-{name}")
    return f"{image}-{name}"


def last_error(told: str, reason: str) -> bool:
    """Whether the error that `deploy` ended with names the reason."""
    error = told[told.rindex("deploy: ") :]
    return re.search(reason, error) is not None
