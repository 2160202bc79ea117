"""What a project needs, in an order in which everything is there before it is used."""

from __future__ import annotations

import json
import re
import string
from typing import Any

from kuberay.gcp import access
from kuberay.gcp.gcloud import expects, gcloud
from kuberay.gcp.names import (
    ADDRESS,
    CHARTS,
    DATASET,
    GPU_POOL,
    IMAGES,
    NAT,
    NETWORK,
    NODES,
    ROUTER,
    SINK,
    SUBNET,
)
from kuberay.gcp.plan import ROOT, Command, Plan, Step, StepError, Value, Values
from kuberay.gcp.settings import Settings

CLEANUP_POLICY = "kuberay/gcp/cleanup-policy.json"
REQUEST_LOGS = "kuberay/gcp/request-logs.filter"
GPU_POOL_SCRIPT = "kuberay/gpu-node-pool.sh"

SERVICES = (
    "artifactregistry",
    "bigquery",
    "cloudresourcemanager",
    "compute",
    "container",
    "containerfilesystem",  # image streaming
    "dns",
    "iam",
    "iamcredentials",
    "logging",
    "monitoring",
    "serviceusage",
    "sts",
)


def plan(s: Settings, key_file: str | None = None) -> Plan:
    """All steps. With `key_file` CI gets a key in that file instead of a federation with GitHub."""
    return [
        _services(s),
        Value(
            "PROJECT_NUMBER",
            gcloud(s, "projects", "describe", s.project, show="value(projectNumber)"),
        ),
        *_repository(s, IMAGES),
        *_repository(s, CHARTS),
        # Early, and their roles later: an account that was made a second ago may not be known yet.
        *access.accounts(s),
        *_network(s),
        *_dns(s),
        access.zone_role(s),
        *access.roles(s),
        *(access.federation(s) if key_file is None else [access.key(s, key_file)]),
        *_cluster(s),
        access.cert_manager(s),
        *_logs(s),
    ]


def _services(s: Settings) -> Step:
    names = [f"{name}.googleapis.com" for name in SERVICES]
    return Step(
        "services of the project",
        look=gcloud(s, "services", "list", "--enabled", show="value(config.name)"),
        change=gcloud(s, "services", "enable", *names),
        as_wanted=lambda shown, values: set(names) <= set(shown.split()),
    )


def _repository(s: Settings, name: str) -> list[Step]:
    repositories = ("artifacts", "repositories")
    look = gcloud(s, *repositories, "describe", name, location=s.region, show="json")

    def cleaned(shown: str, values: Values) -> bool:
        there = json.loads(shown)
        wanted = json.loads((ROOT / CLEANUP_POLICY).read_text())
        return not there.get("cleanupPolicyDryRun") and _rules(wanted) == _rules(
            there.get("cleanupPolicies", {}).values()
        )

    return [
        Step(
            f"Artifact Registry: {name}",
            look=look,
            # The pipeline scans each image itself; Artifact Registry is paid for each scan.
            make=gcloud(
                s,
                *repositories,
                "create",
                name,
                "--disable-vulnerability-scanning",
                location=s.region,
                repository_format="docker",
                description=f"t5-serve: {name}",
            ),
        ),
        Step(
            f"Artifact Registry: what of {name} is deleted when",
            look=look,
            change=gcloud(
                s,
                *repositories,
                "set-cleanup-policies",
                name,
                "--no-dry-run",
                location=s.region,
                policy=CLEANUP_POLICY,
            ),
            as_wanted=cleaned,
        ),
    ]


def _rules(policies: Any) -> list[str]:
    """Cleanup rules, those of the file or those that Artifact Registry shows, to be compared."""
    rules = []
    for policy in policies:
        condition = dict(policy.get("condition") or {})
        if days := re.fullmatch(r"(\d+)d", condition.get("olderThan", "")):
            condition["olderThan"] = f"{int(days[1]) * 86_400}s"
        action = policy["action"]
        action = action["type"] if isinstance(action, dict) else action
        name = policy.get("id") or policy["name"]
        recent = policy.get("mostRecentVersions") or {}
        rules.append(json.dumps([name, action, condition, recent], sort_keys=True))
    return sorted(rules)


def _network(s: Settings) -> list[Step]:
    networks, routers = ("compute", "networks"), ("compute", "routers")
    return [
        Step(
            "network",
            look=gcloud(s, *networks, "describe", NETWORK),
            make=gcloud(s, *networks, "create", NETWORK, subnet_mode="custom"),
        ),
        Step(
            "subnet of the nodes",
            look=gcloud(s, *networks, "subnets", "describe", SUBNET, region=s.region),
            make=gcloud(
                s,
                *networks,
                "subnets",
                "create",
                SUBNET,
                "--enable-private-ip-google-access",
                region=s.region,
                network=NETWORK,
                range="10.10.0.0/20",
            ),
        ),
        Step(
            "router",
            look=gcloud(s, *routers, "describe", ROUTER, region=s.region),
            make=gcloud(s, *routers, "create", ROUTER, region=s.region, network=NETWORK),
        ),
        Step(
            "NAT, by which nodes reach what is outside Google",
            look=gcloud(s, *routers, "nats", "describe", NAT, router=ROUTER, region=s.region),
            make=gcloud(
                s,
                *routers,
                "nats",
                "create",
                NAT,
                "--auto-allocate-nat-external-ips",
                "--nat-all-subnet-ip-ranges",
                router=ROUTER,
                region=s.region,
            ),
        ),
    ]


def _dns(s: Settings) -> list[Step | Value]:
    addresses, zones = ("compute", "addresses"), ("dns", "managed-zones")
    host = f"{s.host}."
    record = {"zone": s.dns_zone, "type": "A"}
    to_address = {**record, "ttl": "300", "rrdatas": "$ADDRESS"}
    return [
        Step(
            "address of the ingress",
            look=gcloud(s, *addresses, "describe", ADDRESS, region=s.region),
            # Regional: a load balancer of layer 4 takes no global one.
            make=gcloud(s, *addresses, "create", ADDRESS, region=s.region),
        ),
        Value(
            "ADDRESS",
            gcloud(s, *addresses, "describe", ADDRESS, region=s.region, show="value(address)"),
        ),
        Step(
            f"DNS zone of {s.dns_domain}",
            look=gcloud(s, *zones, "describe", s.dns_zone, show="value(dnsName)"),
            make=gcloud(
                s,
                *zones,
                "create",
                s.dns_zone,
                dns_name=f"{s.dns_domain}.",
                description="t5-serve",
                visibility="public",
            ),
            as_wanted=expects(f"{s.dns_domain}.", otherwise="name another DNS_ZONE"),
        ),
        Value(
            "NAME_SERVERS",
            gcloud(s, *zones, "describe", s.dns_zone, show="value(nameServers.list())"),
        ),
        Step(
            f"DNS record of {s.host}",
            look=gcloud(
                s, "dns", "record-sets", "describe", host, **record, show="value(rrdatas.list())"
            ),
            make=gcloud(s, "dns", "record-sets", "create", host, **to_address),
            change=gcloud(s, "dns", "record-sets", "update", host, **to_address),
            as_wanted=lambda shown, values: shown == values["ADDRESS"],
        ),
    ]


def _cluster(s: Settings) -> list[Step]:
    clusters, pools = ("container", "clusters"), ("container", "node-pools")
    running = expects("RUNNING", "RECONCILING", otherwise="wait for it, or delete it")
    gpu_pool = {
        "PROJECT": s.project,
        "CLUSTER": s.cluster,
        "LOCATION": s.region,
        "ZONES": s.zones,
        "POOL": GPU_POOL,
        "MAX": str(s.gpu_max_nodes),
        "SPOT": str(int(s.gpu_spot)),
        "SERVICE_ACCOUNT": s.account(NODES),
    }
    return [
        Step(
            f"cluster {s.cluster} (takes up to ten minutes)",
            look=gcloud(
                s, *clusters, "describe", s.cluster, location=s.region, show="value(status)"
            ),
            make=gcloud(
                s,
                *clusters,
                "create",
                s.cluster,
                # No way in but by the DNS name, where IAM decides; so no list of networks to keep.
                "--enable-private-nodes",
                "--enable-dns-access",
                "--no-enable-ip-access",
                "--enable-ip-alias",
                "--enable-dataplane-v2",  # what enforces the chart's NetworkPolicies
                "--enable-image-streaming",
                "--enable-managed-prometheus",
                "--enable-shielded-nodes",
                "--shielded-secure-boot",
                "--shielded-integrity-monitoring",
                "--enable-autoscaling",
                location=s.region,
                node_locations=s.zones,
                network=NETWORK,
                subnetwork=SUBNET,
                release_channel="regular",
                workload_pool=f"{s.project}.svc.id.goog",
                workload_metadata="GKE_METADATA",
                logging="SYSTEM,WORKLOAD",
                monitoring="SYSTEM",
                service_account=s.account(NODES),
                # For all that needs no GPU: Ray's head, the API, the ingress, Argo CD, operators.
                machine_type="e2-standard-4",
                disk_type="pd-balanced",
                disk_size="50",
                num_nodes="1",  # in each zone
                total_min_nodes="1",
                total_max_nodes="8",
            ),
            as_wanted=running,
        ),
        Step(
            f"GPU node pool {GPU_POOL}",
            look=gcloud(
                s,
                *pools,
                "describe",
                GPU_POOL,
                cluster=s.cluster,
                location=s.region,
                show="value(status)",
            ),
            make=Command(
                ("env", *(f"{k}={v}" for k, v in gpu_pool.items()), GPU_POOL_SCRIPT, "--run")
            ),
            as_wanted=running,
        ),
    ]


def request_filter(s: Settings) -> str:
    """The filter of the request logs, on one line as Cloud Logging keeps it."""
    lines = (ROOT / REQUEST_LOGS).read_text().splitlines()
    text = " ".join(line.strip() for line in lines if not line.startswith("--"))
    return string.Template(text).substitute(NAMESPACE=s.namespace, CLUSTER=s.cluster, HOST=s.host)


def _logs(s: Settings) -> list[Step | Value]:
    sinks = ("logging", "sinks")
    dataset = f"{s.project}:{DATASET}"
    destination = f"bigquery.googleapis.com/projects/{s.project}/datasets/{DATASET}"
    expiration = f"--default_partition_expiration={s.log_days * 86_400}"
    bq = ("bq", "--headless", f"--project_id={s.project}", f"--location={s.region}")
    look = Command((*bq, "--format=json", "show", "--dataset", dataset))
    to_bigquery = {"log_filter": request_filter(s)}

    def expires(shown: str, values: Values) -> bool:
        there = json.loads(shown)
        if there["location"] != s.region:
            raise StepError(f"is there, but in {there['location']}")
        return bool(there.get("defaultPartitionExpirationMs") == str(s.log_days * 86_400_000))

    def routed(shown: str, values: Values) -> bool:
        there = json.loads(shown)
        return bool(
            there["destination"] == destination
            and there.get("filter") == request_filter(s)
            and there.get("bigqueryOptions", {}).get("usePartitionedTables")
        )

    def writable(shown: str, values: Values) -> bool:
        writer = values["WRITER"].removeprefix("serviceAccount:")
        # BigQuery shows the role by its older name.
        roles = ("WRITER", "roles/bigquery.dataEditor")
        access = json.loads(shown).get("access", [])
        return any(
            entry.get("role") in roles and entry.get("userByEmail") == writer for entry in access
        )

    return [
        Step(
            f"BigQuery dataset {DATASET}",
            look=look,
            make=Command((*bq, "mk", "--dataset", expiration, dataset)),
            change=Command((*bq, "update", "--dataset", expiration, dataset)),
            as_wanted=expires,
        ),
        Step(
            "log sink of the request lines",
            look=gcloud(s, *sinks, "describe", SINK, show="json"),
            make=gcloud(
                s, *sinks, "create", SINK, destination, "--use-partitioned-tables", **to_bigquery
            ),
            change=gcloud(
                s, *sinks, "update", SINK, destination, "--use-partitioned-tables", **to_bigquery
            ),
            as_wanted=routed,
        ),
        Value("WRITER", gcloud(s, *sinks, "describe", SINK, show="value(writerIdentity)")),
        Step(
            f"the sink may write into {DATASET}",
            look=look,
            change=Command(
                (
                    *bq,
                    "query",
                    "--nouse_legacy_sql",
                    f"GRANT `roles/bigquery.dataEditor` ON SCHEMA `{s.project}`.{DATASET} "
                    'TO "$WRITER"',
                )
            ),
            as_wanted=writable,
        ),
    ]
