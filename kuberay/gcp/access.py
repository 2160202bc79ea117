"""Who may do what: service accounts, their roles, and how GitHub's workflows become one of them."""

from __future__ import annotations

import json

from kuberay.gcp.gcloud import expects, gcloud, grant, has_binding
from kuberay.gcp.names import ARGOCD, CHARTS, CI, DNS, IMAGES, NODES, POOL, PROVIDER
from kuberay.gcp.plan import Command, Step, StepError, Values
from kuberay.gcp.settings import Settings

ACCOUNTS = {
    CI: "pushes images and charts",
    NODES: "the cluster's nodes",
    ARGOCD: "reads the charts",
    DNS: "cert-manager, for DNS-01 challenges",
}
_WRITER, _READER = "roles/artifactregistry.writer", "roles/artifactregistry.reader"
_GRANTS = [
    (CI, _WRITER, IMAGES),
    (CI, _WRITER, CHARTS),
    (NODES, _READER, IMAGES),
    (ARGOCD, _READER, CHARTS),
]
_ISSUER = "https://token.actions.githubusercontent.com"
_MAPPING = {"google.subject": "assertion.sub", "attribute.repository": "assertion.repository"}
_UNDELETE = "what was deleted stays for 30 days and can be undeleted (docs/google-cloud.md)"


def accounts(s: Settings) -> list[Step]:
    """The service accounts, without any role."""
    return [
        Step(
            f"service account {name}: {purpose}",
            look=gcloud(s, "iam", "service-accounts", "describe", s.account(name)),
            make=gcloud(
                s, "iam", "service-accounts", "create", name, display_name=f"t5-serve: {purpose}"
            ),
        )
        for name, purpose in ACCOUNTS.items()
    ]


def roles(s: Settings) -> list[Step]:
    """Each account's roles, on single repositories where there is such a thing."""
    return [
        *(
            grant(
                s,
                f"{account} may {'write' if role == _WRITER else 'read'} {repository}",
                ("artifacts", "repositories", repository),
                role,
                f"serviceAccount:{s.account(account)}",
                location=s.region,
            )
            for account, role, repository in _GRANTS
        ),
        grant(
            s,
            f"{NODES} may write logs and metrics",
            ("projects", s.project),
            "roles/container.defaultNodeServiceAccount",
            f"serviceAccount:{s.account(NODES)}",
        ),
    ]


def zone_role(s: Settings) -> Step:
    """The right to write one zone's records, not the project's."""
    role, member = "roles/dns.admin", f"serviceAccount:{s.account(DNS)}"
    zones = ("dns", "managed-zones")

    def ours(shown: str, values: Values) -> bool:
        if has_binding(shown, role, member):
            return True
        # gcloud can only write such a policy as a whole.
        if json.loads(shown).get("bindings"):
            raise StepError(f"the zone has a policy of its own: add {role} for {member} to it")
        return False

    write = gcloud(s, *zones, "set-iam-policy", s.dns_zone, policy_file="/dev/stdin")
    return Step(
        f"{DNS} may write records of this zone",
        look=gcloud(s, *zones, "get-iam-policy", s.dns_zone, show="json"),
        change=Command(
            write.argv, stdin=json.dumps({"bindings": [{"role": role, "members": [member]}]})
        ),
        as_wanted=ours,
    )


def cert_manager(s: Settings) -> Step:
    """cert-manager in the cluster as the DNS account. The cluster brings its identity pool."""
    return grant(
        s,
        f"cert-manager may act as {DNS}",
        ("iam", "service-accounts", s.account(DNS)),
        "roles/iam.workloadIdentityUser",
        f"serviceAccount:{s.project}.svc.id.goog[cert-manager/cert-manager]",
    )


def condition(s: Settings) -> str:
    """Whose tokens are taken from GitHub, in CEL."""
    refs = ", ".join(f"'refs/heads/{branch}'" for branch in s.branches)
    events = ", ".join(f"'{event}'" for event in s.events)
    terms = [
        f"assertion.repository == '{s.repository}'",
        f"assertion.repository_owner == '{s.repository.split('/')[0]}'",
        f"assertion.repository_id == '{s.repository_id}'" if s.repository_id else "",
        f"assertion.repository_owner_id == '{s.owner_id}'" if s.owner_id else "",
        f"assertion.ref in [{refs}]",
        f"assertion.event_name in [{events}]",
    ]
    return " && ".join(filter(None, terms))


def federation(s: Settings) -> list[Step]:
    """GitHub's workflows as the CI account, without a key."""
    pools = ("iam", "workload-identity-pools")
    here = {"location": "global", "workload_identity_pool": POOL}
    wanted = {
        "issuer_uri": _ISSUER,
        "attribute_mapping": ",".join(f"{ours}={theirs}" for ours, theirs in _MAPPING.items()),
        "attribute_condition": condition(s),
    }
    active = expects("ACTIVE", otherwise=_UNDELETE)

    def as_wanted(shown: str, values: Values) -> bool:
        there = json.loads(shown)
        active(there.get("state", ""), values)
        return bool(
            there.get("attributeCondition") == condition(s)
            and there.get("attributeMapping") == _MAPPING
            and there.get("oidc", {}).get("issuerUri") == _ISSUER
        )

    return [
        Step(
            "identity pool of GitHub's workflows",
            look=gcloud(s, *pools, "describe", POOL, location="global", show="value(state)"),
            make=gcloud(s, *pools, "create", POOL, location="global", display_name="GitHub"),
            as_wanted=active,
        ),
        Step(
            f"identity provider: {s.repository}, {', '.join(s.branches)}",
            look=gcloud(s, *pools, "providers", "describe", PROVIDER, **here, show="json"),
            make=gcloud(
                s,
                *pools,
                "providers",
                "create-oidc",
                PROVIDER,
                **here,
                **wanted,
            ),
            change=gcloud(
                s,
                *pools,
                "providers",
                "update-oidc",
                PROVIDER,
                **here,
                **wanted,
            ),
            as_wanted=as_wanted,
        ),
        grant(
            s,
            f"workflows of {s.repository} may act as {CI}",
            ("iam", "service-accounts", s.account(CI)),
            "roles/iam.workloadIdentityUser",
            "principalSet://iam.googleapis.com/projects/$PROJECT_NUMBER/locations/global/"
            f"workloadIdentityPools/{POOL}/attribute.repository/{s.repository}",
        ),
    ]


def key(s: Settings, file: str) -> Step:
    """Instead of the federation: a key of the CI account, made once."""
    keys = ("iam", "service-accounts", "keys")
    account = s.account(CI)
    return Step(
        f"a key of {CI}, into {file}",
        look=gcloud(s, *keys, "list", iam_account=account, managed_by="user", show="value(name)"),
        change=gcloud(s, *keys, "create", file, iam_account=account),
        as_wanted=lambda shown, values: bool(shown),
    )
