"""The endpoint on Ray Serve: a deployment for each model, and gateways that speak HTTP.

    serve.run(build_app(ServeConfig(models=(ServedModelConfig(path="merged"),))))

A model's replicas hold its weights and grow with what is asked of them; the gateways hold none.
Beyond loopback nothing is served without keys, whatever file started the proxy.
"""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from raytune_llama.config.settings import ConfigError
from raytune_llama.model.llama import check_model_directory
from raytune_llama.serve.config import ReplicaConfig, ServeConfig
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


def build_app(config: ServeConfig) -> serve.Application:
    """Build the application that `serve run` and `serve deploy` take.

    Raises:
        ConfigError: the file of keys is none, the proxy that runs may be reached by others and
            there are no keys, or a directory that this machine has is no model.
    """
    keys = load_config_keys(config)
    host = proxy_host()
    if host is not None:
        # Where no proxy runs yet, the gateways look again.
        check_exposure(host, keys)
    problems: list[str] = []
    for number, model in enumerate(config.models):
        # On a cluster an absolute path may be one of the replicas' nodes alone.
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
    ledger: Any = serve.deployment(
        RateLimiterReplica,
        name=RATE_LIMITER_NAME,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
    )
    return build_gateway(config).bind(ledger.bind(config.key_limits), *models)


def _model_deployment(replicas: ReplicaConfig) -> serve.Deployment:
    deployment: Any = serve.deployment(
        ModelReplica,
        max_ongoing_requests=replicas.slots,
        max_queued_requests=replicas.waiting,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            target_ongoing_requests=replicas.target_ongoing or replicas.slots / 2,
            # Short, so that it follows; Ray wants more than the 10 s between two of its reports.
            look_back_period_s=12.0,
            upscale_delay_s=replicas.upscale_seconds,
            downscale_delay_s=replicas.downscale_seconds,
        ),
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        # A model that can't be loaded can't be loaded the twentieth time either.
        max_constructor_retry_count=3,
        max_surge_percent=100 if replicas.surge else 0,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": int(replicas.use_gpu)},
    )
    return deployment
