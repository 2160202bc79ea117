"""Tokens in a Kubernetes Secret, for a service that runs there.

Two kinds, told apart by the Secret's type. `nginx.org/apikey` is what the NGINX Ingress Controller
checks: under each name a whole `Authorization` header. A name is `CLIENT.ID`, so that a client can
have several; what NGINX does not need to know stands in an annotation. In any other Secret the key
`tokens.json` is a tokens file as `serve_app.tokens` has it, which the service checks itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from serve_app.tokens import (
    TokenFileError,
    TokenRecord,
    dump,
    issue,
    parse,
    retired,
    unexpired,
    without,
)

API_KEY_TYPE = "nginx.org/apikey"
_ANNOTATION = "t5-serve/tokens"
_FILE_KEY = "tokens.json"
_CONFLICT, _NOT_FOUND = 409, 404
_ATTEMPTS = 5

_Change = Callable[[list[TokenRecord]], tuple[list[TokenRecord], dict[str, str]]]


@dataclass(frozen=True)
class SecretTokens:
    """The tokens of one Secret. Its methods raise `TokenFileError`, as those of the file do.

    Args:
        namespace: of the Secret.
        name: of the Secret.
        context: of the kubeconfig; None takes the current one, or the pod's own account.
        new_type: type of a Secret that does not exist yet.
    """

    namespace: str
    name: str
    context: str | None = None
    new_type: str = API_KEY_TYPE

    def create(self, client: str, expires_in: timedelta | None) -> tuple[TokenRecord, str]:
        """Add a token for `client`, making the Secret if need be."""
        return self._issue(client, expires_in, lambda records: records)

    def rotate(
        self, client: str, overlap: timedelta, expires_in: timedelta | None
    ) -> tuple[TokenRecord, str]:
        """Add a token for `client` and let its others expire once `overlap` has passed."""
        return self._issue(client, expires_in, lambda records: retired(records, client, overlap))

    def list_records(self) -> list[TokenRecord]:
        """All records. Names in the Secret that were not made here are clients of their own."""
        secret = self._read(self._api())
        return [] if secret is None else self._records(secret)

    def revoke(self, client_or_id: str) -> int:
        """Remove all tokens of a client, or the one with that id. Gives how many there were."""
        return self._remove(lambda records: without(records, client_or_id))

    def prune(self) -> int:
        """Remove what has expired. Gives how many there were."""
        return self._remove(unexpired)

    def _issue(
        self,
        client: str,
        expires_in: timedelta | None,
        others: Callable[[list[TokenRecord]], list[TokenRecord]],
    ) -> tuple[TokenRecord, str]:
        made: list[tuple[TokenRecord, str]] = []

        def change(records: list[TokenRecord]) -> tuple[list[TokenRecord], dict[str, str]]:
            record, token = issue(records, client, expires_in)
            made.append((record, token))
            return [*others(records), record], {record.id: token}

        self._edit(change)
        return made[-1]

    def _remove(self, keep: Callable[[list[TokenRecord]], list[TokenRecord]]) -> int:
        removed = 0

        def change(records: list[TokenRecord]) -> tuple[list[TokenRecord], dict[str, str]]:
            nonlocal removed
            kept = keep(records)
            removed = len(records) - len(kept)
            return kept, {}

        self._edit(change)
        return removed

    def _edit(self, change: _Change) -> None:
        """Apply `change` to the records; again if somebody else has written in between."""
        from kubernetes.client import ApiException

        api = self._api()
        for attempt in range(_ATTEMPTS):
            secret = self._read(api)
            before = [] if secret is None else self._records(secret)
            after, tokens = change(before)
            if after == before:
                return
            body = self._with(secret, after, tokens)
            try:
                if secret is None:
                    api.create_namespaced_secret(self.namespace, body)
                else:
                    api.replace_namespaced_secret(self.name, self.namespace, body)
            except ApiException as error:
                if error.status != _CONFLICT or attempt == _ATTEMPTS - 1:
                    raise self._failed(error) from None
            else:
                return

    def _records(self, secret: Any) -> list[TokenRecord]:
        data = secret.data or {}
        if secret.type != API_KEY_TYPE:
            content = data.get(_FILE_KEY)
            return parse(f"{self}: {_FILE_KEY}", base64.b64decode(content)) if content else []
        noted = (secret.metadata.annotations or {}).get(_ANNOTATION)
        known = {_key(record): record for record in parse(str(self), noted)} if noted else {}
        return [
            known.get(key) or _made_elsewhere(key, value, secret.metadata.creation_timestamp)
            for key, value in data.items()
        ]

    def _with(self, secret: Any, records: list[TokenRecord], tokens: dict[str, str]) -> Any:
        from kubernetes.client import V1ObjectMeta, V1Secret

        if secret is None:
            metadata = V1ObjectMeta(name=self.name, namespace=self.namespace)
            secret = V1Secret(metadata=metadata, type=self.new_type)
        data = dict(secret.data or {})
        if secret.type != API_KEY_TYPE:
            secret.data = {**data, _FILE_KEY: _encode(dump(records))}
            return secret
        kept: dict[str, str] = {}
        noted: list[TokenRecord] = []
        for record in records:
            if record.id in tokens:
                kept[_key(record)] = _encode(f"Bearer {tokens[record.id]}")
            elif _key(record) in data:
                kept[_key(record)] = data[_key(record)]
            else:
                kept[record.client] = data[record.client]
                continue
            noted.append(record)
        secret.data = kept
        annotations = dict(secret.metadata.annotations or {})
        annotations[_ANNOTATION] = json.dumps(json.loads(dump(noted)), separators=(",", ":"))
        secret.metadata.annotations = annotations
        return secret

    def _read(self, api: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return api.read_namespaced_secret(self.name, self.namespace)
        except ApiException as error:
            if error.status == _NOT_FOUND:
                return None
            raise self._failed(error) from None
        except HTTPError as error:
            raise TokenFileError(f"{self}: the cluster cannot be reached: {error}") from None

    def _api(self) -> Any:
        # Imported here: the package takes a second, and files need none of it.
        from kubernetes import client, config

        # Not `load_config`, which chooses between the two and says so on stdout, beside the token.
        in_pod = "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ
        try:
            if in_pod and self.context is None:
                config.load_incluster_config()
            else:
                config.load_kube_config(context=self.context)
        except config.ConfigException as error:
            raise TokenFileError(f"no access to a cluster: {error}") from None
        return client.CoreV1Api()

    def _failed(self, error: Any) -> TokenFileError:
        try:
            reason = json.loads(error.body)["message"]
        except (TypeError, ValueError, KeyError):
            reason = error.reason
        return TokenFileError(f"{self}: {reason} ({error.status})")

    def __str__(self) -> str:
        return f"secret {self.namespace}/{self.name}"


def _key(record: TokenRecord) -> str:
    return f"{record.client}.{record.id}"


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _made_elsewhere(key: str, value: str, created: Any) -> TokenRecord:
    """A record for a name that somebody put into the Secret by hand."""
    header = base64.b64decode(value).decode("utf-8", "replace")
    digest = hashlib.sha256(header.removeprefix("Bearer ").encode()).hexdigest()
    # Not validated: a name from elsewhere need not be one that this program would give.
    return TokenRecord.model_construct(
        id=digest[:8], client=key, sha256=digest, created=created, expires=None
    )
