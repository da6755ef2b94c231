"""The gateways, which serve HTTP for the models, and the rate limiter that they share.

Imports neither torch nor transformers: a killed gateway restarts within a second or two.
"""

import asyncio
import ipaddress
import logging
import os
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from raytune_llama.config.settings import ConfigError
from raytune_llama.logs import setup_logging
from raytune_llama.serve.adapters.registry import AdapterRegistry
from raytune_llama.serve.config import KeyLimits, ServeConfig
from raytune_llama.serve.engine.protocol import Vectors
from raytune_llama.serve.errors import BusyError, EngineError, InvalidRequestError
from raytune_llama.serve.generation.output import OutputDelta
from raytune_llama.serve.http.keys import ApiKeys, keys_from_environment, load_keys
from raytune_llama.serve.http.metrics import ServeMetrics, sum_families
from raytune_llama.serve.http.rate_limit import RateLimiter
from raytune_llama.serve.http.routes import build_http_app
from raytune_llama.serve.protocol.chat import ChatRequest, CompletionRequest
from raytune_llama.serve.protocol.embeddings import EmbeddingRequest

T = TypeVar("T")

logger = logging.getLogger(__name__)

RATE_LIMITER_NAME = "ledger"
"""Name of the rate limiter's deployment."""

PUSH_SECONDS = 3.0
"""Seconds between a gateway's pushes of its metrics, which are also its heartbeat."""

RATE_LIMITER_TIMEOUT_SECONDS = 2.0
"""Seconds to wait for the rate limiter; after that a request is admitted without it."""


class ReplicaBackend:
    """`ModelBackend` that forwards requests to a model's deployment."""

    def __init__(self, handle: DeploymentHandle, adapters_dir: str | None) -> None:
        self._handle = handle.options(stream=True)
        self._registry = None if adapters_dir is None else AdapterRegistry.from_path(adapters_dir)

    async def adapters(self) -> list[str]:
        """List the registry in the gateway: a list must not wait for a slot, or start a replica."""
        if self._registry is None:
            return []
        return sorted(await asyncio.to_thread(self._registry.list))

    def answer(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | OutputDelta, None]:
        """Yield the items of a replica; see `ModelBackend`."""
        return _stream_from_replica(self._handle.answer, request)

    def embed(self, request: EmbeddingRequest) -> AsyncGenerator[int | Vectors, None]:
        """Yield the items of a replica; see `ModelBackend`."""
        return _stream_from_replica(self._handle.embed, request)

    async def check(self) -> None:
        """Do nothing: Ray Serve replaces replicas that have failed."""


async def _stream_from_replica(
    method: DeploymentHandle, request: object
) -> AsyncGenerator[Any, None]:
    """Send the request on the first `anext`; yield the replica's items and raise its errors.

    Closing the generator cancels the request on the replica.
    """
    # Typed as a single response even for a stream.
    responses: Any = method.remote(request)
    try:
        async for item in responses:
            yield item
    except BackPressureError as error:
        text = "The model is overloaded with other requests. Please try again later."
        raise BusyError(text) from error
    except (RayError, RayServeException) as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, InvalidRequestError | BusyError | EngineError):
            raise cause from None
        raise EngineError(f"The model's replica has failed: {cause!r}") from error
    except (asyncio.CancelledError, GeneratorExit):
        # Only here: canceling a rejected request raises its error again.
        responses.cancel()
        raise


class RateLimiterReplica:
    """The rate limiter as a Ray Serve deployment."""

    def __init__(self, limits: KeyLimits) -> None:
        setup_logging()
        self._rate_limiter = RateLimiter(limits)

    async def admit(self, gateway: str, key: str) -> float | None:
        """Admit a request; see `RateLimiter.admit`."""
        return self._rate_limiter.admit(gateway, key)

    async def release(self, gateway: str, key: str) -> None:
        """Record the end of a request."""
        self._rate_limiter.release(gateway, key)

    async def push(self, gateway: str, families: Sequence[Metric]) -> None:
        """Store a gateway's metrics."""
        self._rate_limiter.push(gateway, families)

    async def families(self) -> list[Metric]:
        """Return the sum of all gateways' metrics."""
        return self._rate_limiter.families()


class SharedRateLimitClient:
    """Client of the rate limiter that all gateways share.

    While its deployment is being replaced, requests are admitted without it, which is logged: API
    keys protect access, rate limits only share the load among the keys.
    """

    def __init__(self, handle: DeploymentHandle, limits: KeyLimits, metrics: ServeMetrics) -> None:
        self._handle, self._metrics = handle, metrics
        self._is_limited = limits != KeyLimits()
        self._name = uuid.uuid4().hex
        self._pushing: asyncio.Task[None] | None = None
        self._releasing: set[asyncio.Task[object]] = set()

    async def admit(self, key: str) -> float | None:
        """Admit a request; see `RateLimitClient`."""
        self._begin()
        if not self._is_limited:
            return None
        return await self._ask(self._handle.admit.remote(self._name, key))

    def release(self, key: str) -> None:
        """Record the end of a request."""
        if self._is_limited:
            task = asyncio.ensure_future(self._ask(self._handle.release.remote(self._name, key)))
            # The event loop keeps no strong reference.
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def families(self) -> list[Metric]:
        """Return the sum of all gateways' metrics; only this one's without the rate limiter."""
        self._begin()
        own = self._metrics.families()
        await self._ask(self._handle.push.remote(self._name, own))
        return await self._ask(self._handle.families.remote()) or sum_families([own])

    def _begin(self) -> None:
        """Start pushing metrics; needs a running event loop."""
        if self._pushing is None:
            self._pushing = asyncio.create_task(self._push())

    async def _push(self) -> None:
        while True:
            await self._ask(self._handle.push.remote(self._name, self._metrics.families()))
            await asyncio.sleep(PUSH_SECONDS)

    async def _ask(self, response: Awaitable[T]) -> T | None:
        try:
            return await asyncio.wait_for(response, RATE_LIMITER_TIMEOUT_SECONDS)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("rate limiter does not respond, continuing without it: %r", error)
            return None


def build_gateway(config: ServeConfig) -> serve.Deployment:
    """Return the HTTP deployment; bind it to the rate limiter and the models."""
    built_with = keys_from_environment(os.environ)

    def build() -> FastAPI:
        # Also the keys of the process that builds the application, the only one that may have any.
        keys = load_config_keys(config) + built_with
        check_exposure(proxy_host(), keys)
        app_name = serve.get_replica_context().app_name
        metrics = ServeMetrics()
        rate_limiter = serve.get_deployment_handle(RATE_LIMITER_NAME, app_name)
        return build_http_app(
            {
                model.served_name: ReplicaBackend(
                    serve.get_deployment_handle(deployment_name(model.served_name), app_name),
                    model.adapters_dir,
                )
                for model in config.models
            },
            keys,
            config.limits,
            metrics=metrics,
            rate_limiter=SharedRateLimitClient(rate_limiter, config.key_limits, metrics),
        )

    class Gateway:
        """Serves HTTP for the models that it is bound to."""

        def __init__(self, *bound: DeploymentHandle) -> None:  # noqa: ARG002  # deploys them
            setup_logging()

    gateway: Any = serve.deployment(
        serve.ingress(build)(Gateway),
        name="gateway",
        num_replicas=config.gateways,
        max_ongoing_requests=1000,
        max_queued_requests=1000,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        graceful_shutdown_timeout_s=config.replicas.drain_seconds,
        max_constructor_retry_count=3,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway


def load_config_keys(config: ServeConfig) -> ApiKeys:
    """Return the keys of the config's keys file and of this process's environment.

    Raises:
        ConfigError: the file can't be read or contains no hash, or an entry of either is not one.
    """
    return load_keys(Path(config.keys_file) if config.keys_file else None, os.environ)


def deployment_name(model: str) -> str:
    """Return the name of a model's deployment."""
    return f"model-{model}"


def proxy_host() -> str | None:
    """Return the host that Ray Serve's proxy listens on; None if it is not running."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


def check_exposure(host: str | None, keys: ApiKeys) -> None:
    """Refuse to serve beyond loopback without keys.

    Raises:
        ConfigError: there are no keys, and the host is unknown or not a loopback address.
    """
    if keys.hashes:
        return
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise ConfigError(
            [
                f"keys_file: not set, but the proxy listens on {host or 'an unknown address'}, "
                "which other hosts may reach; set keys_file to a file of key hashes, or "
                "http_options.host to 127.0.0.1"
            ]
        )
