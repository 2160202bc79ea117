"""Objects against the API's own schemas, strictly: a field that is not known is an error."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.chart.conftest import NGINX_CRDS, SCHEMAS, missing

_CRDS = {
    "RayService": SCHEMAS / "ray.io_rayservices.yaml",
    "PodMonitor": SCHEMAS / "monitoring.coreos.com_podmonitors.yaml",
    "PrometheusRule": SCHEMAS / "monitoring.coreos.com_prometheusrules.yaml",
    "VirtualServer": NGINX_CRDS / "k8s.nginx.org_virtualservers.yaml",
    "Policy": NGINX_CRDS / "k8s.nginx.org_policies.yaml",
}


def problems(thing: dict[str, Any]) -> list[str]:
    """What the schema of the object's kind has against it."""
    validator = _validator(thing["apiVersion"], thing["kind"])
    return [
        f"{thing['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for error in validator.iter_errors(thing)
    ]


def needs(thing: dict[str, Any]) -> Path:
    """The file with the schema of an object's kind."""
    return _CRDS.get(thing["kind"], SCHEMAS / "swagger.json")


@cache
def _validator(version: str, kind: str) -> jsonschema.Draft202012Validator:
    if kind in _CRDS:
        definition = yaml.load(_CRDS[kind].read_text(), Loader=yaml.CSafeLoader)
        group, _, number = version.partition("/")
        assert definition["spec"]["group"] == group
        [schema] = [
            one["schema"]["openAPIV3Schema"]
            for one in definition["spec"]["versions"]
            if one["name"] == number
        ]
        # A CRD leaves these two to the API server.
        schema["properties"]["metadata"] = {"type": "object"}
        return jsonschema.Draft202012Validator(_strict(schema))
    document = json.loads((SCHEMAS / "swagger.json").read_text())
    group, _, number = version.rpartition("/")
    gvk = {"group": group, "kind": kind, "version": number}
    [name] = [
        name
        for name, one in document["definitions"].items()
        if gvk in one.get("x-kubernetes-group-version-kind", [])
    ]
    schema = {"$ref": f"#/definitions/{name}", "definitions": _strict(document["definitions"])}
    return jsonschema.Draft202012Validator(schema)


def _strict(schema: Any) -> Any:
    """A Kubernetes schema as JSON Schema that takes no fields it does not name."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    # The API takes numbers for quantities, and says only `string`.
    if "Quantity is a fixed-point" in str(schema.get("description", "")):
        return {"type": ["number", "string"]}
    strict = {key: _strict(value) for key, value in schema.items()}
    if (
        isinstance(schema.get("properties"), dict)
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
        and schema.get("type", "object") == "object"
    ):
        strict["additionalProperties"] = False
    return strict


def available(thing: dict[str, Any]) -> bool:
    """Whether the schema is here. KubeRay's and Kubernetes' must be in CI, NGINX' need not."""
    path = needs(thing)
    if path.exists():
        return True
    if path.parent != NGINX_CRDS:
        missing(f"no {path.name}: `make chart-tools` fetches it and needs go")
    return False
