"""The line between the driver and its workers: log records one way, the request to stop the other.

Ray's own forwarding of worker output repeats and prefixes every line; so it is off, and the
workers hand their log records to an actor that the driver reads.
"""

import asyncio
import logging
import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class ChannelActor:
    """Holds what one side has said until the other has read it."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._stop = asyncio.Event()
        self._num_workers = 0

    async def put(self, record: dict[str, Any]) -> None:
        """Take a log record, as `logging.makeLogRecord` reads it."""
        self._records.append(record)

    async def drain(self) -> list[dict[str, Any]]:
        """Return and forget the records so far, by their time."""
        # Ray keeps no order of the calls of an actor that serves many at once.
        records, self._records = self._records, []
        return sorted(records, key=lambda record: record["created"])

    async def workers_started(self, num_workers: int) -> None:
        """Take the number of workers that train from now on."""
        self._num_workers = num_workers

    async def num_workers(self) -> int:
        """Return how many workers were started last; 0 before the first."""
        return self._num_workers

    async def request_stop(self) -> None:
        """Ask all workers to save and stop."""
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Return once a stop was requested."""
        await self._stop.wait()


class Channel:
    """The driver's end: shows the workers' records while training runs, and can request a stop."""

    def __init__(self) -> None:
        # Beside the driver, so that no other node's end is the channel's.
        node_id = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        actor: Any = ray.remote(ChannelActor)
        # Every worker waits in the actor for the request to stop, so it serves many calls at once.
        options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
        self.actor: Any = actor.options(**options).remote()
        self._closed = threading.Event()
        self._stop_requested = threading.Event()
        self._thread = threading.Thread(target=self._forward, name="channel", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the workers to save and stop; safe in a signal handler, which must not call Ray."""
        self._stop_requested.set()

    def request_restart(self) -> None:
        """Ask the workers to save and stop, to be started again; not in a signal handler."""
        ray.get(self.actor.request_stop.remote())

    @property
    def was_stopped(self) -> bool:
        """Whether a stop was requested that is to end the run."""
        return self._stop_requested.is_set()

    def num_workers(self) -> int:
        """Return how many workers were started last; 0 before the first."""
        return ray.get(self.actor.num_workers.remote())

    def close(self) -> None:
        """Show what is left, and end."""
        self._closed.set()
        self._thread.join()
        ray.kill(self.actor)

    def _forward(self) -> None:
        is_last = told = False
        while not is_last:
            is_last = self._closed.wait(POLL_SECONDS)
            if self._stop_requested.is_set() and not told:
                ray.get(self.actor.request_stop.remote())
                told = True
            for record in ray.get(self.actor.drain.remote()):
                entry = logging.makeLogRecord(record)
                logging.getLogger(entry.name).handle(entry)


class WorkerHandler(logging.Handler):
    """Sends a worker's log records to the driver."""

    def __init__(self, actor: Any, rank: int) -> None:  # noqa: ANN401  # an actor handle has no type
        # What all workers do alike is said once; what goes wrong, by each.
        super().__init__(logging.INFO if rank == 0 else logging.WARNING)
        self._actor = actor
        self._rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record, its message already formatted."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        if self._rank > 0:
            message = f"worker {self._rank}: {message}"
        fields = {"name": record.name, "levelno": record.levelno, "levelname": record.levelname}
        self._actor.put.remote({**fields, "msg": message, "created": record.created})


class StopRequest:
    """A worker's view of the request to stop; asking costs no message."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401  # an actor handle has no type
        self._answer = actor.wait_for_stop.remote()

    def __call__(self) -> bool:
        """Whether a stop was requested.

        Raises:
            RayActorError: the channel is gone, which is no request.
        """
        ready, _ = ray.wait([self._answer], timeout=0)
        if ready:
            ray.get(ready)
        return bool(ready)
