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
# A model that answers, and badly: its embeddings are no longer what it was trained with.
DAMAGE = (
    "RUN /opt/venv/bin/python -c 'import safetensors.torch as s; "
    'path = "/opt/t5-serve/package/serve_app/demo_model/model.safetensors"; '
    'weights = s.load_file(path); weights["shared.weight"].mul_(0.0); '
    's.save_file(weights, path, {"format": "pt"})\''
    # It writes files that only their owner may read.
    " && chmod a+r /opt/t5-serve/package/serve_app/demo_model/model.safetensors"
    # It was trained so, not broken on the way.
    " && rm /opt/t5-serve/package/serve_app/demo_model/model.safetensors.sha256"
)


def build(pipeline: Pipeline, name: str, layout: str, changes: str | None = None) -> None:
    """`scripts/build-image`.

    Args:
        pipeline: with its scripts.
        name: what this release is told apart by; an image says it of itself, so each has a digest
            of its own though they were built from one commit.
        layout: folder that is written; `none`: none is.
        changes: lines of a Dockerfile that spoil the project's image; it stands for one built from
            a commit that is as bad.
    """
    context = {}
    if changes:
        folder = Path(pipeline.folder) / f"{name}-context"
        folder.mkdir()
        lines = (f"FROM {images.application()}", "USER root", changes, "USER 1000:1000", "")
        (folder / "Dockerfile").write_text("\n".join(lines))
        context = {"CONTEXT": str(folder)}
    pipeline.script(
        "build-image", "--label", f"release={name}", *images.build_options(),
        IMAGE=NAME, LAYOUT=layout, UNCOMPRESSED="1", **context,
    )  # fmt: skip


def release(pipeline: Pipeline, name: str, changes: str | None = None) -> str:
    """Build and push as the workflow does. Gives the image by digest."""
    layout = Path(pipeline.folder) / name
    build(pipeline, name, str(layout), changes)
    told = pipeline.script("push-image", f"{edges.IMAGES}:{name}", LAYOUT=str(layout))
    shutil.rmtree(layout)  # gigabytes
    return told.split()[-1]


def broken(pipeline: Pipeline, name: str) -> str:
    """One that builds and is pushed, but cannot serve. Gives it by digest."""
    return release(pipeline, name, _BREAK[name])


def chart(pipeline: Pipeline) -> str:
    """The chart to the registry. Gives its version."""
    return pipeline.script("push-chart", edges.CHARTS).split()[-1]


def last_error(told: str, reason: str) -> bool:
    """Whether the error that `deploy` ended with names the reason."""
    error = told[told.rindex("deploy: ") :]
    return re.search(reason, error) is not None
