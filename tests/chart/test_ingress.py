"""VirtualServer, Policies and the Secret of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from tests.chart.conftest import INGRESS, Object, Rendered

Render = Callable[..., Rendered]
NAME = "t5-t5-summarizer"


def ingress(**changes: object) -> Object:
    return {"ingress": {**INGRESS["ingress"], **changes}}


def routes(release: Rendered, name: str = NAME) -> dict[str, Object]:
    return {one["path"]: one for one in release.one("VirtualServer", name)["spec"]["routes"]}


def headers(route: Object) -> dict[str, str]:
    """What the route sends upstream in place of what a client sent."""
    return dict(re.findall(r"proxy_set_header (\S+) (\S+);", route["location-snippets"]))


def policy_names(route: Object) -> list[str]:
    return [one["name"] for one in route.get("policies", [])]


def test_there_is_none_unless_asked_for(render: Render) -> None:
    release = render()
    for kind in ("VirtualServer", "Policy", "CronJob", "Role"):
        assert release.all(kind) == []


def test_all_paths_need_a_key_but_those_named_open(render: Render) -> None:
    release = render(INGRESS)
    found = routes(release)
    assert set(found) == {
        "/",
        "/-/",
        "=/",
        "/static/",
        "=/docs",
        "/docs-static/",
        "=/openapi.json",
    }
    assert policy_names(found["/"]) == [f"{NAME}-api-key", f"{NAME}-rate"]
    assert found["/-/"]["action"]["return"]["code"] == 404
    for path in set(found) - {"/", "/-/"}:
        assert policy_names(found[path]) == [f"{NAME}-rate-page"]
    closed = routes(render(ingress(page=False)))
    assert set(closed) == {"/", "/-/"}
    assert set(routes(render(ingress(page=False, health=True)))) == {"/", "/-/", "=/healthz"}


def test_keys_are_checked_by_route_never_by_host(render: Render) -> None:
    # With a host-level apiKey two hosts of one controller would share the last one's keys.
    assert "policies" not in render(INGRESS).one("VirtualServer")["spec"]


def test_the_policy_reads_the_secret_that_is_there(render: Render) -> None:
    release = render(INGRESS)
    key = release.one("Policy", f"{NAME}-api-key")["spec"]["apiKey"]
    secret = release.one("Secret")
    assert key == {
        "suppliedIn": {"header": ["Authorization"]},
        "clientSecret": secret["metadata"]["name"],
    }
    assert secret["type"] == "nginx.org/apikey"
    own = render({**INGRESS, "tokens": {"existingSecret": "mine"}})
    assert own.all("Secret") == []
    key = own.one("Policy", f"{NAME}-api-key")["spec"]["apiKey"]
    assert key["clientSecret"] == "mine"


def test_secrets_of_both_kinds_have_names_of_their_own(render: Render) -> None:
    # A Secret's type cannot be changed: turning the ingress on must make another one.
    names = {render(values).one("Secret")["metadata"]["name"] for values in ({}, INGRESS)}
    assert len(names) == 2


def test_every_route_replaces_what_a_client_could_spoof(render: Render) -> None:
    for path, route in routes(render(ingress(health=True))).items():
        if "return" in route["action"]:
            continue
        sent = headers(route)
        if path == "/":
            assert re.fullmatch(r"\$t5_client_[0-9a-f]{8}", sent["X-Api-Client"])
        else:
            assert sent["X-Api-Client"] == '""'
        assert re.fullmatch(r"\$t5_request_id_[0-9a-f]{8}", sent["X-Request-Id"])
        for name in (
            "Authorization",
            "X-Request-Timeout-Seconds",
            "X-Request-Disconnect-Disabled",
            "serve_multiplexed_model_id",
        ):
            assert sent[name] == '""', name


def test_the_header_is_the_one_the_service_trusts(render: Render) -> None:
    release = render({**INGRESS, "auth": {"header": "X-Who"}})
    assert release.arguments["auth"] == {"mode": "trusted-header", "header": "X-Who"}
    assert "X-Who" in headers(routes(release)["/"])
    assert "X-Api-Client" not in json.dumps(release.one("VirtualServer"))


def test_timeouts_are_above_and_body_limits_equal_to_the_services_own(render: Render) -> None:
    values = {**INGRESS, "limits": {"timeout_s": 250, "body_bytes": 5_000_000}}
    release = render(values)
    spec = release.one("VirtualServer")["spec"]
    [upstream] = spec["upstreams"]
    assert int(upstream["read-timeout"].removesuffix("s")) > 250
    assert upstream["client-max-body-size"] == "5000000"
    # The subrequest that checks the key has the host's limit, not the route's.
    assert "client_max_body_size 5000000;" in spec["server-snippets"]
    assert release.arguments["limits"]["body_bytes"] == 5_000_000


def test_streams_pass_unbuffered_to_the_service(render: Render) -> None:
    [upstream] = render(INGRESS).one("VirtualServer")["spec"]["upstreams"]
    assert upstream["buffering"] is False
    assert (upstream["service"], upstream["port"]) == (f"{NAME}-serve-svc", 8000)


def test_errors_that_nginx_makes_are_problem_documents(render: Render) -> None:
    spec = render(INGRESS).one("VirtualServer")["spec"]
    found = re.findall(
        r"location @t5_(\d+) \{(.*?)return (\d+) '(\{[^']*\})';", spec["server-snippets"], re.DOTALL
    )
    assert [status for status, *_ in found] == ["401", "403", "413", "429", "500", "502", "504"]
    for status, settings, returned, body in found:
        assert returned == status
        assert "default_type application/problem+json;" in settings
        assert "add_header X-Request-Id" in settings
        problem = json.loads(body)
        assert problem["status"] == int(status)
        assert problem["type"].startswith("urn:t5-serve:problem:")
        assert {"title", "detail", "request_id"} <= set(problem)
        assert ("WWW-Authenticate" in settings) == (status in ("401", "403"))
        assert ("Retry-After" in settings) == (status == "429")
    for route in spec["routes"]:
        # Not `errorPages`: it would replace the service's own answers of these statuses, too.
        assert "errorPages" not in route
        if "location-snippets" in route:
            pages = re.findall(r"error_page (\d+) @t5_(\d+);", route["location-snippets"])
            assert pages == [(status, status) for status, *_ in found]


@pytest.mark.parametrize(("rate", "seconds"), [("120r/m", 1), ("7r/m", 9), ("5r/s", 1)])
def test_retry_after_is_when_the_next_request_may_come(
    render: Render, rate: str, seconds: int
) -> None:
    release = render(ingress(rateLimit={"rate": rate}))
    snippet = release.one("VirtualServer")["spec"]["server-snippets"]
    assert f'add_header Retry-After "{seconds}" always;' in snippet


def test_each_client_has_a_rate_and_some_have_another(render: Render) -> None:
    tier = {"name": "partner", "match": "partner-.*", "rate": "20r/s", "burst": 200}
    release = render(ingress(rateLimit={"rate": "60r/m", "burst": 5, "tiers": [tier]}))
    common = release.one("Policy", f"{NAME}-rate")["spec"]["rateLimit"]
    partner = release.one("Policy", f"{NAME}-rate-partner")["spec"]["rateLimit"]
    assert (common["rate"], common["burst"], common["rejectCode"]) == ("60r/m", 5, 429)
    assert common["key"] == partner["key"] == "${apikey_client_name}"
    assert common["condition"]["default"] is True
    [condition] = partner["condition"]["variables"]
    assert condition["name"] == "$apikey_client_name"
    pattern = re.compile(condition["match"].removeprefix("~"))
    assert pattern.fullmatch("partner-a.0123abcd")
    assert pattern.fullmatch("partner-a")
    assert not pattern.match("not-partner-a.0123abcd")
    [never] = common["condition"]["variables"]
    assert not re.search(never["match"].removeprefix("~"), "")
    assert not re.search(never["match"].removeprefix("~"), "partner-a")
    assert policy_names(routes(release)["/"]) == [
        f"{NAME}-api-key",
        f"{NAME}-rate-partner",
        f"{NAME}-rate",
    ]
    assert "condition" not in render(INGRESS).one("Policy", f"{NAME}-rate")["spec"]["rateLimit"]
    off = render(ingress(rateLimit={"enabled": False}))
    assert policy_names(routes(off)["/"]) == [f"{NAME}-api-key"]


def test_two_releases_share_no_name_inside_nginx(render: Render) -> None:
    def variables(name: str) -> set[str]:
        spec = render(INGRESS, name=name).one("VirtualServer")["spec"]
        return set(re.findall(r"t5_(?:client|request_id|name)_\w+|log_format (\w+)", str(spec)))

    first, second = variables("one"), variables("two")
    assert first
    assert not (first - {""}) & (second - {""})


def test_the_access_log_is_json_and_without_query_strings(render: Render) -> None:
    spec = render(INGRESS).one("VirtualServer")["spec"]
    [log_format] = re.findall(r"log_format \w+ escape=json (.*?);\n", spec["http-snippets"], re.S)
    line = "".join(re.findall(r"'(.*?)'", log_format, re.S))
    sample = json.loads(re.sub(r"\$\w+", "0", line))
    assert {"time", "request_id", "client", "status", "duration_s", "upstream_status"} <= set(
        sample
    )
    assert "request_uri" not in line
    assert "$args" not in line
    # May be `-` or a list.
    assert '"upstream_status":"$upstream_status"' in line
    assert "access_log /dev/stdout" in spec["server-snippets"]
    off = render(ingress(accessLog=False)).one("VirtualServer")["spec"]
    assert "log_format" not in off["http-snippets"]
    assert "access_log" not in off["server-snippets"]


def test_certificates_come_from_a_secret_or_cert_manager(render: Render) -> None:
    assert "tls" not in render(INGRESS).one("VirtualServer")["spec"]
    plain = render(ingress(tls={"secretName": "cert"})).one("VirtualServer")["spec"]["tls"]
    assert plain == {"secret": "cert", "redirect": {"enable": True, "code": 308}}
    manager = {"clusterIssuer": "letsencrypt", "issueTempCert": True}
    made = render(ingress(tls={"secretName": "cert", "certManager": manager}))
    assert made.one("VirtualServer")["spec"]["tls"]["cert-manager"] == {
        "cluster-issuer": "letsencrypt",
        "issue-temp-cert": True,
    }


def test_a_dns_record_is_asked_for(render: Render) -> None:
    assert "externalDNS" not in render(INGRESS).one("VirtualServer")["spec"]
    made = render(ingress(externalDNS={"enabled": True}))
    assert made.one("VirtualServer")["spec"]["externalDNS"] == {
        "enable": True,
        "recordType": "A",
        "recordTTL": 300,
    }


def test_the_dashboard_has_a_route_only_with_a_password_and_a_certificate(render: Render) -> None:
    assert len(render(INGRESS).all("VirtualServer")) == 1
    dashboard = {
        "enabled": True,
        "host": "ray.example.com",
        "basicAuthSecret": "htpasswd",
        "tlsSecretName": "cert",
        "allow": ["10.0.0.0/8"],
    }
    release = render(ingress(dashboard=dashboard))
    spec = release.one("VirtualServer", f"{NAME}-dashboard")["spec"]
    assert spec["tls"]["secret"] == "cert"
    [upstream] = spec["upstreams"]
    assert (upstream["service"], upstream["port"]) == (f"{NAME}-head-svc", 8265)
    found = routes(release, f"{NAME}-dashboard")
    route = found["/"]
    assert policy_names(route) == [f"{NAME}-dashboard-auth", f"{NAME}-dashboard-allow"]
    auth = release.one("Policy", f"{NAME}-dashboard-auth")["spec"]["basicAuth"]
    assert auth["secret"] == "htpasswd"
    assert headers(route)["Authorization"] == '""'
    # Only Ray can check its own token, so its header goes through where the page logs in.
    login = found["=/api/authenticate"]
    assert policy_names(login) == [f"{NAME}-rate-page", f"{NAME}-dashboard-allow"]
    assert headers(login) == {}
    alone = render(ingress(dashboard=dashboard, page=False))
    assert alone.one("Policy", f"{NAME}-rate-page")


def test_expired_tokens_are_removed_with_no_more_rights_than_that(render: Render) -> None:
    release = render(INGRESS)
    secret = release.one("Secret")["metadata"]["name"]
    [rule] = release.one("Role")["rules"]
    assert rule == {
        "apiGroups": [""],
        "resources": ["secrets"],
        "resourceNames": [secret],
        "verbs": ["get", "update"],
    }
    pod = release.one("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    [subject] = release.one("RoleBinding")["subjects"]
    assert pod["serviceAccountName"] == subject["name"]
    assert subject["namespace"] == "prod"
    [container] = pod["containers"]
    assert container["command"] == ["t5-serve", "tokens", "prune", "--secret", f"prod/{secret}"]
    off = render({**INGRESS, "tokens": {"prune": {"enabled": False}}})
    assert off.all("CronJob") == []
    assert off.all("Role") == []
