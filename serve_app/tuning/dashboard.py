"""A deployment as the Serve REST API of Ray's dashboard tells of it.

`GET /api/serve/applications/`, whose answer is Ray's `ServeInstanceDetails`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx

_PATH = "/api/serve/applications/"
_TIMEOUT_S = 20.0


class DashboardError(Exception):
    """The dashboard does not answer, or not as expected; the message says so in one line."""


@dataclass(frozen=True)
class Deployment:
    """One deployment at one moment.

    Attributes:
        application: its name.
        target: replicas that Ray Serve aims at.
        states: replicas by state, as `RUNNING` or `STARTING`.
        config: the options that hold, as a Serve config has them (`autoscaling_config` and others).
    """

    application: str
    target: int
    states: dict[str, int]
    config: dict[str, Any]

    @property
    def running(self) -> int:
        """Replicas that take requests."""
        return self.states.get("RUNNING", 0)


class Dashboard:
    """Reads one deployment, wherever it is among the applications.

    Args:
        url: of Ray's dashboard.
        token: Ray's own, or None.
        application: which one, where several have a deployment of the name.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        deployment: str = "Summarizer",
        application: str | None = None,
    ) -> None:
        self._url = url.rstrip("/") + _PATH
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(headers=headers, timeout=_TIMEOUT_S, trust_env=False)
        self._deployment, self._application = deployment, application

    def read(self) -> Deployment:
        """The deployment now.

        Raises:
            DashboardError: no answer, no such deployment, or several.
        """
        found = []
        for name, application in self._applications().items():
            one = application.get("deployments", {}).get(self._deployment)
            if one is not None and self._application in (None, name):
                found.append((name, one))
        if len(found) != 1:
            names = ", ".join(name for name, _ in found)
            told = f"in several applications: {names}" if found else "not there"
            raise DashboardError(f"{self._url}: deployment {self._deployment} is {told}")
        [(name, one)] = found
        try:
            states = Counter(str(replica["state"]) for replica in one["replicas"])
            target, config = int(one["target_num_replicas"]), dict(one["deployment_config"])
        except (KeyError, TypeError, ValueError) as error:
            raise DashboardError(f"{self._url}: not what Ray Serve answers: {error!r}") from None
        return Deployment(name, target, dict(states), config)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _applications(self) -> dict[str, Any]:
        try:
            answer = self._client.get(self._url)
            if answer.status_code in (401, 403):
                raise DashboardError(
                    f"{self._url}: status {answer.status_code}: Ray's token is missing or wrong"
                )
            answer.raise_for_status()
            applications = answer.json()["applications"]
        except httpx.HTTPStatusError as error:
            raise DashboardError(f"{self._url}: status {error.response.status_code}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DashboardError(f"{self._url}: {error or type(error).__name__}") from None
        except (ValueError, KeyError, TypeError):
            raise DashboardError(f"{self._url}: not what Ray Serve answers") from None
        if not isinstance(applications, dict):
            raise DashboardError(f"{self._url}: not what Ray Serve answers")
        return applications
