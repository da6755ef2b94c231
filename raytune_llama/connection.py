"""Connection to the Ray cluster that a job runs on.

with connect_to_ray():
    ...  # tasks, actors, trainers
"""

import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator

import ray

from raytune_llama.logs import waiting
from raytune_llama.signals import signals_kept

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def connect_to_ray() -> Iterator[None]:
    """Connect to the cluster set in the environment, or start a local one; disconnect at the end.

    If the process is already connected, that connection is used and kept open.
    """
    if ray.is_initialized():
        yield
        return
    # Workers' logs reach the driver through our own channel.
    with signals_kept(), waiting(logger, "starting Ray or connecting to it", usually="5 to 20 s"):
        context = ray.init(
            log_to_driver=False, logging_level=logging.WARNING, runtime_env=quoted_python()
        )
    if context.dashboard_url:
        logger.info("Ray dashboard: http://%s", context.dashboard_url)
    try:
        yield
    finally:
        ray.shutdown()


def quoted_python() -> dict[str, str] | None:
    """Return a runtime environment with the quoted path of Python; None if it needs no quotes.

    Ray 2.60 starts a worker with its own environment variables, such as its Train controller, by a
    shell command that does not quote the path of Python. A path with a space, such as in a home
    folder, must therefore be passed quoted.
    """
    python = shlex.quote(sys.executable)
    return {"py_executable": python} if python != sys.executable else None
