"""Images of releases that go well and of such that do not, and how they reach the registry."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.cluster import images
from tests.cluster.delivery import edges
from tests.cluster.delivery.conftest import Pipeline

NAME = "localhost/t5-release"
_BREAK = {
    # Ray itself does not start: the head's container crashes.
    "crashes": "RUN printf '#!/bin/sh\\nexit 1\\n' > /opt/venv/bin/ray",
    # Ray starts, Serve cannot import the application.
    "does-not-deploy": (
        "RUN echo 'raise RuntimeError(\"this release is broken\")' "
        "> /opt/t5-serve/package/serve_app/app.py"
    ),
}


def release(pipeline: Pipeline, name: str, dockerfile: str | None = None) -> str:
    """Build and push as the workflow does. Gives the image by digest.

    Args:
        pipeline: with its scripts.
        name: what this release is told apart by; an image says it of itself, so each has a digest
            of its own though they were built from one commit.
        dockerfile: instead of the project's.
    """
    layout = Path(pipeline.folder) / name
    context = {}
    if dockerfile:
        folder = Path(pipeline.folder) / f"{name}-context"
        folder.mkdir()
        (folder / "Dockerfile").write_text(dockerfile)
        context = {"CONTEXT": str(folder)}
    pipeline.script(
        "build-image", "--label", f"release={name}", *images.build_options(),
        IMAGE=NAME, LAYOUT=str(layout), UNCOMPRESSED="1", **context,
    )  # fmt: skip
    told = pipeline.script("push-image", f"{edges.IMAGES}:{name}", LAYOUT=str(layout))
    shutil.rmtree(layout)  # gigabytes
    return told.split()[-1]


def broken(pipeline: Pipeline, name: str) -> str:
    """One that builds and is pushed, but cannot serve. Gives it by digest."""
    lines = (f"FROM {images.application()}", "USER root", _BREAK[name], "USER 1000:1000")
    return release(pipeline, name, "\n".join(lines) + "\n")


def chart(pipeline: Pipeline) -> str:
    """The chart to the registry. Gives its version."""
    return pipeline.script("push-chart", edges.CHARTS).split()[-1]


def last_error(told: str, reason: str) -> bool:
    """Whether the error that `deploy` ended with names the reason."""
    error = told[told.rindex("deploy: ") :]
    return re.search(reason, error) is not None
