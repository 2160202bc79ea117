"""Tokens in a Secret: the real Kubernetes client against the few calls of an API server."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from serve_app.cli.tokens import command
from serve_app.secret_tokens import SecretTokens
from serve_app.tokens import TokenFileError, TokenStore

SECRETS = "/api/v1/namespaces/prod/secrets"


class Cluster:
    """The Secrets of namespace prod, with optimistic locking as an API server has it."""

    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, Any]] = {}
        self.conflicts = 0  # writes to refuse as if somebody else had been first
        self._versions = 0

    def handle(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if not path.startswith(SECRETS):
            return 403, status(403, f"secrets is forbidden in {path}")
        name = path.removeprefix(SECRETS).strip("/") or body["metadata"]["name"]
        held = self.secrets.get(name)
        if method == "GET":
            return (200, held) if held else (404, status(404, f'secrets "{name}" not found'))
        if method == "POST" and held:
            return 409, status(409, "already exists")
        if method == "PUT":
            if held is None:
                return 404, status(404, "not found")
            if self.conflicts or (
                body["metadata"].get("resourceVersion") != held["metadata"]["resourceVersion"]
            ):
                self.conflicts = max(self.conflicts - 1, 0)
                return 409, status(409, "the object has been modified")
            if body.get("type") != held["type"]:
                return 422, status(422, "type: field is immutable")
        self.put(name, body)
        return 200, self.secrets[name]

    def put(self, name: str, secret: dict[str, Any]) -> None:
        self._versions += 1
        secret = copy.deepcopy(secret)
        secret["metadata"] |= {
            "name": name,
            "namespace": "prod",
            "resourceVersion": str(self._versions),
            "creationTimestamp": "2026-01-02T03:04:05Z",
        }
        self.secrets[name] = secret

    def headers(self, name: str) -> dict[str, str]:
        """What NGINX is to accept: client names and whole Authorization headers."""
        data = self.secrets[name].get("data") or {}
        return {key: base64.b64decode(value).decode() for key, value in data.items()}


def status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "code": code, "message": message}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    state = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            code, document = state.handle(self.command, self.path, body)
            data = json.dumps(document).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        ],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(kubeconfig))
    # The client reads the variable when it is imported; a later change must reach it all the same.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def keys() -> SecretTokens:
    return SecretTokens("prod", "keys")


def test_a_token_is_the_whole_header_under_client_and_id(
    cluster: Cluster, keys: SecretTokens
) -> None:
    record, token = keys.create("web-shop", timedelta(days=90))
    assert cluster.secrets["keys"]["type"] == "nginx.org/apikey"
    assert cluster.headers("keys") == {f"web-shop.{record.id}": f"Bearer {token}"}
    assert keys.list_records() == [record]
    assert record.sha256 == hashlib.sha256(token.encode()).hexdigest()


def test_an_empty_secret_as_the_chart_makes_it_is_filled(
    cluster: Cluster, keys: SecretTokens
) -> None:
    labels = {"app.kubernetes.io/managed-by": "Helm"}
    cluster.put("keys", {"metadata": {"labels": labels}, "type": "nginx.org/apikey"})
    keys.create("shop", None)
    assert len(cluster.headers("keys")) == 1
    assert cluster.secrets["keys"]["metadata"]["labels"] == labels


def test_rotation_keeps_the_old_token_until_its_overlap_has_passed(
    cluster: Cluster, keys: SecretTokens
) -> None:
    old, _ = keys.create("shop", None)
    other, _ = keys.create("job", None)
    new, token = keys.rotate("shop", timedelta(hours=1), None)
    records = {record.id: record for record in keys.list_records()}
    assert set(records) == {old.id, other.id, new.id}
    expires = records[old.id].expires
    assert expires is not None
    assert timedelta(minutes=59) < expires - datetime.now(UTC) <= timedelta(hours=1)
    assert records[new.id].expires is None
    assert records[other.id].expires is None
    assert cluster.headers("keys")[f"shop.{new.id}"] == f"Bearer {token}"
    assert keys.prune() == 0


def test_rotation_without_overlap_removes_the_old_token_at_once(
    cluster: Cluster, keys: SecretTokens
) -> None:
    keys.create("shop", None)
    new, _ = keys.rotate("shop", timedelta(0), None)
    assert list(cluster.headers("keys")) == [f"shop.{new.id}"]


def test_prune_removes_what_has_expired_and_nothing_else(
    cluster: Cluster, keys: SecretTokens
) -> None:
    kept, _ = keys.create("shop", timedelta(days=1))
    keys.create("gone", timedelta(microseconds=1))
    assert len(cluster.headers("keys")) == 2
    assert keys.prune() == 1
    assert list(cluster.headers("keys")) == [f"shop.{kept.id}"]


def test_revoke_takes_a_client_or_an_id(cluster: Cluster, keys: SecretTokens) -> None:
    first, _ = keys.create("shop", None)
    keys.create("shop", None)
    keys.create("job", None)
    assert keys.revoke(first.id) == 1
    assert keys.revoke("shop") == 1
    assert keys.revoke("shop") == 0
    assert [key.partition(".")[0] for key in cluster.headers("keys")] == ["job"]


def test_names_made_by_hand_are_listed_kept_and_revoked(
    cluster: Cluster, keys: SecretTokens
) -> None:
    data = {"alice.v1": base64.b64encode(b"Bearer by-hand").decode()}
    cluster.put("keys", {"metadata": {}, "type": "nginx.org/apikey", "data": data})
    [alice] = keys.list_records()
    assert (alice.client, alice.expires) == ("alice.v1", None)
    keys.create("shop", None)
    assert cluster.headers("keys")["alice.v1"] == "Bearer by-hand"
    assert keys.revoke("alice.v1") == 1
    assert len(cluster.headers("keys")) == 1


def test_an_opaque_secret_holds_the_tokens_file_that_the_service_checks(
    cluster: Cluster, tmp_path: Path
) -> None:
    held = SecretTokens("prod", "tokens", new_type="Opaque")
    record, token = held.create("shop", None)
    assert held.list_records() == [record]
    [(name, content)] = cluster.headers("tokens").items()
    assert name == "tokens.json"
    assert token not in content
    mounted = tmp_path / name
    mounted.write_text(content)
    assert TokenStore(mounted).verify(token) == "shop"


def test_a_change_by_somebody_else_in_between_is_not_lost(
    cluster: Cluster, keys: SecretTokens
) -> None:
    keys.create("shop", None)
    cluster.conflicts = 2
    record, _ = keys.create("job", None)
    assert [one.client for one in keys.list_records()] == ["shop", "job"]
    assert f"job.{record.id}" in cluster.headers("keys")


def test_what_the_api_server_refuses_is_told_in_one_line(cluster: Cluster) -> None:
    with pytest.raises(TokenFileError, match=r"secret other/keys: secrets is forbidden.* \(403\)"):
        SecretTokens("other", "keys").list_records()


def test_the_command_line_takes_a_secret(cluster: Cluster) -> None:
    run = CliRunner()

    def tokens(*arguments: str) -> str:
        result = run.invoke(command, [*arguments, "--secret", "prod/keys"])
        assert result.exit_code == 0, result.output
        return result.stdout

    token = tokens("create", "shop", "--expires", "90d").strip()
    assert list(cluster.headers("keys").values()) == [f"Bearer {token}"]
    tokens("rotate", "shop", "--overlap", "1h")
    rows = json.loads(tokens("list", "--json"))
    assert [row["client"] for row in rows] == ["shop", "shop"]
    assert tokens("prune") == "removed 0 expired tokens\n"
    assert tokens("revoke", "shop") == "revoked 2 tokens\n"


def test_without_a_cluster_there_is_one_line_and_no_token(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(tmp_path),
    }
    arguments = ["tokens", "create", "shop", "--secret", "prod/keys"]
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.cli.main", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("t5-serve: no access to a cluster: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--secret", "keys"], "--secret: must be NAMESPACE/NAME, is 'keys'"),
        (["--secret", "a/b/c"], "--secret: must be NAMESPACE/NAME, is 'a/b/c'"),
        (["--secret", "a/b", "--file", "x"], "--file and --secret: give only one of them"),
    ],
)
def test_where_the_tokens_are_is_said_once_and_rightly(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(command, ["list", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
