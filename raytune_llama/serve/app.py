"""The endpoint on Ray Serve: an application per model, whose replicas serve HTTP themselves.

    serve.run(build_app(ServeConfig(models=(ServedModelConfig(path="merged"),))))

A model's replicas hold its weights and autoscale with the load. Several models are applications at
`/NAME` each, with a gateway at `/` for clients that name the model in the body. Without API keys
the endpoint is served on loopback only, whichever config started the proxy.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from raytune_llama.config.settings import ConfigError
from raytune_llama.logs import setup_logging
from raytune_llama.serve.config import (
    GatewayConfig,
    ReplicaConfig,
    ServeConfig,
    check_model_path,
    read_arguments,
    read_gateway_arguments,
)
from raytune_llama.serve.gateway import GATEWAY_NAME, NUM_GATEWAYS, GatewayReplica
from raytune_llama.serve.http.keys import ApiKeys, keys_from_environment
from raytune_llama.serve.model_paths import pin_models
from raytune_llama.serve.proxy import check_exposure, proxy_host, read_key_hashes
from raytune_llama.serve.rate_limiter import bind_rate_limiter
from raytune_llama.serve.replica import ModelReplica

APP_NAME = "llm"
"""Name of the application of an endpoint with one model."""

MODEL_DEPLOYMENT = "model"
"""Name of the deployment of a model's replicas."""

SPARE_REQUESTS = 1000
"""Requests that a replica receives beyond its slots and queue: those that it refuses itself, with a
response in OpenAI's format, and those that need no slot."""


@dataclass(frozen=True)
class NamedApp:
    """An application to deploy."""

    name: str
    """Its name in Ray Serve."""

    route_prefix: str
    """Its path: `/`, or `/NAME`."""

    app: serve.Application
    """The application."""


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build a model's application from the arguments of `serve run` or of an application's `args`.

    Args:
        arguments: Fields of `ServeConfig`, also by dotted paths such as `replicas.max`;
            `model_dir` stands for one model's path.

    Raises:
        ConfigError: All mistakes in the arguments.
    """
    setup_logging()
    return build_app(read_arguments(arguments))


def gateway(arguments: dict[str, Any]) -> serve.Application:
    """Build the gateway's application from an application's `args`.

    Args:
        arguments: Fields of `GatewayConfig`.

    Raises:
        ConfigError: All mistakes in the arguments.
    """
    setup_logging()
    return build_gateway(read_gateway_arguments(arguments))


def build_apps(config: ServeConfig) -> list[NamedApp]:
    """Build the applications of an endpoint: its model's, or all models' and the gateway's.

    Raises:
        ConfigError: see `build_app`.
    """
    config = pin_models(config)
    if len(config.models) == 1:
        return [NamedApp(APP_NAME, "/", build_app(config))]
    front = GatewayConfig(
        models=tuple(model.served_name for model in config.models),
        keys_file=config.keys_file,
        limits=config.limits,
        key_limits=config.key_limits,
    )
    problems: list[str] = []
    apps: list[NamedApp] = []
    for number, model in enumerate(config.models):
        own = replace(config, models=(model,), shared_limits_app=GATEWAY_NAME)
        try:
            built = build_app(own)
        except ConfigError as error:
            problems += [text.replace("models.0", f"models.{number}", 1) for text in error.problems]
        else:
            apps.append(NamedApp(model.served_name, f"/{model.served_name}", built))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return [*apps, NamedApp(GATEWAY_NAME, "/", build_gateway(front))]


def build_app(config: ServeConfig) -> serve.Application:
    """Build the application of one model.

    Raises:
        ConfigError: there are several models, the keys file is invalid, the running proxy is
            reachable from other hosts without API keys, or a path is not a model directory.
    """
    _, *others = config.models
    if others:
        raise ConfigError(
            [
                f"models: got {len(config.models)}, but an application has one; list an "
                "application for each model and one for the gateway, as serve/config.yaml shows, "
                "or start all with `raytune serve`"
            ]
        )
    built_with = _check_keys(config.keys_file)
    config = pin_models(config)
    model = config.models[0]
    problems = check_model_path(model.path, may_be_remote=True)
    if problems:
        raise ConfigError([f"models.0.path: {text}" for text in problems])
    limiter = None if config.shared_limits_app else bind_rate_limiter(config.key_limits)
    bound = () if limiter is None else (limiter,)
    return _model_deployment(config.replicas).bind(model, config, built_with, *bound)


def build_gateway(config: GatewayConfig) -> serve.Application:
    """Build the application of the gateway, which holds the rate limiter of all models.

    Raises:
        ConfigError: the keys file is invalid, or the running proxy is reachable from other hosts
            without API keys.
    """
    built_with = _check_keys(config.keys_file)
    limiter = bind_rate_limiter(config.key_limits)
    deployment: Any = serve.deployment(
        GatewayReplica,
        name=GATEWAY_NAME,
        num_replicas=NUM_GATEWAYS,
        max_ongoing_requests=SPARE_REQUESTS,
        max_constructor_retry_count=3,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=config.limits.request_seconds,
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind(config, built_with, *(() if limiter is None else (limiter,)))


def _check_keys(keys_file: str | None) -> ApiKeys:
    """Return the keys of this process's environment, the only one that may have any."""
    keys, host = read_key_hashes(keys_file), proxy_host()
    if host is not None:
        # If no proxy is running yet, the replicas check again.
        check_exposure(host, keys)
    return keys_from_environment(os.environ)


def _model_deployment(replicas: ReplicaConfig) -> serve.Deployment:
    deployment: Any = serve.deployment(
        ModelReplica,
        name=MODEL_DEPLOYMENT,
        max_ongoing_requests=replicas.slots + replicas.waiting + SPARE_REQUESTS,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            target_ongoing_requests=replicas.target_ongoing or replicas.slots / 2,
            # Short, to follow the load; Ray requires more than its report interval of 10 s.
            look_back_period_s=12.0,
            upscale_delay_s=replicas.upscale_seconds,
            downscale_delay_s=replicas.downscale_seconds,
        ),
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        # A model that can't be loaded will not load on the twentieth retry either.
        max_constructor_retry_count=3,
        max_surge_percent=100 if replicas.surge else 0,
        ray_actor_options={
            "num_cpus": replicas.cpus,
            "num_gpus": int(replicas.use_gpu),
            "accelerator_type": replicas.accelerator_type,
            "label_selector": replicas.label_selector or None,
        },
    )
    return deployment
