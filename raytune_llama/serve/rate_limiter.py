"""The deployment that holds the rate limits of API keys, and the replicas' client of it.

It is deployed only if a key has limits. While it is being replaced, requests are admitted without
it, which is logged: API keys protect access, rate limits only share the load among the keys.
"""

import asyncio
import logging
import uuid
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from raytune_llama.logs import setup_logging
from raytune_llama.serve.config import KeyLimits
from raytune_llama.serve.http.rate_limit import (
    REPLICA_TIMEOUT_SECONDS,
    RateLimitClient,
    RateLimiter,
)

logger = logging.getLogger(__name__)

RATE_LIMITER_NAME = "rate-limiter"
"""Name of the application and of its deployment."""

TIMEOUT_SECONDS = 2.0
"""Seconds to wait for the rate limiter; after that a request is admitted without it."""


class RateLimiterReplica:
    """The rate limiter as a Ray Serve deployment."""

    def __init__(self, limits: KeyLimits) -> None:
        setup_logging()
        self._rate_limiter = RateLimiter(limits)

    async def admit(self, replica: str, key: str) -> float | None:
        """Admit a request; see `RateLimiter.admit`."""
        return self._rate_limiter.admit(replica, key)

    async def release(self, replica: str, key: str) -> None:
        """Record the end of a request."""
        self._rate_limiter.release(replica, key)

    async def keep_alive(self, replica: str) -> None:
        """Record that a replica with running requests is alive."""
        self._rate_limiter.keep_alive(replica)


class RateLimiterHandle:
    """`RateLimitClient` of a replica."""

    def __init__(self, app_name: str) -> None:
        """Connect to an application's rate limiter at the first request.

        Args:
            app_name: application of the rate limiter, which may be deployed later than this one.
        """
        self._app_name, self._name = app_name, uuid.uuid4().hex
        self._handle: DeploymentHandle | None = None
        self._num_running = 0
        self._keeping_alive: asyncio.Task[None] | None = None
        # The event loop keeps no strong references to tasks.
        self._tasks: set[asyncio.Task[object]] = set()

    async def admit(self, key: str) -> float | None:
        """Admit a request; see `RateLimitClient`."""
        wait = await self._call("admit", key)
        if wait is None:
            self._num_running += 1
            # One task, also if requests end and begin again while it sleeps.
            if self._keeping_alive is None or self._keeping_alive.done():
                self._keeping_alive = asyncio.create_task(self._keep_alive())
        return wait

    def release(self, key: str) -> None:
        """Record the end of a request."""
        self._num_running -= 1
        task = asyncio.create_task(self._call("release", key))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_alive(self) -> None:
        """Report this replica as alive as long as it has running requests."""
        while self._num_running:
            await asyncio.sleep(REPLICA_TIMEOUT_SECONDS / 4)
            await self._call("keep_alive")

    async def _call(self, method: str, *arguments: str) -> float | None:
        """Call a method of the deployment; return None if it does not respond."""
        try:
            if self._handle is None:
                # In a thread: it asks Ray Serve's controller whether the deployment exists.
                self._handle = await asyncio.to_thread(
                    serve.get_deployment_handle, RATE_LIMITER_NAME, self._app_name
                )
            response: Any = getattr(self._handle, method).remote(self._name, *arguments)
            return await asyncio.wait_for(response, TIMEOUT_SECONDS)
        except (KeyError, TimeoutError, RayError, RayServeException) as error:
            logger.warning("rate limiter does not respond, continuing without it: %r", error)
            return None


def bind_rate_limiter(limits: KeyLimits) -> serve.Application | None:
    """Return the deployment to bind to a model's; None if no key has limits."""
    if limits == KeyLimits():
        return None
    deployment: Any = serve.deployment(
        RateLimiterReplica,
        name=RATE_LIMITER_NAME,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(limits)


def connect_rate_limiter(limits: KeyLimits, app_name: str | None) -> RateLimitClient | None:
    """Return the client of a rate limiter for this replica; None without limits.

    Args:
        limits: limits of every key.
        app_name: application of the rate limiter; None: this replica's.
    """
    if limits == KeyLimits():
        return None
    return RateLimiterHandle(app_name or serve.get_replica_context().app_name)
