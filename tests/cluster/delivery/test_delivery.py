"""From a push to a served summary, and back when it goes wrong: one release after the other."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from tests.cluster import images, kube
from tests.cluster.delivery import argocd, edges, releases
from tests.cluster.delivery.conftest import Pipeline, values
from tests.cluster.load import Load
from tests.cluster.release import Release

_RATE = 4.0


@dataclass
class Served:
    """What the releases so far have led to."""

    token: str
    image: str = ""
    values: str = ""
    chart: str = ""
    release: Release = field(default_factory=lambda: Release(""))


@pytest.fixture(scope="session")
def first(
    pipeline: Pipeline, image: str, smoke_token: str, figure: Callable[[str, str], None]
) -> Served:
    """The first release."""
    served = Served(smoke_token)
    began = time.monotonic()
    served.image = releases.release(pipeline, "first")
    pushed = time.monotonic()
    served.chart = releases.chart(pipeline)
    served.values = values()
    told = pipeline.deploy(served.image, served.values, f"--chart-version={served.chart}")
    assert "healthy, and the smoke test has passed" in told
    answer = served.release.ask(smoke_token)
    assert answer.status_code == 200, answer.text
    figure(
        "from a commit to the first summary",
        f"{time.monotonic() - began:.0f} s, of which the image {pushed - began:.0f} s",
    )
    return served


def test_the_first_release_is_served(first: Served) -> None:
    assert kube.images() == {first.image}
    assert first.release.ask("t5s_wrong").status_code in (401, 403)
    log = kube.kubectl("logs", f"job/{kube.RELEASE}-smoke")
    assert "summary: " in log
    assert "refused without a valid token" in log


def test_it_stays_synced_and_tokens_stay(first: Served) -> None:
    # The CRD's defaults and KubeRay's own changes are no difference, nor is what the tokens command
    # wrote.
    argocd.refresh()
    status = argocd.application()["status"]
    assert (status["sync"]["status"], status["health"]["status"]) == ("Synced", "Healthy")
    states = {f"{r['kind']} {r['name']}": r.get("status") for r in status["resources"]}
    assert {state for name, state in states.items() if not name.startswith("Job")} == {"Synced"}
    assert first.release.always(first.token, 200)


def test_a_change_by_hand_is_taken_back(first: Served) -> None:
    name = f"networkpolicy/{kube.RELEASE}"
    kube.kubectl("delete", name)
    kube.until("Argo CD made it again", lambda: kube.kubectl("get", name), 120)


def test_the_next_release_replaces_the_first_without_a_failed_request(
    first: Served, pipeline: Pipeline, figure: Callable[[str, str], None]
) -> None:
    old = kube.active_cluster()
    began = time.monotonic()
    with Load(first.release.url, first.token, _RATE) as load:
        made = releases.release(pipeline, "next")
        pushed = time.monotonic()
        assert made != first.image
        told = pipeline.deploy(made, first.values, f"--chart-version={first.chart}")
        took = time.monotonic() - pushed
        # Healthy means the new one: `Ready` was true all the time.
        assert kube.active_cluster() != old
        assert kube.images() == {made}
    assert f"now: {first.image}" in told
    figure(
        "next release",
        f"built and pushed in {pushed - began:.0f} s, deployed in {took:.0f} s, {load.summary()}",
    )
    assert load.failed == []
    first.image = made


def test_the_same_release_again_changes_nothing(first: Served, pipeline: Pipeline) -> None:
    pods = kube.names(kube.pods())
    pipeline.deploy(first.image, first.values, f"--chart-version={first.chart}")
    assert kube.names(kube.pods("head")) <= pods
    assert kube.images() == {first.image}


def test_the_chart_of_the_commit_serves_as_well_as_the_pushed_one(
    first: Served, pipeline: Pipeline
) -> None:
    cluster = kube.active_cluster()
    pipeline.deploy(first.image, first.values)
    [chart, _] = argocd.application()["spec"]["sources"]
    assert (chart["path"], chart["targetRevision"]) == ("helm/t5-summarizer", first.values)
    assert kube.active_cluster() == cluster  # the same pods: nothing to restart
    pipeline.deploy(first.image, first.values, f"--chart-version={first.chart}")


def test_a_restart_makes_a_new_cluster(first: Served, pipeline: Pipeline) -> None:
    old = kube.active_cluster()
    with Load(first.release.url, first.token, _RATE) as load:
        pipeline.deploy(first.image, first.values, f"--chart-version={first.chart}", "--restart")
        assert kube.active_cluster() != old
    assert load.failed == []
    argocd.refresh()
    assert argocd.application()["status"]["sync"]["status"] == "Synced"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crashes", "pods of the new image failed"),
        ("does-not-deploy", "DEPLOY_FAILED|this release is broken"),
    ],
)
def test_a_broken_image_is_rolled_back(
    first: Served,
    pipeline: Pipeline,
    figure: Callable[[str, str], None],
    name: str,
    reason: str,
) -> None:
    with Load(first.release.url, first.token, _RATE) as load:
        broken = releases.broken(pipeline, name)
        began = time.monotonic()
        told = pipeline.deploy(broken, first.values, f"--chart-version={first.chart}", ok=False)
        took = time.monotonic() - began
    assert releases.last_error(told, reason), told
    assert f"Rolled back: {first.image}, chart {first.chart} serves." in told
    assert kube.images() == {first.image}
    status = argocd.application()["status"]
    assert (status["sync"]["status"], status["health"]["status"]) == ("Synced", "Healthy")
    figure(f"an image that {name}: noticed and rolled back", f"{took:.0f} s, {load.summary()}")
    assert load.failed == []


def test_a_refused_value_changes_nothing(first: Served, pipeline: Pipeline) -> None:
    before = argocd.application()["spec"]
    told = pipeline.deploy(
        first.image, values(limits={"timeout_s": "soon"}), f"--chart-version={first.chart}",
        ok=False,
    )  # fmt: skip
    assert "limits" in told
    assert "timeout_s" in told
    assert argocd.application()["spec"] == before
    assert first.release.ask(first.token).status_code == 200


def test_a_failing_smoke_test_rolls_back(first: Served, pipeline: Pipeline) -> None:
    wrong = {"enabled": True, "tokenSecret": {"name": "t5-wrong-token"}, "timeoutSeconds": 5}
    kube.kubectl("create", "secret", "generic", "t5-wrong-token", "--from-literal=token=t5s_no")
    told = pipeline.deploy(
        first.image, values(smokeTest=wrong), f"--chart-version={first.chart}", ok=False
    )
    assert f"{kube.RELEASE}-smoke" in told
    assert "Rolled back" in told
    assert first.release.ask(first.token).status_code == 200


def test_a_model_that_fails_the_gate_is_not_pushed(
    first: Served, pipeline: Pipeline, figure: Callable[[str, str], None]
) -> None:
    before = edges.tags("t5/images/t5-serve")
    releases.build(pipeline, "bad-model", "none", releases.DAMAGE)
    began = time.monotonic()
    told = pipeline.script("gate", pipeline.built(), ok=False)
    assert "gate: failed: greedy.rougeL" in told
    # The workflow ends with the step that failed (tests/pipeline/ci): what it would push is not.
    assert edges.tags("t5/images/t5-serve") == before
    figure("the quality gate refuses a model", f"{time.monotonic() - began:.0f} s")
    releases.build(pipeline, "good-model", "none")
    pipeline.script("gate", pipeline.built())


def test_wrong_credentials_end_early(first: Served, pipeline: Pipeline) -> None:
    told = pipeline.script(
        "deploy", f"--image={first.image}", f"--values-revision={first.values}",
        ok=False, ARGOCD_AUTH_TOKEN="nonsense",
    )  # fmt: skip
    assert len(told.splitlines()) == 1, told
    assert "ARGOCD_AUTH_TOKEN" in told


def test_the_role_of_the_pipeline_may_nothing_else(first: Served, pipeline: Pipeline) -> None:
    told = pipeline.script(
        "deploy", f"--image={first.image}", f"--values-revision={first.values}",
        f"--values-repository={edges.GIT}", "--name=other", ok=False,
    )  # fmt: skip
    assert "permission denied" in told


def test_pushed_images_are_what_was_built(first: Served) -> None:
    assert edges.tags("t5/images/t5-serve")
    assert images.REPOSITORY not in first.image
