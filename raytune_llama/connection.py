"""The Ray cluster that a job works on.

with connect_to_ray():
    ...  # tasks, actors, trainers
"""

import contextlib
import logging
import shlex
import sys
from collections.abc import Iterator

import ray

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def connect_to_ray() -> Iterator[None]:
    """Connect to the cluster that the environment names, or start one here; leave it at the end.

    In a process that is connected already, that connection is used and kept.
    """
    if ray.is_initialized():
        yield
        return
    # Workers' output is forwarded by our own channel.
    context = ray.init(
        log_to_driver=False, logging_level=logging.WARNING, runtime_env=quoted_python()
    )
    if context.dashboard_url:
        logger.info("Ray's dashboard: http://%s", context.dashboard_url)
    try:
        yield
    finally:
        ray.shutdown()


def quoted_python() -> dict[str, str] | None:
    """Return the job's runtime environment where Ray could not start workers without it.

    Ray 2.60 starts a worker that has environment variables of its own, as its Train controller
    does, by a shell command in which it does not quote the path of Python. Where that path has a
    space, such as in a home folder, it is given here, quoted.
    """
    python = shlex.quote(sys.executable)
    return {"py_executable": python} if python != sys.executable else None
