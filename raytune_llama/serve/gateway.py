"""The process that speaks HTTP for the models, and the ledger that all such processes share.

Imports neither torch nor transformers: a gateway that was killed is back in a second or two.
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
"""Name of the ledger's deployment."""

PUSH_SECONDS = 3.0
"""How often a gateway tells the ledger what it has counted, and that it lives."""

RATE_LIMITER_TIMEOUT_SECONDS = 2.0
"""How long the ledger may take to answer; a request is then let in without it."""


class ReplicaBackend:
    """A model behind its deployment's handle, as the gateway sees it."""

    def __init__(self, handle: DeploymentHandle, adapters_dir: str | None) -> None:
        self._handle = handle.options(stream=True)
        self._registry = None if adapters_dir is None else AdapterRegistry.from_path(adapters_dir)

    async def adapters(self) -> list[str]:
        """List the registry, here: a list must not wait for a slot, or start a replica."""
        if self._registry is None:
            return []
        return sorted(await asyncio.to_thread(self._registry.list))

    def answer(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | OutputDelta, None]:
        """Yield what a replica yields."""
        return _stream_from_replica(self._handle.answer, request)

    def embed(self, request: EmbeddingRequest) -> AsyncGenerator[int | Vectors, None]:
        """Yield what a replica yields."""
        return _stream_from_replica(self._handle.embed, request)

    async def check(self) -> None:
        """Do nothing: Ray Serve replaces replicas that have failed."""


async def _stream_from_replica(
    method: DeploymentHandle, request: object
) -> AsyncGenerator[Any, None]:
    """Ask a replica once the first item is; yield what it yields, its errors as they were.

    Closing it ends the replica's work.
    """
    # Typed as a single answer whatever it is.
    answers: Any = method.remote(request)
    try:
        async for item in answers:
            yield item
    except BackPressureError as error:
        raise BusyError("as many requests wait as may") from error
    except (RayError, RayServeException) as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, InvalidRequestError | BusyError | EngineError):
            raise cause from None
        raise EngineError(f"the model's replica has failed: {cause!r}") from error
    except (asyncio.CancelledError, GeneratorExit):
        # Only here: to cancel what was refused raises the refusal again.
        answers.cancel()
        raise


class RateLimiterReplica:
    """The ledger in an actor of Ray Serve."""

    def __init__(self, limits: KeyLimits) -> None:
        setup_logging()
        self._ledger = RateLimiter(limits)

    async def admit(self, gateway: str, key: str) -> float | None:
        """Take a request in; see `RateLimiter.admit`."""
        return self._ledger.admit(gateway, key)

    async def release(self, gateway: str, key: str) -> None:
        """Note a request's end."""
        self._ledger.release(gateway, key)

    async def push(self, gateway: str, families: Sequence[Metric]) -> None:
        """Take what a gateway has counted."""
        self._ledger.push(gateway, families)

    async def families(self) -> list[Metric]:
        """Return what all gateways have counted."""
        return self._ledger.families()


class SharedRateLimitClient:
    """The ledger that all gateways share, behind its deployment's handle.

    While it is being replaced, requests are let in without it, which is logged: who may ask is
    the keys' matter, how much is a courtesy between them.
    """

    def __init__(self, handle: DeploymentHandle, limits: KeyLimits, meter: ServeMetrics) -> None:
        self._handle, self._meter = handle, meter
        self._is_limited = limits != KeyLimits()
        self._name = uuid.uuid4().hex
        self._pushing: asyncio.Task[None] | None = None
        self._releasing: set[asyncio.Task[object]] = set()

    async def admit(self, key: str) -> float | None:
        """Take a request in; see `RateLimitClient`."""
        self._begin()
        if not self._is_limited:
            return None
        return await self._ask(self._handle.admit.remote(self._name, key))

    def release(self, key: str) -> None:
        """Note a request's end."""
        if self._is_limited:
            task = asyncio.ensure_future(self._ask(self._handle.release.remote(self._name, key)))
            # The loop keeps no reference of its own.
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def families(self) -> list[Metric]:
        """Return what all gateways have counted; of this one alone while there is no ledger."""
        self._begin()
        own = self._meter.families()
        await self._ask(self._handle.push.remote(self._name, own))
        return await self._ask(self._handle.families.remote()) or sum_families([own])

    def _begin(self) -> None:
        """Start to push; there is a loop now."""
        if self._pushing is None:
            self._pushing = asyncio.create_task(self._push())

    async def _push(self) -> None:
        while True:
            await self._ask(self._handle.push.remote(self._name, self._meter.families()))
            await asyncio.sleep(PUSH_SECONDS)

    async def _ask(self, response: Awaitable[T]) -> T | None:
        try:
            return await asyncio.wait_for(response, RATE_LIMITER_TIMEOUT_SECONDS)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("the ledger does not answer: %r", error)
            return None


def build_gateway(config: ServeConfig) -> serve.Deployment:
    """Return the deployment that speaks HTTP; it is bound to the ledger and the models."""
    built_with = keys_from_environment(os.environ)

    def build() -> FastAPI:
        # Those of the process that builds the application too: its environment may have them alone.
        keys = load_config_keys(config) + built_with
        check_exposure(proxy_host(), keys)
        app_name = serve.get_replica_context().app_name
        meter = ServeMetrics()
        ledger = serve.get_deployment_handle(RATE_LIMITER_NAME, app_name)
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
            meter=meter,
            books=SharedRateLimitClient(ledger, config.key_limits, meter),
        )

    class Gateway:
        """Speaks HTTP for the models that it is bound to."""

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
    """Return the keys of the file that the config names and of this process's environment.

    Raises:
        ConfigError: one is no hash of a key.
    """
    return load_keys(Path(config.keys_file) if config.keys_file else None, os.environ)


def deployment_name(model: str) -> str:
    """Return the name of a model's deployment."""
    return f"model-{model}"


def proxy_host() -> str | None:
    """Return the address that Ray Serve's proxy listens at; None where it can't be known."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


def check_exposure(host: str | None, keys: ApiKeys) -> None:
    """Refuse to serve beyond loopback without keys.

    Raises:
        ConfigError: the proxy listens elsewhere, or where is not known.
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
                f"keys_file: none, but the proxy listens at {host or 'an unknown address'}, which "
                "others may reach; name a file of keys, or set http_options.host to 127.0.0.1"
            ]
        )
