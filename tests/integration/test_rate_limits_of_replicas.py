"""Limits of clients over several replicas of the Api, and other limits while these run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.usage.folder import segments
from tests.integration.conftest import Deploy, until
from tests.texts import texts

BODY = {"text": texts(1)[0], "max_new_tokens": 8}
BURST = 2_000
LIMITS: dict[str, Any] = {"enabled": True, "tokens_per_minute": 1, "burst_tokens": BURST}


def test_replicas_share_a_clients_bucket_and_take_other_limits_while_they_run(
    deploy: Deploy, tmp_path: Path
) -> None:
    service = deploy(
        "limited", "/limited", auth={"mode": "trusted-header"}, api={"replicas": 2},
        usage={"folder": str(tmp_path)}, rate_limits=LIMITS,
    )  # fmt: skip
    used: list[int] = []

    def post(client: str = "shop") -> httpx.Response:
        headers = {"X-Api-Client": client}
        return httpx.post(f"{service.url}/v1/summarize", json=BODY, headers=headers, timeout=60)

    def refused() -> bool:
        """One more call; remembers what it used."""
        time.sleep(0.05)  # slow enough for the replicas to hear of each other meanwhile
        answer = post()
        if answer.status_code == 200:
            usage = answer.json()["usage"]
            used.append(usage["input_tokens"] + usage["output_tokens"])
            return False
        assert answer.status_code == 429
        return True

    # One replica that refuses may be the one that has heard of the other's calls. Many calls in a
    # row reach both.
    until(lambda: all(refused() for _ in range(20)), "both replicas refuse")
    # What does not fit any more is less than one call. Beyond the bucket is only what one replica
    # let in before it was told, a part of what two buckets hold.
    assert BURST - max(used) < sum(used) < 2 * BURST - max(used)
    assert post("other").status_code == 200
    label = {"application": "limited", "limit": "tokens_per_minute"}
    until(
        lambda: service.cluster.series("ray_t5_rate_limited_total", **label) >= 20,
        "refusals are counted",
    )

    # As Serve does when a deployment's user_config changes.
    api: DeploymentHandle[Any] = serve.get_deployment_handle("Api", "limited")
    changed = {"rate_limits": {**LIMITS, "tokens_per_minute": 0}}
    assert len(api.broadcast("reconfigure", changed).results(timeout_s=60)) == 2
    assert not any(refused() for _ in range(20))

    def replicas() -> set[str]:
        lines = [line for path in segments(tmp_path) for line in path.read_text().splitlines()]
        return {json.loads(line)["replica"] for line in lines}

    until(lambda: len(replicas()) == 2, "both replicas served")
