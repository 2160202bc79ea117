"""How the replicas of the Api tell each other what their clients have used."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.api.limiter import TELL_EVERY_S, RateLimiter

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0


async def tell_peers(limiter: RateLimiter) -> None:
    """Tell all replicas of this deployment the limiter's news, every second, until cancelled.

    Each of them must pass it on to `RateLimiter.heard`, in a method `heard(replica, news)`. News
    that cannot be told is lost: for these tokens each replica goes by what it knows itself.
    """
    here = serve.get_replica_context()
    handle: DeploymentHandle[Any] = serve.get_deployment_handle(here.deployment, here.app_name)
    failed = False
    while True:
        await asyncio.sleep(TELL_EVERY_S)
        news = limiter.tell()
        if not news:
            continue
        try:
            told = handle.broadcast("heard", here.replica_id.unique_id, news)
            answers = await told.results_async(timeout_s=_TIMEOUT_S, return_exceptions=True)
            reason = next((one for one in answers if isinstance(one, Exception)), None)
        except Exception as error:
            reason = error
        if reason is not None and not failed:  # one line for a time of trouble
            logger.warning("rate limits: a replica was not told", extra={"reason": str(reason)})
        failed = reason is not None
