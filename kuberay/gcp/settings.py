"""What `bootstrap` is told: a file of KEY=VALUE lines, each value checked by a pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL})+"
_ZONE = r"[a-z]+-[a-z]+[0-9]+-[a-z]"
_BRANCH = r"[A-Za-z0-9][-A-Za-z0-9._/]*"


class SettingsError(Exception):
    """All that is wrong with a file of settings, a line for each."""


@dataclass(frozen=True)
class _Key:
    pattern: str
    like: str  # completes "is not"
    default: str | None = None  # None: must be given


# The patterns also keep quotes out of the CEL condition and the SQL that some values end up in.
_KEYS = {
    "GCP_PROJECT": _Key(r"[a-z][-a-z0-9]{4,28}[a-z0-9]", "a project id (6 to 30 of a-z, 0-9, -)"),
    "GCP_REGION": _Key(r"[a-z]+-[a-z]+[0-9]+", "a region such as europe-west4"),
    "GCP_ZONES": _Key(rf"{_ZONE}(,{_ZONE})*", "zones such as europe-west4-a,europe-west4-b"),
    "GITHUB_REPOSITORY": _Key(
        r"[A-Za-z0-9]([-A-Za-z0-9]{0,37}[A-Za-z0-9])?/[A-Za-z0-9._-]{1,100}",
        "a repository as owner/name",
    ),
    "GITHUB_REPOSITORY_ID": _Key(r"([1-9][0-9]*)?", "a number", ""),
    "GITHUB_OWNER_ID": _Key(r"([1-9][0-9]*)?", "a number", ""),
    "GITHUB_BRANCHES": _Key(
        rf"{_BRANCH}(,{_BRANCH})*", "branches such as main,feature/CICD", "main,feature/CICD"
    ),
    "GITHUB_EVENTS": _Key(
        r"[a-z_]+(,[a-z_]+)*", "events such as push,workflow_dispatch", "push,workflow_dispatch"
    ),
    "HOST": _Key(_HOST, "a host name, in lower case"),
    "DNS_DOMAIN": _Key(_HOST, "a domain name, in lower case, without a dot at its end"),
    "DNS_ZONE": _Key(rf"({_LABEL})?", "a zone's name (a-z, 0-9, -)", ""),
    "ARGOCD_SERVER": _Key(rf"({_HOST}(:[0-9]+)?)?", "a host, perhaps with a port", ""),
    "NAMESPACE": _Key(_LABEL, "a namespace", "t5"),
    "CLUSTER": _Key(_NAME, "a cluster's name (at most 40 of a-z, 0-9, -)", "t5"),
    "GPU_MAX_NODES": _Key(r"[1-9][0-9]{0,2}", "a number from 1 to 999", "8"),
    "GPU_SPOT": _Key(r"true|false", "true or false", "false"),
    "LOG_DAYS": _Key(r"[1-9][0-9]{0,3}", "a number of days from 1 to 9999", "180"),
}
# These runs have the base branch's ref but may run what a stranger's pull request brought.
_UNSAFE_EVENTS = {"pull_request_target", "workflow_run", "issue_comment"}


@dataclass(frozen=True)
class Settings:
    """A checked file."""

    project: str
    region: str
    zones: str
    repository: str
    repository_id: str
    owner_id: str
    branches: tuple[str, ...]
    events: tuple[str, ...]
    host: str
    dns_domain: str
    dns_zone: str
    argocd_server: str
    namespace: str
    cluster: str
    gpu_max_nodes: int
    gpu_spot: bool
    log_days: int

    @property
    def registry(self) -> str:
        """Artifact Registry's host in this region."""
        return f"{self.region}-docker.pkg.dev"

    def account(self, name: str) -> str:
        """The address of one of the project's service accounts."""
        return f"{name}@{self.project}.iam.gserviceaccount.com"


def read(path: Path) -> Settings:
    """Raise `SettingsError` with everything that is wrong."""
    try:
        text = path.read_text()
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: is not text in UTF-8") from None
    problems = []
    given: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            problems.append(f"{path}:{number}: {line.strip()}: is not KEY=VALUE")
        elif key not in _KEYS:
            problems.append(f"{path}:{number}: {key}={value}: no such setting")
        elif key in given:
            problems.append(f"{path}:{number}: {key}={value}: given twice")
        else:
            given[key] = value
            if not re.fullmatch(_KEYS[key].pattern, value):
                problems.append(f"{path}:{number}: {key}={value}: is not {_KEYS[key].like}")
    problems += [
        f"{path}: {key}: is missing; it is {rule.like}"
        for key, rule in _KEYS.items()
        if rule.default is None and key not in given
    ]
    values = {key: given.get(key, rule.default or "") for key, rule in _KEYS.items()}
    if not problems:
        problems = [f"{path}: {problem}" for problem in _contradictions(values)]
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings(
        project=values["GCP_PROJECT"],
        region=values["GCP_REGION"],
        zones=values["GCP_ZONES"],
        repository=values["GITHUB_REPOSITORY"],
        repository_id=values["GITHUB_REPOSITORY_ID"],
        owner_id=values["GITHUB_OWNER_ID"],
        branches=tuple(values["GITHUB_BRANCHES"].split(",")),
        events=tuple(values["GITHUB_EVENTS"].split(",")),
        host=values["HOST"],
        dns_domain=values["DNS_DOMAIN"],
        dns_zone=values["DNS_ZONE"] or values["DNS_DOMAIN"].replace(".", "-"),
        argocd_server=values["ARGOCD_SERVER"] or f"argocd.{values['DNS_DOMAIN']}",
        namespace=values["NAMESPACE"],
        cluster=values["CLUSTER"],
        gpu_max_nodes=int(values["GPU_MAX_NODES"]),
        gpu_spot=values["GPU_SPOT"] == "true",
        log_days=int(values["LOG_DAYS"]),
    )


def _contradictions(values: dict[str, str]) -> list[str]:
    region, domain = values["GCP_REGION"], values["DNS_DOMAIN"]
    problems = [
        f"GCP_ZONES={values['GCP_ZONES']}: {zone} is not in {region}"
        for zone in values["GCP_ZONES"].split(",")
        if not zone.startswith(f"{region}-")
    ]
    if not values["HOST"].endswith(f".{domain}"):
        problems.append(f"HOST={values['HOST']}: is not in DNS_DOMAIN={domain}")
    return problems + [
        f"GITHUB_EVENTS={values['GITHUB_EVENTS']}: {event} may run what a stranger wrote"
        for event in values["GITHUB_EVENTS"].split(",")
        if event in _UNSAFE_EVENTS
    ]
