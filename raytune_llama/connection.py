"""The Ray cluster that a job works on.

with connected():
    ...  # tasks, actors, trainers
"""

import contextlib
import logging
from collections.abc import Iterator

import ray

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect to the cluster that the environment names, or start one here; leave it at the end.

    In a process that is connected already, that connection is used and kept.
    """
    if ray.is_initialized():
        yield
        return
    # Workers' output is forwarded by our own channel.
    context = ray.init(log_to_driver=False, logging_level=logging.WARNING)
    if context.dashboard_url:
        logger.info("Ray's dashboard: http://%s", context.dashboard_url)
    try:
        yield
    finally:
        ray.shutdown()
