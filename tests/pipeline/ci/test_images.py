"""scripts/build-image, push-image and registry-login, with buildah, skopeo and a real registry."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app import __version__
from tests.pipeline.ci.conftest import ROOT, TOKEN, Pipeline, program

OCI = "application/vnd.oci.image.manifest.v1+json"


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Layout:
    """An OCI layout, read by hand."""

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / "blobs" / "sha256"
        [self.entry] = json.loads((folder / "index.json").read_text())["manifests"]
        self.manifest = json.loads(self.blob(self.entry["digest"]))
        self.config: dict[str, Any] = json.loads(self.blob(self.manifest["config"]["digest"]))
        self.layers = [self.blob(layer["digest"]) for layer in self.manifest["layers"]]

    def blob(self, digest: str) -> bytes:
        data = (self._blobs / digest.removeprefix("sha256:")).read_bytes()
        assert sha256(data) == digest
        return data

    @property
    def labels(self) -> dict[str, str]:
        return self.config["config"]["Labels"]


def in_registry(registry: str, repository: str, reference: str) -> bytes | None:
    """A manifest, as the registry gives it."""
    answer = httpx.get(
        f"http://{registry}/v2/{repository}/manifests/{reference}", headers={"Accept": OCI}
    )
    return answer.content if answer.status_code == 200 else None


def test_the_digest_is_the_layouts(pipeline: Pipeline) -> None:
    digest = pipeline.build()
    layout = Layout(pipeline.layout)
    assert layout.entry["digest"] == digest
    assert layout.entry["mediaType"] == OCI
    [layer] = layout.layers
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(layer))) as archive:
        held = archive.extractfile("hello.txt")
        assert held is not None
        assert held.read() == b"hello\n"


def test_the_image_says_what_it_was_built_from(pipeline: Pipeline) -> None:
    digest = pipeline.build(
        GITHUB_REPOSITORY="o/r", GITHUB_SERVER_URL="https://github.example", HUB_MODEL="google/t5"
    )
    commit = git("rev-parse", "HEAD")[:12]
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    created = datetime.fromtimestamp(int(git("log", "-1", "--format=%ct")), UTC)
    assert (
        Layout(pipeline.layout).labels.items()
        >= {
            "model": "google/t5",
            "version": __version__,
            "revision": commit,
            "created": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "source": "https://github.example/o/r",
        }.items()
    )
    assert pipeline.outputs() == {
        "name": f"t5-serve:{__version__}-{commit}",
        "tag": f"{__version__}-{commit}",
        "digest": digest,
    }


def test_the_store_has_the_image_under_the_name_that_the_gate_is_given(pipeline: Pipeline) -> None:
    pipeline.build()
    done = pipeline.command("buildah", "inspect", "--type=image", pipeline.outputs()["name"])
    assert done.returncode == 0, done.stderr
    # Docker's format keeps what OCI's has no place for.
    assert json.loads(done.stdout)["Docker"]["config"]["Shell"] == ["/bin/bash", "-c"]


def test_the_base_is_the_one_given(pipeline: Pipeline, registry: str) -> None:
    pipeline.build()
    target = f"{registry}/test/base:1"
    pushed = pipeline.script("push-image", target, PLAIN_HTTP="1")
    assert pushed.returncode == 0, pushed.stderr
    base = Layout(pipeline.layout)
    pipeline.new_store("another")
    pipeline.build(BASE_IMAGE=target, PLAIN_HTTP="1", IMAGE="derived")
    layers = Layout(pipeline.layout).config["rootfs"]["diff_ids"]
    assert layers[0] == base.config["rootfs"]["diff_ids"][0]
    assert len(layers) == 2


def test_layers_come_from_the_cache_on_another_machine(pipeline: Pipeline, registry: str) -> None:
    def copied() -> str:
        """When the layer was made."""
        [when] = [
            one["created"]
            for one in Layout(pipeline.layout).config["history"]
            if "COPY" in one["created_by"]
        ]
        return when

    cache = {"CACHE": f"{registry}/test/cache", "PLAIN_HTTP": "1"}
    pipeline.build(**cache)
    first = copied()
    pipeline.new_store("another")
    pipeline.build(**cache)
    assert copied() == first
    pipeline.new_store("too-old")
    pipeline.build(**cache, CACHE_TTL="1ns")
    assert copied() != first


def test_arguments_of_buildah_are_passed_on(pipeline: Pipeline) -> None:
    done = pipeline.script(
        "build-image",
        "--label",
        "one=with a blank",
        BUILD_ARGUMENTS="--label two=2 --label three=3",
    )
    assert done.returncode == 0, done.stderr
    labels = Layout(pipeline.layout).labels
    assert (labels["one"], labels["two"], labels["three"]) == ("with a blank", "2", "3")


def test_layers_may_stay_uncompressed(pipeline: Pipeline) -> None:
    program("skopeo")
    pipeline.build(UNCOMPRESSED="1")
    layout = Layout(pipeline.layout)
    assert [sha256(layer) for layer in layout.layers] == layout.config["rootfs"]["diff_ids"]


def test_a_second_build_replaces_the_layout(pipeline: Pipeline) -> None:
    pipeline.build()
    (pipeline.context / "hello.txt").write_text("changed\n")
    assert Layout(pipeline.layout).entry["digest"] != pipeline.build()
    assert len(list((pipeline.layout / "blobs" / "sha256").iterdir())) == 3


def test_make_image_builds_the_same_and_writes_no_layout(pipeline: Pipeline) -> None:
    program("buildah")
    done = pipeline.command("make", "image", "BUILDER=buildah", "IMAGE=here/t5")
    assert done.returncode == 0, done.stderr
    assert not pipeline.layout.exists()
    pipeline.build()
    tag = pipeline.outputs()["tag"]
    ids = [
        pipeline.command("buildah", "images", "--quiet", "--no-trunc", f"{name}:{tag}").stdout
        for name in ("here/t5", "t5-serve")
    ]
    assert ids[0] == ids[1] != ""


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"CONTEXT": "/nowhere"}, "/nowhere/Dockerfile is not there"),
        ({"BUILDER": "no-such-builder"}, "no-such-builder is not here"),
        ({"LAYOUT": "precious"}, "precious is there and is no OCI layout"),
    ],
)
def test_build_image_tells_what_is_wrong(
    pipeline: Pipeline, environment: dict[str, str], told: str
) -> None:
    program("buildah")
    kept = pipeline.folder / "precious"
    kept.mkdir()
    done = subprocess.run(
        [ROOT / "scripts" / "build-image"],
        cwd=pipeline.folder, env=pipeline.environment(**environment),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"build-image: {told}")
    assert kept.exists()


def test_a_broken_build_is_no_release(pipeline: Pipeline) -> None:
    program("buildah")
    (pipeline.context / "hello.txt").unlink()
    done = pipeline.script("build-image")
    assert done.returncode != 0
    assert done.stdout == ""
    assert not pipeline.layout.exists()
    assert pipeline.outputs() == {}


def test_what_is_pushed_is_the_layout_bit_for_bit(pipeline: Pipeline, registry: str) -> None:
    program("skopeo")
    digest = pipeline.build()
    done = pipeline.script("push-image", f"{registry}/p/images/t5-serve:1.0", PLAIN_HTTP="1")
    assert done.returncode == 0, done.stderr
    image = f"{registry}/p/images/t5-serve@{digest}"
    assert done.stdout == f"{image}\n"
    assert pipeline.outputs().items() >= {"image": image, "digest": digest}.items()
    layout = Layout(pipeline.layout)
    for reference in ("1.0", digest):
        manifest = in_registry(registry, "p/images/t5-serve", reference)
        assert manifest == layout.blob(digest)
    for part in (layout.manifest["config"], *layout.manifest["layers"]):
        url = f"http://{registry}/v2/p/images/t5-serve/blobs/{part['digest']}"
        assert httpx.get(url).content == layout.blob(part["digest"])


def test_pushing_twice_is_pushing_once(pipeline: Pipeline, registry: str) -> None:
    program("skopeo")
    pipeline.build()
    target = f"{registry}/twice/t5-serve:1"
    first = pipeline.script("push-image", target, PLAIN_HTTP="1")
    second = pipeline.script("push-image", target, PLAIN_HTTP="1")
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert second.stderr == f"push-image: {target} is there already\n"


def test_a_tag_moves_and_the_digest_stays(pipeline: Pipeline, registry: str) -> None:
    program("skopeo")
    target = f"{registry}/moving/t5-serve:1"
    digests = []
    for text in ("one\n", "two\n"):
        (pipeline.context / "hello.txt").write_text(text)
        digests.append(pipeline.build())
        assert pipeline.script("push-image", target, PLAIN_HTTP="1").returncode == 0
    tagged = in_registry(registry, "moving/t5-serve", "1")
    assert tagged is not None
    assert sha256(tagged) == digests[1]
    assert in_registry(registry, "moving/t5-serve", digests[0]) is not None


@pytest.mark.parametrize(
    "arguments",
    [[], ["host/t5-serve"], ["t5-serve:1"], ["host/a@sha256:1"], ["host/a:1", "host/b:1"]],
)
def test_push_image_wants_a_repository_and_a_tag(pipeline: Pipeline, arguments: list[str]) -> None:
    done = pipeline.script("push-image", *arguments)
    assert done.returncode == 2
    assert done.stderr == f"push-image: push-image REPOSITORY:TAG, not '{' '.join(arguments)}'\n"


def test_push_image_wants_a_layout(pipeline: Pipeline) -> None:
    done = pipeline.script("push-image", "host/t5-serve:1")
    assert done.returncode == 2
    assert "is no OCI layout: scripts/build-image writes it" in done.stderr


def test_a_registry_that_is_not_there_is_told(pipeline: Pipeline) -> None:
    program("skopeo")
    pipeline.build()
    done = pipeline.script("push-image", "127.0.0.1:1/p/t5-serve:1", PLAIN_HTTP="1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.endswith("push-image: 127.0.0.1:1/p/t5-serve:1 was not pushed\n")


def test_a_login_opens_the_registry_for_all_tools(pipeline: Pipeline, locked_registry: str) -> None:
    buildah = program("buildah")
    program("skopeo")
    pipeline.build()
    target = f"{locked_registry}/p/images/t5-serve:1"
    assert pipeline.script("push-image", target, PLAIN_HTTP="1").returncode == 1

    pipeline.stand_in("gcloud", f'[ "$*" = "auth print-access-token" ] && echo {TOKEN}')
    seen = pipeline.folder / "seen"
    pipeline.stand_in("buildah", f'echo "$@" >>{seen}; exec {buildah} "$@"')
    done = pipeline.script("registry-login", locked_registry, PLAIN_HTTP="1")
    assert done.returncode == 0, done.stderr
    assert "login" in seen.read_text()
    assert TOKEN not in seen.read_text() + done.stdout + done.stderr

    done = pipeline.script("push-image", target, PLAIN_HTTP="1")
    assert done.returncode == 0, done.stderr
    cached = pipeline.script(
        "build-image", CACHE=f"{locked_registry}/p/images/cache", PLAIN_HTTP="1"
    )
    assert cached.returncode == 0, cached.stderr
    if shutil.which("helm") or (ROOT / ".tools/bin/helm").exists():
        chart = pipeline.script("push-chart", f"{locked_registry}/p/charts", PLAIN_HTTP="1")
        assert chart.returncode == 0, chart.stderr


@pytest.mark.parametrize(
    ("gcloud", "told"),
    [
        ("echo 'You are not logged in' >&2; exit 1", "gcloud gives no access token (see above)"),
        ("true", "gcloud gives an empty access token"),
        ("echo another-token", "{registry} does not take the token"),
    ],
)
def test_a_login_that_fails_is_told(
    pipeline: Pipeline, locked_registry: str, gcloud: str, told: str
) -> None:
    program("buildah")
    pipeline.stand_in("gcloud", gcloud)
    done = pipeline.script("registry-login", locked_registry, PLAIN_HTTP="1", GITHUB_ACTIONS="true")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"::error::registry-login: {told.format(registry=locked_registry)}"
    assert "another-token" not in done.stderr


def test_login_wants_a_host(pipeline: Pipeline) -> None:
    done = pipeline.script("registry-login", "host/path")
    assert (done.returncode, done.stderr) == (
        2,
        "registry-login: registry-login HOST, not 'host/path'\n",
    )
