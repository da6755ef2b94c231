"""The Ray cluster that a job works on.

with connected():
    ...  # tasks, actors, trainers
"""

import contextlib
import logging
from collections.abc import Iterator

import ray


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect to the cluster that the environment names, or start one here; leave it at the end.

    In a process that is connected already, that connection is used and kept.
    """
    if ray.is_initialized():
        yield
        return
    # Workers' output is forwarded by our own channel.
    ray.init(log_to_driver=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()
