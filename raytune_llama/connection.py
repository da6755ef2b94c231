"""Connection to the Ray cluster that a job runs on.

with connect_to_ray():
    ...  # tasks, actors, trainers
"""

import contextlib
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import ray
from ray._common.utils import get_ray_address_file

from raytune_llama.logs import waiting
from raytune_llama.signals import signals_kept

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 5.0


@contextlib.contextmanager
def connect_to_ray() -> Iterator[None]:
    """Connect to the cluster set in the environment, or start a local one; disconnect at the end.

    Without RAY_ADDRESS that is the cluster which `ray start` has started on this machine, unless it
    does not answer any more. If the process is already connected, that connection is used and kept
    open.
    """
    if ray.is_initialized():
        yield
        return
    # Workers' logs reach the driver through our own channel.
    with signals_kept(), waiting(logger, "starting Ray or connecting to it", usually="5 to 20 s"):
        context = ray.init(
            # A cluster that was killed leaves its address, for which Ray would wait for minutes.
            address="local" if _find_dead_cluster() else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env=quoted_python(),
        )
    if context.dashboard_url:
        logger.info("Ray dashboard: http://%s", context.dashboard_url)
    try:
        yield
    finally:
        ray.shutdown()


def is_on_cluster() -> bool:
    """Whether `connect_to_ray` connects to a cluster that exists already."""
    if ray.is_initialized():
        return True
    if address := os.environ.get("RAY_ADDRESS"):
        return address != "local"
    started_here = _cluster_started_here()
    return started_here is not None and _refusal(started_here) is None


def _find_dead_cluster() -> bool:
    """Whether Ray would connect to a cluster that was started here and does not answer."""
    if os.environ.get("RAY_ADDRESS"):
        return False
    address = _cluster_started_here()
    error = None if address is None else _refusal(address)
    if error is None:
        return False
    logger.warning(
        "%s: the cluster at %s that was started here does not answer (%s); starting a local "
        "one. `ray stop` removes what is left of it",
        get_ray_address_file(None),
        address,
        error,
    )
    return True


def _cluster_started_here() -> str | None:
    """Return the address of the cluster that `ray start` has started on this machine, if any."""
    file = Path(get_ray_address_file(None))
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _refusal(address: str) -> OSError | None:
    """Return why a cluster can't be reached; None if it can."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS):
            return None
    except OSError as error:
        return error


def quoted_python() -> dict[str, str] | None:
    """Return a runtime environment with the quoted path of Python; None if it needs no quotes.

    Ray 2.60 starts a worker with its own environment variables, such as its Train controller, by a
    shell command that does not quote the path of Python. A path with a space, such as in a home
    folder, must therefore be passed quoted.
    """
    python = shlex.quote(sys.executable)
    return {"py_executable": python} if python != sys.executable else None
