"""The endpoint on Ray Serve: one deployment per model, and gateways that serve HTTP.

    serve.run(build_app(ServeConfig(models=(ServedModelConfig(path="merged"),))))

A model's replicas hold its weights and autoscale with the load; the gateways hold none. Without API
keys the endpoint is served on loopback only, whichever config started the proxy.
"""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from raytune_llama.config.settings import ConfigError
from raytune_llama.logs import setup_logging
from raytune_llama.model.llama import check_model_directory
from raytune_llama.serve.config import ReplicaConfig, ServeConfig, read_arguments
from raytune_llama.serve.gateway import (
    RATE_LIMITER_NAME,
    RateLimiterReplica,
    build_gateway,
    check_exposure,
    deployment_name,
    load_config_keys,
    proxy_host,
)
from raytune_llama.serve.replica import ModelReplica


def app(arguments: dict[str, Any]) -> serve.Application:
    """Build the endpoint from the arguments of `serve run` or of an application's `args`.

    Args:
        arguments: Fields of `ServeConfig`, also by dotted paths such as `replicas.max`;
            `model_dir` stands for one model's path.

    Raises:
        ConfigError: All mistakes in the arguments.
    """
    setup_logging()
    return build_app(read_arguments(arguments))


def build_app(config: ServeConfig) -> serve.Application:
    """Build the application for `serve run` and `serve deploy`.

    Raises:
        ConfigError: the keys file is invalid, the running proxy is reachable from other hosts
            without API keys, or a directory on this machine is not a model directory.
    """
    keys = load_config_keys(config)
    host = proxy_host()
    if host is not None:
        # If no proxy is running yet, the gateways check again.
        check_exposure(host, keys)
    problems: list[str] = []
    for number, model in enumerate(config.models):
        # On a cluster, an absolute path may exist only on the replicas' nodes.
        if Path(model.path).exists() or not Path(model.path).is_absolute():
            found = check_model_directory(Path(model.path))
            problems += [text.replace("model.path", f"models.{number}.path", 1) for text in found]
    if problems:
        raise ConfigError(problems)
    deployment = _model_deployment(config.replicas)
    models = [
        deployment.options(name=deployment_name(model.served_name)).bind(model, config)
        for model in config.models
    ]
    rate_limiter: Any = serve.deployment(
        RateLimiterReplica,
        name=RATE_LIMITER_NAME,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
    )
    return build_gateway(config).bind(rate_limiter.bind(config.key_limits), *models)


def _model_deployment(replicas: ReplicaConfig) -> serve.Deployment:
    deployment: Any = serve.deployment(
        ModelReplica,
        max_ongoing_requests=replicas.slots,
        max_queued_requests=replicas.waiting,
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
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": int(replicas.use_gpu)},
    )
    return deployment
