"""The endpoint on Ray Serve: a deployment for each model, and one that speaks HTTP.

    serve.run(build_app(ServeConfig(models=(ServedModelConfig(path="merged"),))))

A model's replicas hold its weights and grow with what is asked of them; the gateway's hold none.
Beyond loopback nothing is served without keys, whatever file started the proxy.
"""

import ipaddress
import logging
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import FastAPI
from pydantic import Field, model_validator
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from raytune_llama.config import ConfigError, settings
from raytune_llama.logs import setup_logging
from raytune_llama.serve.answers import Answerer, Part, RequestError, SamplingDefaults
from raytune_llama.serve.engine.base import BusyError, EngineError
from raytune_llama.serve.engine.loop import TransformersEngine
from raytune_llama.serve.engine.stepper import Stepper
from raytune_llama.serve.http.keys import Keys, keys_from_environment, load_keys
from raytune_llama.serve.http.limits import Limits
from raytune_llama.serve.http.protocol import ChatRequest, CompletionRequest
from raytune_llama.serve.http.routes import build_http
from raytune_llama.serve.models import ServedModelConfig, load_served

logger = logging.getLogger(__name__)


@settings
class ReplicaConfig:
    """Copies of a model, and what each takes."""

    min: Annotated[int, Field(ge=0)] = 1
    """Fewest; 0: none while nobody asks, and the first request waits for one."""

    max: Annotated[int, Field(ge=1)] = 1
    """Most."""

    slots: Annotated[int, Field(ge=1, le=1024)] = 16
    """Requests that a replica answers at a time."""

    waiting: Annotated[int, Field(ge=0)] = 64
    """Requests that wait for all replicas together; more are refused with 429."""

    target_ongoing: Annotated[float, Field(gt=0)] | None = None
    """Requests a replica is to have, above which one more is started; null: half its slots."""

    upscale_seconds: Annotated[float, Field(ge=0)] = 10.0
    """How long there must be too many before one more is started."""

    downscale_seconds: Annotated[float, Field(ge=0)] = 300.0
    """How long there must be too few before one is stopped; what it answers is ended first."""

    drain_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long a replica that is stopped may take to end its answers."""

    use_gpu: bool = False
    """Answer on a GPU, one a replica."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs reserved for a replica; as many threads compute, at least one."""

    prefill_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest piece of a prompt that is read between two tokens of the others' answers."""

    @model_validator(mode="after")
    def _check(self) -> "ReplicaConfig":
        if self.min > self.max:
            raise ConfigError([f"min: got {self.min}, more than max, {self.max}"])
        return self


@settings
class ServeConfig:
    """An endpoint."""

    models: Annotated[tuple[ServedModelConfig, ...], Field(min_length=1)]
    """What is served; requests choose by name."""

    keys_file: str | None = None
    """File of the hashes of API keys, on every node that speaks HTTP; null: no keys but those in
    the variable RAYTUNE_LLAMA_API_KEYS, and without any, on loopback only."""

    limits: Limits = Limits()
    """Bounds on every request."""

    defaults: SamplingDefaults = SamplingDefaults()
    """What requests get that don't say."""

    replicas: ReplicaConfig = ReplicaConfig()
    """Of each model."""


class ModelReplica:
    """A copy of a model, with its own engine."""

    def __init__(self, model: ServedModelConfig, config: ServeConfig) -> None:
        """Load the model; refuse one that is damaged, or tuned with another template."""
        setup_logging()
        replicas = config.replicas
        torch.set_num_threads(max(1, int(replicas.cpus)))
        device = torch.device("cuda" if replicas.use_gpu else "cpu")
        served = load_served(model, device)
        stepper = Stepper(
            served.model,
            num_slots=replicas.slots,
            max_context=served.max_context,
            num_tokens=len(served.tokenizer),
            prefill_tokens=replicas.prefill_tokens,
        )
        # Ray Serve bounds what waits; here it never has to.
        self._engine = TransformersEngine(stepper, max_waiting=10**6)
        self._answerer = Answerer(served, self._engine, config.defaults)

    async def answer(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | Part, None]:
        """Yield the prompt's number of tokens, then the parts of all answers."""
        async for item in self._answerer.respond(request):
            yield item

    async def check_health(self) -> None:
        """Let Ray Serve replace a replica whose engine has failed."""
        self._engine.check()


class ReplicaBackend:
    """A model behind its deployment's handle, as the gateway sees it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(stream=True)

    async def answer(
        self, request: ChatRequest | CompletionRequest
    ) -> AsyncGenerator[int | Part, None]:
        """Yield what a replica yields."""
        answers: Any = self._handle.answer.remote(request)
        try:
            async for item in answers:
                yield item
        except BackPressureError as error:
            raise BusyError("as many requests wait as may") from error
        except RayError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, RequestError | BusyError | EngineError):
                raise cause from None
            raise EngineError(f"the model's replica has failed: {cause!r}") from error
        finally:
            answers.cancel()

    async def check(self) -> None:
        """Do nothing: Ray Serve replaces replicas that have failed."""


def build_app(config: ServeConfig) -> serve.Application:
    """Build the application that `serve run` and `serve deploy` take."""
    names = [model.served_name for model in config.models]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError([f"models: {', '.join(doubled)} stands there twice; give names"])
    _load_keys(config)
    replicas = config.replicas
    deployment: Any = serve.deployment(
        ModelReplica,
        max_ongoing_requests=replicas.slots,
        max_queued_requests=replicas.waiting,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            target_ongoing_requests=replicas.target_ongoing or replicas.slots / 2,
            upscale_delay_s=replicas.upscale_seconds,
            downscale_delay_s=replicas.downscale_seconds,
        ),
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": int(replicas.use_gpu)},
    )
    models = {
        name: deployment.options(name=f"model-{name}").bind(model, config)
        for name, model in zip(names, config.models, strict=True)
    }
    return _gateway(config, names).bind(*models.values())


def _gateway(config: ServeConfig, names: list[str]) -> serve.Deployment:
    """Return the deployment that speaks HTTP; it is bound to the models."""
    built_with = keys_from_environment(os.environ)

    def build() -> FastAPI:
        # Those of the process that builds the application too: its environment may have them alone.
        keys = _load_keys(config) + built_with
        check_exposure(proxy_host(), keys)
        app_name = serve.get_replica_context().app_name
        return build_http(
            {
                name: ReplicaBackend(serve.get_deployment_handle(f"model-{name}", app_name))
                for name in names
            },
            keys,
            config.limits,
        )

    class Gateway:
        """Speaks HTTP for the models that it is bound to."""

        def __init__(self, *models: DeploymentHandle) -> None:  # noqa: ARG002  # deploys them
            setup_logging()

    gateway: Any = serve.deployment(
        serve.ingress(build)(Gateway),
        name="gateway",
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway


def _load_keys(config: ServeConfig) -> Keys:
    """Return the keys of the file that the config names and of this process's environment."""
    return load_keys(Path(config.keys_file) if config.keys_file else None, os.environ)


def proxy_host() -> str | None:
    """Return the address that Ray Serve's proxy listens at; None where it can't be known."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


def check_exposure(host: str | None, keys: Keys) -> None:
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
