"""What `raytune serve` does: run an endpoint here, or deploy a config file of Ray Serve."""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from raytune_llama.config.errors import UserError
from raytune_llama.connection import connect_to_ray
from raytune_llama.logs import waiting
from raytune_llama.serve.app import build_app
from raytune_llama.serve.config import EndpointConfig

logger = logging.getLogger(__name__)

DASHBOARD_URL = "http://127.0.0.1:8265"
"""Where a cluster's dashboard listens, unless `address=URL` says otherwise."""


def serve_until_interrupted(config: EndpointConfig, announce: Callable[[str], object]) -> int:
    """Start the endpoint, on the cluster that the environment names or on a new one, and wait.

    Args:
        config: The endpoint.
        announce: Is given a line once requests are answered.

    Returns:
        The exit status: 0 once it is interrupted.

    Raises:
        ConfigError: The config, its models or keys do not allow it.
        KeyboardInterrupt: It was interrupted before it answered.
    """
    with connect_to_ray():
        serve.start(http_options={"host": config.host, "port": config.port})
        try:
            what = "starting replicas, which import PyTorch and load the model"
            with waiting(logger, what, usually="20 to 60 s, and 2 to 10 s per GB of weights"):
                serve.run(build_app(config), name="llm")
            names = ", ".join(model.served_name for model in config.models)
            announce(f"serving {names} at http://{config.host}:{config.port}/v1; Ctrl-C stops it")
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        finally:
            serve.shutdown()
    return 0


def deploy_file(file: Path, arguments: Sequence[str]) -> str:
    """Deploy a config file of Ray Serve to a running cluster; return the dashboard's address.

    Args:
        file: As `serve deploy` takes it, with `applications`.
        arguments: Nothing, or `address=URL` of the cluster's dashboard.

    Raises:
        UserError: The arguments are others, or no cluster answers at the address.
    """
    address = DASHBOARD_URL
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name != "address" or not value:
            raise UserError(
                f"{argument}: a Ray Serve config file takes no overrides but address=URL; "
                f"change {file} instead"
            )
        address = value
    config = cast("dict[Any, Any]", yaml.safe_load(file.read_text(encoding="utf-8")))
    try:
        ServeSubmissionClient(address).deploy_applications(config)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"address: {address} does not accept the deployment ({error}); start a cluster with "
            "`ray start --head`, or give its dashboard as address=URL"
        ) from error
    return address
