"""A stand-in for `gcloud` and `bq`: one project, in a file, that refuses what Google would refuse.

It is strict where order matters: a service that is not enabled answers nothing, nothing is made
twice, and what a command names must exist. `FAKE_PROJECT` is the file, `FAKE_CALLS` gets each
command line, and a changing command in which `FAKE_FAILURE` occurs fails.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

NUMBER = "123456789012"
READING = {"describe", "list", "get-iam-policy", "show"}
SERVICE_OF = {
    "artifacts": "artifactregistry",
    "bq": "bigquery",
    "compute": "compute",
    "container": "container",
    "dns": "dns",
    "iam": "iam",
    "logging": "logging",
    "projects": "cloudresourcemanager",
}
# What else the answer to `describe` holds, as Google would fill it in.
DECIDED: dict[str, dict[str, Any]] = {
    "compute addresses": {"address": "203.0.113.7"},
    "dns managed-zones": {"nameServers": ["ns1.example.", "ns2.example."]},
    "iam workload-identity-pools": {"state": "ACTIVE"},
    "iam workload-identity-pools providers": {"state": "ACTIVE"},
    "container clusters": {"status": "RUNNING"},
    "container node-pools": {"status": "RUNNING"},
    "logging sinks": {
        "writerIdentity": "serviceAccount:service-1@gcp-sa-logging.iam.gserviceaccount.com"
    },
}
# Flags whose value must be the name of something of this kind.
NAMES_A = {
    "network": "compute networks",
    "subnetwork": "compute networks subnets",
    "router": "compute routers",
    "zone": "dns managed-zones",
    "workload-identity-pool": "iam workload-identity-pools",
    "cluster": "container clusters",
    "service-account": "iam service-accounts",
    "iam-account": "iam service-accounts",
}


SWITCHES = {"dataset", "nouse_legacy_sql"}  # flags without a value that a word comes after
VERBS = {"describe", "create", "update", "list", "get", "set", "add"}


def fail(message: str, code: int = 1) -> NoReturn:
    print(f"ERROR: {message}", file=sys.stderr)
    sys.exit(code)


def parse(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    words, flags = [], {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if not equals and name not in SWITCHES and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        flags[name] = value
    return words, flags


class Project:
    def __init__(self, state: dict[str, Any]) -> None:
        self.services: list[str] = state.setdefault("services", [])
        self.things: dict[str, dict[str, Any]] = state.setdefault("things", {})
        self.policies: dict[str, list[dict[str, Any]]] = state.setdefault("policies", {})

    def need(self, kind: str, name: str) -> dict[str, Any]:
        if f"{kind} {name}" not in self.things:
            fail(f"NOT_FOUND: {kind} {name} was not found")
        return self.things[f"{kind} {name}"]

    def make(self, kind: str, name: str, thing: dict[str, Any]) -> None:
        if f"{kind} {name}" in self.things:
            fail(f"ALREADY_EXISTS: {kind} {name}")
        self.things[f"{kind} {name}"] = thing | DECIDED.get(kind, {})

    def need_member(self, member: str) -> None:
        kind, _, name = member.partition(":")
        if kind == "principalSet":
            [pool] = re.findall(rf"/{NUMBER}/.*/workloadIdentityPools/(\w+)/attribute", name)
            self.need("iam workload-identity-pools", pool)
        elif "svc.id.goog[" in name:
            if not any(thing.startswith("container clusters") for thing in self.things):
                fail(f"identity pool of {name} does not exist")  # the first cluster brings it
        else:
            self.need("iam service-accounts", name)

    def bind(self, resource: str, role: str, member: str) -> None:
        self.need_member(member)
        bindings = self.policies.setdefault(resource, [])
        for binding in bindings:
            if binding["role"] == role:
                binding["members"] = sorted({*binding["members"], member})
                return
        bindings.append({"role": role, "members": [member]})

    def gcloud(self, words: list[str], flags: dict[str, str]) -> Any:
        if words[0] == "services":
            if words[1] == "list":
                return [{"config": {"name": name}} for name in self.services]
            self.services += [name for name in words[2:] if name not in self.services]
            return None
        if words[:2] == ["projects", "describe"]:
            return {"projectNumber": NUMBER}
        for flag, kind in NAMES_A.items():
            if flag in flags:
                self.need(kind, flags[flag])
        at = next(n for n, word in enumerate(words) if word.split("-")[0] in VERBS)
        kind, verb, name = " ".join(words[:at]), words[at], (words[at + 1 :] or [""])[0]
        if kind == "iam service-accounts keys":
            return self.keys(verb, name, flags)
        if kind != "projects" and verb not in ("create", "create-oidc"):
            thing = self.need(kind, name)
        if verb == "describe":
            return thing
        if verb.startswith("create"):
            if kind == "iam service-accounts":
                name = f"{name}@{flags['project']}.iam.gserviceaccount.com"
            self.make(kind, name, self.shown(kind, words, flags))
        elif verb.startswith("update"):
            thing.update(self.shown(kind, words, flags))
        elif verb == "set-cleanup-policies":
            thing["cleanupPolicies"] = cleanup_policies(Path(flags["policy"]))
        elif verb == "get-iam-policy":
            return {"etag": "x", "bindings": self.policies.get(f"{kind} {name}", [])}
        elif verb == "add-iam-policy-binding":
            self.bind(f"{kind} {name}", flags["role"], flags["member"])
        elif verb == "set-iam-policy":
            self.policies[f"{kind} {name}"] = []
            for binding in json.loads(Path(flags["policy-file"]).read_text())["bindings"]:
                for member in binding["members"]:
                    self.bind(f"{kind} {name}", binding["role"], member)
        return None

    def shown(self, kind: str, words: list[str], flags: dict[str, str]) -> dict[str, Any]:
        """What `describe` will show of what these flags made."""
        thing: dict[str, Any] = {"flags": flags}
        if kind == "dns managed-zones":
            thing["dnsName"] = flags["dns-name"]
        elif kind == "dns record-sets":
            if flags["rrdatas"] != self.need("compute addresses", "t5-address")["address"]:
                fail(f"{flags['rrdatas']} is not the address")
            thing["rrdatas"] = [flags["rrdatas"]]
        elif kind == "iam workload-identity-pools providers":
            pairs = flags["attribute-mapping"].split(",")
            thing["attributeMapping"] = dict(pair.split("=") for pair in pairs)
            thing["attributeCondition"] = flags["attribute-condition"]
            thing["oidc"] = {"issuerUri": flags["issuer-uri"]}
        elif kind == "logging sinks":
            self.need("bq", words[-1].split("/datasets/")[1])
            thing |= {"destination": words[-1], "filter": flags["log-filter"]}
            thing["bigqueryOptions"] = {"usePartitionedTables": "use-partitioned-tables" in flags}
        return thing

    def keys(self, verb: str, name: str, flags: dict[str, str]) -> Any:
        if verb == "list":
            return [{"name": thing} for thing in self.things if thing.startswith("key ")]
        self.make("key", flags["iam-account"], {})
        Path(name).write_text("{}")
        return None

    def bq(self, words: list[str], flags: dict[str, str]) -> Any:
        if words[0] == "query":
            found = re.fullmatch(r'GRANT `(.+)` ON SCHEMA `(.+)`\.(\w+) TO "(.+):(.+)"', words[1])
            assert found, words[1]
            dataset = self.need("bq", found[3])
            if "service-1@" not in found[5]:
                fail(f"no such account: {found[5]}")
            entry = {"role": "WRITER", "userByEmail": found[5]}
            dataset["access"] = [entry]
            self.policies.setdefault(f"bq {found[3]}", []).append(
                {"role": found[1], "members": [f"{found[4]}:{found[5]}"]}
            )
            return None
        name = words[1].split(":")[1]
        if words[0] == "mk":
            self.make("bq", name, {"location": flags["location"], "access": []})
        if f"bq {name}" not in self.things:
            print(f"BigQuery error in show operation: Not found: Dataset {words[1]}")
            sys.exit(2)
        dataset = self.things[f"bq {name}"]
        if words[0] != "show":
            seconds = int(flags["default_partition_expiration"])
            dataset["defaultPartitionExpirationMs"] = str(seconds * 1000)
            return None
        return dataset


def cleanup_policies(file: Path) -> dict[str, Any]:
    """As Artifact Registry shows them: by name, ages in seconds."""
    policies = {}
    for policy in json.loads(file.read_text()):
        shown = {"id": policy["name"], "action": policy["action"]["type"]}
        if condition := policy.get("condition"):
            days = int(condition["olderThan"].removesuffix("d"))
            shown["condition"] = condition | {"olderThan": f"{days * 86400}s"}
        else:
            shown["mostRecentVersions"] = policy["mostRecentVersions"]
        policies[policy["name"]] = shown
    return policies


def show(answer: Any, form: str) -> None:
    if answer is None:
        return
    if form == "json":
        print(json.dumps(answer))
    elif found := re.fullmatch(r"value\(([\w.]+?)(\.list\(\))?\)", form):
        for item in answer if isinstance(answer, list) else [answer]:
            for key in found[1].split("."):
                item = item[key]
            print(",".join(item) if found[2] else item)


def main(program: str, argv: list[str]) -> None:
    with Path(os.environ["FAKE_CALLS"]).open("a") as calls:
        calls.write(json.dumps([program, *argv]) + "\n")
    words, flags = parse(argv)
    file = Path(os.environ["FAKE_PROJECT"])
    state = json.loads(file.read_text()) if file.exists() else {}
    project = Project(state)
    service = SERVICE_OF.get("bq" if program == "bq" else words[0])
    if service and f"{service}.googleapis.com" not in project.services:
        fail(f"PERMISSION_DENIED: {service} API has not been used in this project or is disabled")
    if service in state.get("denied", []):
        fail(f"PERMISSION_DENIED: you may not ask {service}")
    failure = os.environ.get("FAKE_FAILURE")
    if failure and failure in " ".join(argv) and not READING.intersection(words):
        fail("quota exceeded")
    answer = project.bq(words, flags) if program == "bq" else project.gcloud(words, flags)
    file.write_text(json.dumps(state, indent=1))
    show(answer, flags.get("format", ""))


if __name__ == "__main__":
    main(Path(sys.argv[0]).name, sys.argv[1:])
