"""What `raytune serve` does: run an endpoint here, or deploy a config file of Ray Serve."""

import contextlib
import logging
import os
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.exceptions
import yaml

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.connection import connect_to_ray, is_on_cluster
from raytune_llama.logs import waiting
from raytune_llama.serve.config import EndpointConfig, RequestLimits, check_model_path
from raytune_llama.serve.model_paths import pin_models
from raytune_llama.serve.proxy import (
    check_port,
    choose_proxy,
    is_loopback,
    missing_variables,
    proxy_environment,
    read_key_hashes,
)

if TYPE_CHECKING:
    from raytune_llama.serve.app import NamedApp

logger = logging.getLogger(__name__)

SERVE_CONTROLLER_NAME, SERVE_NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
"""Name of Ray Serve's controller and its namespace."""

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
        UserError: The port is in use.
        KeyboardInterrupt: It was interrupted before it answered.
    """
    config = pin_models(config)
    _check(config)
    with _connect(config), ThreadPoolExecutor(1) as background:
        # Ray Serve reads its environment when it is imported.
        from ray import serve

        from raytune_llama.serve.app import build_apps

        # Its import has set the level to INFO.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            # Proxies start while this process checks the models and the replicas load them.
            options = {"host": config.host, "port": config.port}
            proxies = background.submit(serve.start, http_options=options)
            apps = build_apps(config)
            what = "starting replicas, which import PyTorch and load the model"
            with waiting(logger, what, usually="15 to 40 s, and 2 to 10 s per GB of weights"):
                _wait_for_controller(proxies)
                for one in apps:
                    _deploy(one)
                proxies.result()
            names = ", ".join(model.served_name for model in config.models)
            announce(f"serving {names} at http://{config.host}:{config.port}/v1; Ctrl-C stops it")
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
        finally:
            serve.shutdown()
    return 0


def _deploy(one: "NamedApp") -> None:
    """Deploy an application and wait until its replicas are ready.

    Raises:
        UserError: a replica has found a mistake that the user has to fix.
        RuntimeError: it failed for another reason.
    """
    from ray import serve

    try:
        serve.run(one.app, name=one.name, route_prefix=one.route_prefix)
    except RuntimeError as error:
        status = serve.status().applications.get(one.name)
        messages = [part.message for part in status.deployments.values()] if status else []
        # A replica's error arrives as the text of its traceback.
        found = [text.partition(f"{ConfigError.__name__}: ")[2].strip() for text in messages]
        reasons = [text for text in found if text]
        if not reasons:
            raise
        raise UserError("\n".join(dict.fromkeys(reasons))) from error


def _check(config: EndpointConfig) -> None:
    """Find what can be found before Ray is started.

    Raises:
        ConfigError: a model does not exist, the keys file is invalid, or there are no keys for an
            address that other hosts reach.
        UserError: the port is in use.
    """
    joins = is_on_cluster()
    problems = [
        f"models.{number}.path: {text}"
        for number, model in enumerate(config.models)
        for text in check_model_path(model.path, may_be_remote=joins)
    ]
    if problems:
        raise ConfigError(problems)
    if not joins:
        check_port(config.host, config.port)
    keys = read_key_hashes(config.keys_file)
    if not keys.hashes and not is_loopback(config.host):
        raise ConfigError(
            [
                f"keys_file: not set, but host is {config.host}, which other hosts may reach; set "
                "keys_file to a file of key hashes (`raytune make-key`), or host to 127.0.0.1"
            ]
        )


def _wait_for_controller(starting: Future[Any]) -> None:
    """Wait until applications can be deployed, or until it is clear that Ray Serve can't start."""
    while not starting.done():
        with contextlib.suppress(ValueError):  # there is none yet
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            return
        time.sleep(0.1)
    starting.result()


@contextlib.contextmanager
def _connect(config: EndpointConfig) -> Iterator[None]:
    """Connect to the cluster of the environment, or start one that is set up to serve."""
    proxy = choose_proxy(config.proxy, config.host)
    is_new = not is_on_cluster()
    # Not below TMPDIR, which may be too long for the path of a Unix socket.
    with tempfile.TemporaryDirectory(prefix="raytune-serve-", dir="/tmp") as folder:
        variables = proxy_environment(proxy, config.limits, Path(folder), free_ports=is_new)
        os.environ.update(variables)
        with connect_to_ray():
            if not is_new:
                missing = missing_variables(variables)
                if missing and config.proxy == "haproxy":
                    raise UserError(
                        f"proxy: the cluster was started without {' '.join(missing)}; start Ray "
                        'again after eval "$(raytune serve-env)", or set proxy=auto'
                    )
                if missing:
                    logger.warning(
                        "the cluster was started without %s: Ray Serve's own proxy is used, which "
                        'takes more CPU; eval "$(raytune serve-env)" before `ray start` sets it',
                        " ".join(missing),
                    )
            yield


def environment_lines(limits: RequestLimits) -> list[str]:
    """Return shell lines that set the environment in which `ray start` has to be run to serve.

    They are the same on every node; HAProxy's files lie in a folder of this user.

    Args:
        limits: Limits of the endpoint's requests; HAProxy's own are set wider.

    Raises:
        UserError: Another user may enter the folder of HAProxy's files.
    """
    folder = Path(f"/tmp/raytune-serve-{os.getuid()}")  # noqa: S108  # a socket's path is short
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise UserError(f"{folder}: another user may enter it; delete it")
    proxy = choose_proxy("auto", "127.0.0.1")
    variables = proxy_environment(proxy, limits, folder, free_ports=False)
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


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
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    config = cast("dict[Any, Any]", yaml.safe_load(file.read_text(encoding="utf-8")))
    try:
        ServeSubmissionClient(address).deploy_applications(config)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"address: {address} wants the cluster's token; export RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH if it is not in ~/.ray/auth_token"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"address: {address} does not accept the deployment ({error}); start a cluster with "
            "`ray start --head`, or give its dashboard as address=URL"
        ) from error
    return address
