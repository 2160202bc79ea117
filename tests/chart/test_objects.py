"""Every object a release makes: valid, named within limits, and as locked as it says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.chart.conftest import CHART, INGRESS, Helm, Object, Rendered
from tests.chart.schemas import available, problems

Render = Callable[..., Rendered]

# What KubeRay leaves out when it compares a running cluster with the RayService (`utils/util.go`,
# GenerateHashWithoutReplicasAndWorkersToDelete): anything else builds a new cluster.
_IGNORED = ("replicas", "minReplicas", "maxReplicas")


def cluster_identity(release: Rendered) -> str:
    cluster = copy.deepcopy(release.cluster)
    cluster["headGroupSpec"]["template"]["spec"].pop("tolerations", None)
    for group in cluster["workerGroupSpecs"]:
        for key in _IGNORED:
            group.pop(key, None)
        group["template"]["spec"].pop("tolerations", None)
    return json.dumps(cluster, sort_keys=True)


def nested(path: str, value: Any) -> Object:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def containers(release: Rendered) -> list[tuple[str, Object, Object]]:
    """Name, pod spec and container of everything that will run."""
    pods = [(name, release.pod(name)) for name in ("head", "api", "summarizer")]
    for kind in ("DaemonSet", "CronJob", "Job"):
        for one in release.all(kind):
            spec = one["spec"]
            spec = spec["jobTemplate"]["spec"] if kind == "CronJob" else spec
            pods.append((one["metadata"]["name"], spec["template"]["spec"]))
    pods += [(one["metadata"]["name"], one["spec"]) for one in release.all("Pod")]
    return [
        (f"{name}/{container['name']}", pod, container)
        for name, pod in pods
        for container in [*pod.get("initContainers", []), *pod["containers"]]
    ]


def test_lint_is_clean(helm: Helm, ci_release: Rendered) -> None:
    for values in (CHART / "ci").glob("*-values.yaml"):
        done = helm("lint", "--strict", CHART, "--values", values)
        assert done.returncode == 0, done.stdout
        assert "WARNING" not in done.stdout


def test_every_object_is_valid(ci_release: Rendered) -> None:
    judged = [one for one in ci_release.objects if available(one)]
    assert [text for one in judged for text in problems(one)] == []
    if len(judged) < len(ci_release.objects):
        pytest.skip(f"{len(judged)} objects are valid; the CRDs of NGINX are not here")


def test_the_schemas_see_a_field_that_is_not_there(render: Render) -> None:
    service = copy.deepcopy(render().one("RayService"))
    if not available(service):
        pytest.skip("no schema")
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["hostnetwork"] = True
    [problem] = problems(service)
    assert "hostnetwork" in problem


def test_everything_has_a_resource_request_and_a_memory_limit(ci_release: Rendered) -> None:
    for name, _, container in containers(ci_release):
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]), name
        assert "memory" in container["resources"]["limits"], name


def test_pods_pass_the_restricted_pod_security_level(ci_release: Rendered) -> None:
    # https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for name, pod, container in containers(ci_release):
        held = {**pod["securityContext"], **container["securityContext"]}
        assert held["runAsNonRoot"] is True, name
        assert held["runAsUser"] != 0, name
        assert held["allowPrivilegeEscalation"] is False, name
        assert held["privileged"] is False, name
        assert held["capabilities"] == {"drop": ["ALL"]}, name
        assert held["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert held["readOnlyRootFilesystem"] is True, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        assert not any("hostPort" in port for port in container.get("ports", [])), name
        for volume in pod.get("volumes", []):
            assert set(volume) - {"name"} <= allowed, name


def test_the_autoscaler_is_as_locked_as_the_head(render: Render) -> None:
    release = render()
    options = release.cluster["autoscalerOptions"]
    [head] = release.pod("head")["containers"]
    assert options["securityContext"] == head["securityContext"]
    assert options["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert options["version"] == "v2"
    assert release.cluster["enableInTreeAutoscaling"] is True


def test_names_leave_room_for_what_kuberay_appends(render: Render) -> None:
    release = render(name="a" * 53)
    name = release.one("RayService")["metadata"]["name"]
    # KubeRay: RayService ≤ 47, the cluster's name is 6 longer, then `-serve-svc`.
    assert len(name) <= 47
    assert len(name) + 6 + len("-serve-svc") <= 63


def test_the_head_has_no_replicas_and_no_traffic(render: Render) -> None:
    release = render()
    head = release.cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert release.one("RayService")["spec"]["excludeHeadPodFromServeSvc"] is True
    [container] = release.pod("head")["containers"]
    # If a head lists ports, KubeRay wants one of them named `serve`.
    assert {"name": "serve", "containerPort": 8000, "protocol": "TCP"} in container["ports"]
    assert "headService" not in head


def test_engines_are_on_gpu_nodes_and_the_api_never(render: Render) -> None:
    release = render()
    summarizer, api = release.pod("summarizer"), release.pod("api")
    [container] = summarizer["containers"]
    for held in ("requests", "limits"):
        assert container["resources"][held]["nvidia.com/gpu"] == "1"
    assert summarizer["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert summarizer["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert "gpu" not in json.dumps(api)
    assert "nodeSelector" not in api
    # Ray places by resources: each deployment asks for the one that only its group has.
    for group, deployment in (("api", "Api"), ("summarizer", "Summarizer")):
        assert release.group(group)["resources"] == {group: "1"}
        wanted = release.deployment(deployment)["ray_actor_options"]["resources"]
        assert wanted == {group: 1}
    assert release.deployment("Summarizer")["ray_actor_options"]["num_gpus"] == 1
    assert "num_gpus" not in release.deployment("Api")["ray_actor_options"]


def test_spot_nodes_are_chosen_and_tolerated(render: Render) -> None:
    pod = render({"summarizer": {"gpu": {"spot": True}}}).pod("summarizer")
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert [one["key"] for one in pod["tolerations"]] == [
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
    ]


def test_without_gpus_nothing_speaks_of_them(render: Render) -> None:
    release = render({"summarizer": {"gpu": {"enabled": False}}})
    assert "nvidia" not in json.dumps(release.objects)
    assert release.deployment("Summarizer")["ray_actor_options"]["num_gpus"] == 0


@pytest.mark.parametrize(
    "values",
    [
        {"engine": {"max_batch_size": 7}},
        {"limits": {"body_bytes": 2048, "timeout_s": 60, "default_timeout_s": 30}},
        {"log": {"level": "DEBUG"}},
        {"usage": {"queue_size": 7}},
        {"auth": {"header": "X-Who"}},
        {"serve": {"logging": {"log_level": "DEBUG"}}},
        {"model": {"name": "/opt/other", "dtype": "float32", "max_input_tokens": 512}},
        {"api": {"replicas": 5, "max_queued_requests": 7, "max_surge_percent": 50}},
        {"api": {"ready_step_age_s": 5, "parts_in_flight": 2, "num_cpus": 0.5}},
        {"summarizer": {"autoscaling_config": {"min_replicas": 3, "max_replicas": 9}}},
        {"summarizer": {"max_ongoing_requests": 9, "graceful_shutdown_timeout_s": 9}},
        {"summarizer": {"num_cpus": 1, "num_gpus": 0.5}},
        {"summarizer": {"workers": {"minReplicas": 1, "maxReplicas": 40}}},
        {"api": {"workers": {"tolerations": [{"key": "x", "operator": "Exists"}]}}},
        {"commonLabels": {"team": "nlp"}},
        {"networkPolicy": {"enabled": False}},
        {"metrics": {"podMonitor": {"enabled": True}}},
    ],
    ids=json.dumps,
)
def test_what_is_said_to_change_in_place_builds_no_new_cluster(
    render: Render, values: Object
) -> None:
    before, after = render(), render(values)
    assert after.text != before.text
    assert cluster_identity(after) == cluster_identity(before)


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"tag": "2"}},
        {"gcsFaultTolerance": {"enabled": True, "redisAddress": "r:6379"}},
        {"rayAuth": {"enabled": False}},
        {"serve": {"haproxy": True}},
        {"auth": {"mode": "off"}},
        {"summarizer": {"workers": {"resources": {"requests": {"cpu": "4"}}}}},
        {"drain": {"timeoutSeconds": 900}},
        {"usage": {"keep": 7}},
        {"usage": {"sidecar": {"enabled": True}}},
    ],
    ids=json.dumps,
)
def test_what_is_said_to_build_a_new_cluster_does(render: Render, values: Object) -> None:
    assert cluster_identity(render(values)) != cluster_identity(render())


def test_a_new_chart_version_alone_builds_no_new_cluster(render: Render) -> None:
    # Pod templates carry no chart or application version.
    release = render()
    cluster = json.dumps(release.cluster)
    assert "helm.sh/chart" not in cluster
    assert "app.kubernetes.io/version" not in cluster
    # KubeRay's head Service selects by its own value of this label.
    assert "app.kubernetes.io/name" not in cluster


def test_worker_groups_begin_with_the_pods_their_replicas_need(render: Render) -> None:
    release = render(
        {
            "api": {"replicas": 3},
            "summarizer": {
                "autoscaling_config": {"min_replicas": 5, "max_replicas": 8},
                "num_gpus": 0.5,
                "num_cpus": 1,
                "replicasPerWorker": 2,
            },
        }
    )
    api, summarizer = release.group("api"), release.group("summarizer")
    assert (api["replicas"], api["minReplicas"], api["maxReplicas"]) == (3, 0, 32)
    assert (summarizer["replicas"], summarizer["minReplicas"]) == (3, 0)
    assert summarizer["resources"] == {"summarizer": "2"}


def test_without_the_autoscaler_all_pods_are_there_from_the_start(render: Render) -> None:
    release = render(
        {
            "autoscaler": {"enabled": False},
            "summarizer": {"autoscaling_config": {"max_replicas": 6}},
        }
    )
    group = release.group("summarizer")
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (6, 6, 6)
    assert "autoscalerOptions" not in release.cluster
    assert release.pod("head")["automountServiceAccountToken"] is False


def test_workers_drain_before_they_stop(render: Render) -> None:
    release = render({"drain": {"timeoutSeconds": 400}})
    for group in ("api", "summarizer"):
        pod = release.pod(group)
        [container] = pod["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "serve_app.drain", "--timeout-s", "400"]
        # Kubernetes counts the grace period from before the hook.
        assert pod["terminationGracePeriodSeconds"] > 400
        assert "readinessProbe" not in container  # one of our own would drop KubeRay's proxy check
        assert "restartPolicy" not in pod  # the autoscaler, version 2, sets it


def test_an_old_cluster_outlives_the_longest_request(render: Render) -> None:
    def delay(values: Object) -> int:
        return render(values).one("RayService")["spec"]["rayClusterDeletionDelaySeconds"]

    assert delay({}) == 300
    assert delay({"limits": {"timeout_s": 30, "default_timeout_s": 20}}) == 60
    assert delay({"upgrade": {"clusterDeletionDelaySeconds": 5}}) == 5


def test_only_the_head_may_talk_to_the_api_server(render: Render) -> None:
    release = render()
    assert release.pod("head")["automountServiceAccountToken"] is True
    for group in ("api", "summarizer"):
        assert release.pod(group)["automountServiceAccountToken"] is False
    assert release.one("ServiceAccount")["automountServiceAccountToken"] is False


def test_a_service_account_of_ones_own_is_used(render: Render) -> None:
    release = render({"serviceAccount": {"create": False, "name": "mine"}})
    assert release.all("ServiceAccount") == []
    for pod in ("head", "api", "summarizer"):
        assert release.pod(pod)["serviceAccountName"] == "mine"


def test_gcs_state_is_in_redis_and_each_cluster_has_its_own(render: Render) -> None:
    fault = {
        "enabled": True,
        "redisAddress": "redis:6379",
        "passwordSecret": {"name": "redis", "key": "pw"},
    }
    options = render({"gcsFaultTolerance": fault}).cluster["gcsFaultToleranceOptions"]
    assert options == {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "pw"}}},
    }
    assert "gcsFaultToleranceOptions" not in render().cluster


def test_ray_asks_for_a_token_unless_told_otherwise(render: Render) -> None:
    assert render().cluster["authOptions"] == {"mode": "token"}
    own = render({"rayAuth": {"existingSecret": "ray"}})
    assert own.cluster["authOptions"] == {"mode": "token", "secretName": "ray"}
    off = render({"rayAuth": {"enabled": False}})
    assert off.cluster["authOptions"] == {"mode": "disabled"}
    for pod in ("head", "api", "summarizer"):
        [container] = off.pod(pod)["containers"]
        assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in container["env"]


def test_haproxy_is_on_everywhere_or_nowhere(render: Render) -> None:
    for on in (False, True):
        release = render({"serve": {"haproxy": on}})
        for pod in ("head", "api", "summarizer"):
            [container] = release.pod(pod)["containers"]
            named = {one["name"]: one.get("value") for one in container["env"]}
            assert named.get("RAY_SERVE_ENABLE_HA_PROXY") == ("1" if on else None)


def test_budgets_are_numbers_and_leave_a_drain_possible(render: Render) -> None:
    release = render(
        {
            "api": {"replicas": 3},
            "summarizer": {"autoscaling_config": {"min_replicas": 2, "max_replicas": 4}},
        }
    )
    budgets = {one["metadata"]["name"]: one["spec"] for one in release.all("PodDisruptionBudget")}
    # A RayCluster has no scale subresource, so maxUnavailable would not work.
    assert {name: spec["minAvailable"] for name, spec in budgets.items()} == {
        "t5-t5-summarizer-api": 2,
        "t5-t5-summarizer-summarizer": 1,
    }
    for component in ("api", "summarizer"):
        labels = release.group(component)["template"]["metadata"]["labels"]
        selector = budgets[f"t5-t5-summarizer-{component}"]["selector"]["matchLabels"]
        assert selector.items() <= labels.items()
    alone = render({"api": {"replicas": 1}})
    assert alone.all("PodDisruptionBudget") == []
    assert len(render({"podDisruptionBudget": {"head": True}}).all("PodDisruptionBudget")) == 2


def peers(policy: Object, port: int) -> list[Object] | None:
    """Who may come to a port by rules that name it; None: everybody."""
    found: list[Object] = []
    for rule in policy["spec"]["ingress"]:
        if port in [one["port"] for one in rule.get("ports", [])]:
            if "from" not in rule:
                return None
            found += rule["from"]
    return found


def test_with_an_ingress_only_it_and_the_operator_reach_the_port(render: Render) -> None:
    policy = render(INGRESS).one("NetworkPolicy", "t5-t5-summarizer")
    names = [
        one["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for one in peers(policy, 8000) or []
    ]
    assert names == ["nginx-ingress", "kuberay-system"]
    dashboard = [
        one["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for one in peers(policy, 8265) or []
    ]
    assert dashboard == ["kuberay-system"]
    labels = render(INGRESS).cluster["headGroupSpec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_without_an_ingress_everybody_reaches_the_port_and_nothing_else(render: Render) -> None:
    policy = render().one("NetworkPolicy", "t5-t5-summarizer")
    assert peers(policy, 8000) is None
    for port in (8265, 8080, 6379, 10001):
        assert peers(policy, port) is not None


def test_what_may_go_out_follows_from_the_values(render: Render) -> None:
    def ports(values: Object) -> set[int]:
        policy = render(values).one("NetworkPolicy", "t5-t5-summarizer")
        return {one["port"] for rule in policy["spec"]["egress"] for one in rule.get("ports", [])}

    assert ports({}) == {53}
    assert ports({"gcsFaultTolerance": {"enabled": True, "redisAddress": "r:6380"}}) == {53, 6380}
    assert ports({"model": {"source": "hub", "name": "a/b"}}) == {53, 443}
    for collector, port in (("http://c:4318", 4318), ("http://c/x", 80), ("https://c:", 443)):
        assert ports({"tracing": {"endpoint": collector}}) == {53, port}
    [head] = render().one("NetworkPolicy", "t5-t5-summarizer-apiserver")["spec"]["podSelector"][
        "matchExpressions"
    ]
    assert head["values"] == ["head"]


def test_pods_spread_as_well_as_may_be(render: Render) -> None:
    for one in render().pod("api")["topologySpreadConstraints"]:
        assert one["whenUnsatisfiable"] == "ScheduleAnyway"


def test_pods_of_all_kinds_take_the_priority_class(render: Render) -> None:
    release = render({"priorityClass": {"create": True}, "head": {"priorityClassName": "mine"}})
    made = release.one("PriorityClass")["metadata"]["name"]
    assert made == "prod-t5-t5-summarizer"  # the whole cluster's: with the namespace
    assert release.pod("api")["priorityClassName"] == made
    assert release.pod("summarizer")["priorityClassName"] == made
    assert release.pod("head")["priorityClassName"] == "mine"


def test_images_wait_on_the_nodes_that_will_run_them(render: Render) -> None:
    release = render({"imagePrePull": {"enabled": True, "images": ["t5-serve:next"]}})
    found = {one["metadata"]["name"]: one["spec"] for one in release.all("DaemonSet")}
    pod = found["t5-t5-summarizer-prepull-summarizer"]["template"]["spec"]
    for key in ("nodeSelector", "tolerations"):
        assert pod[key] == release.pod("summarizer")[key]
    # Without the GPU itself: it would take one away.
    assert "nvidia.com/gpu" not in json.dumps(pod["containers"] + pod["initContainers"])
    [ahead] = pod["initContainers"]
    assert ahead["image"] == "t5-serve:next"


def test_pod_monitors_select_the_pods_by_their_named_ports(render: Render) -> None:
    release = render({"metrics": {"podMonitor": {"enabled": True, "labels": {"release": "p"}}}})
    for name, pod in (("head", "head"), ("worker", "api"), ("worker", "summarizer")):
        monitor = release.one("PodMonitor", f"t5-t5-summarizer-{name}")
        [container] = release.pod(pod)["containers"]
        ports = {one["name"] for one in container["ports"]}
        assert {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]} <= ports
        assert monitor["metadata"]["labels"]["release"] == "p"


def test_helm_test_asks_the_service_whether_an_engine_works(render: Render) -> None:
    release = render()
    pod = release.one("Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    [container] = pod["spec"]["containers"]
    assert container["command"][0] == "wget"
    assert container["command"][-1] == "http://t5-t5-summarizer-serve-svc:8000/readyz"
    # The NetworkPolicy lets in the release's own pods.
    policy = release.one("NetworkPolicy", "t5-t5-summarizer")
    selector = policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert selector.items() <= pod["metadata"]["labels"].items()


def test_a_load_balancer_is_made_as_asked(render: Render) -> None:
    release = render(
        {
            "service": {
                "type": "LoadBalancer",
                "annotations": {"networking.gke.io/load-balancer-ip-addresses": "t5"},
                "loadBalancerClass": "networking.gke.io/l4-regional-external",
            }
        }
    )
    service = release.one("RayService")["spec"]["serveService"]
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["spec"]["loadBalancerClass"] == "networking.gke.io/l4-regional-external"
    assert service["metadata"]["annotations"]["networking.gke.io/load-balancer-ip-addresses"]
    assert "name" not in service["metadata"]
    assert "serveService" not in render().one("RayService")["spec"]


def test_no_secret_of_the_chart_has_content(ci_release: Rendered) -> None:
    for secret in ci_release.all("Secret"):
        assert not {"data", "stringData"} & set(secret)
        assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_the_account_outlives_a_release_whose_state_is_in_redis(render: Render) -> None:
    # KubeRay's clean-up Job runs under it after the release is gone.
    keep = "helm.sh/resource-policy"
    fault_tolerant = {"gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379"}}
    kept = render(fault_tolerant).one("ServiceAccount")["metadata"]["annotations"]
    assert kept == {keep: "keep"}
    assert "annotations" not in render().one("ServiceAccount")["metadata"]


_SMOKE: Object = {"smokeTest": {"enabled": True, "tokenSecret": {"name": "smoke"}}}


def smoke(release: Rendered) -> tuple[Object, str, dict[str, Object]]:
    """The Job, its script and its environment."""
    job = release.one("Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    return job, container["command"][-1], {one["name"]: one for one in container["env"]}


def test_the_smoke_test_follows_each_sync_and_answers_to_helm_test(render: Render) -> None:
    job, _, _ = smoke(render(_SMOKE))
    annotations = job["metadata"]["annotations"]
    assert annotations["argocd.argoproj.io/hook"] == "PostSync"
    assert annotations["helm.sh/hook"] == "test"
    assert job["spec"]["backoffLimit"] == 0
    assert render().all("Job") == []


def test_the_smoke_test_asks_where_clients_ask(render: Render) -> None:
    def address(values: Object) -> str:
        return str(smoke(render(_SMOKE | values))[2]["T5_SERVE_URL"]["value"])

    assert address({}) == "http://t5-t5-summarizer-serve-svc:8000"
    assert address(INGRESS) == "http://summarize.example.com"
    tls: Object = {"ingress": INGRESS["ingress"] | {"tls": {"secretName": "cert"}}}
    assert address(tls) == "https://summarize.example.com"
    other: Object = {"smokeTest": _SMOKE["smokeTest"] | {"url": "https://other.example.com"}}
    assert address(INGRESS | other) == "https://other.example.com"


def test_the_smoke_test_has_a_token_where_one_is_asked_for(
    render: Render, refuse: Callable[..., str]
) -> None:
    _, script, environment = smoke(render(_SMOKE))
    source = environment["T5_SERVE_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert source == {"name": "smoke", "key": "token"}
    assert "without a valid token" in script
    _, script, environment = smoke(render(_SMOKE | {"auth": {"mode": "off"}}))
    assert "T5_SERVE_TOKEN" not in environment
    assert "without a valid token" not in script
    assert "smokeTest.tokenSecret.name" in refuse({"smokeTest": {"enabled": True}})


def test_the_smoke_test_is_as_locked_as_the_rest(render: Render) -> None:
    pods = {name: (pod, container) for name, pod, container in containers(render(_SMOKE))}
    pod, container = pods["t5-t5-summarizer-smoke/smoke"]
    head, head_container = pods["head/ray-head"]
    assert pod["securityContext"] == head["securityContext"]
    assert container["securityContext"] == head_container["securityContext"]
    assert pod["automountServiceAccountToken"] is False
    assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def test_argo_cd_makes_secrets_first_and_routes_last(render: Render) -> None:
    def wave(one: Object) -> str:
        return str(one["metadata"].get("annotations", {}).get("argocd.argoproj.io/sync-wave", "0"))

    waves: dict[str, set[str]] = {}
    for one in render(INGRESS).objects:
        waves.setdefault(one["kind"], set()).add(wave(one))
    assert waves["Secret"] == waves["Policy"] == {"-1"}
    assert waves["RayService"] == {"0"}
    assert waves["VirtualServer"] == {"1"}
