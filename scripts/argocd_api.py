"""Argo CD's API, as far as a release needs it: what `scripts/deploy` talks to."""

from __future__ import annotations

import os
import ssl
import sys
import time
from typing import Any

import httpx

Object = dict[str, Any]

_DEX_CONNECTOR = "github-actions"
# A release lasts minutes, in which Argo CD may be busy, or restarted by an upgrade of its own.
_PATIENCE_S = 120.0


class DeployError(Exception):
    """The release cannot be made; the message is why.

    Attributes:
        status: of Argo CD's answer, if it was one.
    """

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class RefusedError(DeployError):
    """Argo CD did not take the application: nothing has changed."""


class ArgoCD:
    """Its API, as far as a release needs it (`/swagger-ui` of any Argo CD).

    What only asks is asked again, for up to two minutes, where Argo CD cannot answer; but not the
    first time, when it is its address or a token that may be wrong.
    """

    def __init__(self, server: str, token: str | None) -> None:
        url = server if "://" in server else f"https://{server}"
        file = os.environ.get("ARGOCD_CA_FILE")
        verify = ssl.create_default_context(cafile=file) if file else True
        self.url = url.rstrip("/")
        self._client = httpx.Client(base_url=self.url, timeout=60, verify=verify)
        self._client.headers["Authorization"] = f"Bearer {token or self._exchanged()}"
        self._patience = 0.0
        if not self._call("GET", "/api/v1/session/userinfo").get("loggedIn"):
            raise DeployError(
                f"{self.url} does not know the token: ARGOCD_AUTH_TOKEN may have expired"
            )
        self._patience = _PATIENCE_S

    def application(self, name: str, refresh: bool = False) -> Object | None:
        """None if there is none."""
        query = {"refresh": "normal"} if refresh else {}
        try:
            return self._call("GET", f"/api/v1/applications/{name}", params=query)
        except DeployError as error:
            # Argo CD says "permission denied" for what is not there, too.
            if error.status in (403, 404):
                return None
            raise

    def upsert(self, application: Object) -> Object:
        """Create or replace it. Argo CD renders it first and refuses what cannot be rendered."""
        query = {"upsert": "true", "validate": "true"}
        try:
            return self._call("POST", "/api/v1/applications", params=query, json=application)
        except DeployError as error:
            raise RefusedError(f"Argo CD refuses the application: {error}") from None

    def sync(self, name: str) -> None:
        self._call("POST", f"/api/v1/applications/{name}/sync", json={"name": name, "prune": True})

    def terminate(self, name: str) -> None:
        """End the sync that is under way, if one is."""
        try:
            self._call("DELETE", f"/api/v1/applications/{name}/operation")
        except DeployError as error:
            if "No operation is in progress" not in str(error):
                raise

    def pods(self, name: str) -> list[Object]:
        """All pods below the application's resources, with health and images."""
        tree = self._call("GET", f"/api/v1/applications/{name}/resource-tree")
        return [node for node in tree.get("nodes") or [] if node["kind"] == "Pod"]

    def restart(self, name: str, service: Object) -> None:
        """Run the action `restart` (kuberay/argocd/argocd-cm.yaml) on a RayService."""
        body = {
            "name": name, "namespace": service["namespace"], "resourceName": service["name"],
            "version": service["version"], "group": "ray.io", "kind": "RayService",
            "action": "restart",
        }  # fmt: skip
        self._call("POST", f"/api/v1/applications/{name}/resource/actions/v2", json=body)

    def _call(self, method: str, path: str, **more: Any) -> Object:
        end = time.monotonic() + (self._patience if method == "GET" else 0.0)
        pause = 1.0
        while True:
            try:
                return self._once(method, path, **more)
            except DeployError as error:
                passing = error.status is None or error.status >= 500
                if not passing or time.monotonic() + pause > end:
                    raise
                print(f"asking again in {pause:.0f} s: {error}", file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, 15.0)

    def _once(self, method: str, path: str, **more: Any) -> Object:
        try:
            # Argo CD asks for the type even of a DELETE.
            headers = {"Content-Type": "application/json"}
            answer = self._client.request(method, path, headers=headers, **more)
        except httpx.HTTPError as error:
            raise DeployError(f"{self.url}: {error or type(error).__name__}") from None
        try:
            document = answer.json()
        except ValueError:
            document = None
        if answer.is_error or not isinstance(document, dict):
            told = document.get("message") if isinstance(document, dict) else None
            told = " ".join((told or answer.text).split())[:2000]
            raise DeployError(
                f"{told} (HTTP {answer.status_code}, {method} {path})", answer.status_code
            )
        return document

    def _exchanged(self) -> str:
        """GitHub's token for one of Argo CD's (RFC 8693, by its Dex)."""
        # It has a query of its own.
        request = httpx.URL(os.environ["ACTIONS_ID_TOKEN_REQUEST_URL"])
        request = request.copy_merge_params({"audience": self.url})
        bearer = {"Authorization": f"Bearer {os.environ['ACTIONS_ID_TOKEN_REQUEST_TOKEN']}"}
        try:
            own = httpx.get(request, headers=bearer, timeout=30)
            answer = self._client.post(
                "/api/dex/token",
                auth=("argo-cd-cli", ""),
                data={
                    "connector_id": _DEX_CONNECTOR,
                    "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
                    "scope": "openid email profile groups federated:id",
                    "requested_token_type": "urn:ietf:params:oauth:token-type:access_token",
                    "subject_token": own.raise_for_status().json()["value"],
                    "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
                },
            )
            return str(answer.raise_for_status().json()["access_token"])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise DeployError(f"cannot exchange GitHub's token at {self.url}: {error}") from None
