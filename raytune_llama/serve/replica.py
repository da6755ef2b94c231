"""A model's replica: its HTTP application holds the model, its adapters and the engine."""

import os
from typing import cast

from fastapi import FastAPI
from ray import serve
from ray.serve import metrics as ray_metrics

from raytune_llama.logs import setup_logging
from raytune_llama.serve.config import ServeConfig, ServedModelConfig
from raytune_llama.serve.http.keys import ApiKeys, watch_keys
from raytune_llama.serve.http.metrics import MetricsApi, ServeMetrics
from raytune_llama.serve.http.routes import build_http_app
from raytune_llama.serve.proxy import check_exposure, proxy_host
from raytune_llama.serve.rate_limiter import connect_rate_limiter


@serve.ingress()
class ModelReplica:
    """A model's replica on Ray Serve: a `LoadedModel` behind the HTTP application."""

    def __init__(
        self,
        model: ServedModelConfig,
        config: ServeConfig,
        built_with: ApiKeys,
        *bound: object,  # noqa: ARG002  # deploys them
    ) -> None:
        """Load the model.

        Args:
            model: settings of the model.
            config: settings of the endpoint.
            built_with: keys in the environment of the process that has built the application.
            bound: other deployments of its application.

        Raises:
            ConfigError: the model can't be served, or not without keys.
        """
        setup_logging()
        self._name, self._config = model.served_name, config
        self._keys = watch_keys(config.keys_file, os.environ, built_with)
        check_exposure(proxy_host(), self._keys)
        # Not at the top: who builds the application imports this module, and needs no PyTorch.
        from raytune_llama.serve.backend import LoadedModel

        self._backend = LoadedModel(model, config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the HTTP application, which Ray Serve calls directly."""
        return build_http_app(
            {self._name: self._backend},
            self._keys,
            self._config.limits,
            # Ray annotates its tags as tuples of one.
            metrics=ServeMetrics(cast("MetricsApi", ray_metrics)),
            rate_limiter=connect_rate_limiter(
                self._config.key_limits, self._config.shared_limits_app
            ),
        )

    async def check_health(self) -> None:
        """Raise if the engine has failed, so that Ray Serve replaces the replica."""
        await self._backend.check()
