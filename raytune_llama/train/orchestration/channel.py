"""The line between the driver and its workers.

Log records, signs of life and failures go to the driver; leave to start, and the request to stop,
come from it. Ray's own forwarding of worker output repeats and prefixes every line; so it is off,
and the workers hand their log records to an actor that the driver reads.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import ray
import ray.train
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_llama.storage.process import ProcessIdentity
from raytune_llama.train.orchestration.failure_policy import (
    FailurePolicy,
    StartDecision,
    describe_error,
)
from raytune_llama.train.orchestration.heartbeat import Heartbeat
from raytune_llama.train.result import AbortReason

logger = logging.getLogger(__name__)

CHANNEL_POLL_SECONDS = 1.0

CHANNEL_START_SECONDS = 600.0
"""A busy machine may take so long to start the actor's process."""

CHANNEL_TIMEOUT_SECONDS = 120.0
"""The actor answers at once: one that takes longer is lost."""


@dataclass(frozen=True)
class ChannelUpdate:
    """What the workers have said since the driver heard them last."""

    records: list[dict[str, Any]]
    """Log records, by their time."""

    heartbeats: list[Heartbeat]
    """Signs of life."""

    has_failed: bool
    """Whether the workers have."""

    failure_policy: FailurePolicy
    """All so far."""

    controller: ProcessIdentity | None
    """Ray's process that starts and restarts the workers, once it is known."""


class ChannelActor:
    """Holds what one side has said until the other has read it."""

    def __init__(self, failures: FailurePolicy) -> None:
        self._failures = failures
        self._records: list[dict[str, Any]] = []
        self._beats: list[Heartbeat] = []
        self._has_failed = False
        self._controller: ProcessIdentity | None = None
        self._stop = asyncio.Event()
        self._num_workers = 0

    async def process_id(self) -> ProcessIdentity:
        """Return the actor's process."""
        return ProcessIdentity.current()

    async def put_log_record(self, record: dict[str, Any]) -> None:
        """Take a log record, as `logging.makeLogRecord` reads it."""
        self._records.append(record)

    async def put_heartbeat(self, beat: Heartbeat) -> None:
        """Take a sign of life."""
        self._beats.append(beat)

    async def set_controller(self, process: ProcessIdentity) -> None:
        """Learn which process Ray's controller of the workers is."""
        # What it has, workers get too, later.
        self._controller = self._controller or process

    async def admit(self, step: int) -> StartDecision:
        """Answer a group of workers that starts at a step."""
        return self._failures.admit(step)

    async def record_failure(self, causes: list[str]) -> None:
        """Learn that the workers have failed."""
        self._has_failed = True
        self._failures.record(causes)

    async def abort(self, ending: AbortReason) -> None:
        """Let the run end; the first reason stands."""
        self._failures.abort(ending)

    async def abort_reason(self) -> AbortReason | None:
        """Return why the run is to end, if it is."""
        return self._failures.abort_reason

    async def drain(self) -> ChannelUpdate:
        """Return what was said so far, and forget what is said once."""
        # Ray keeps no order of the calls of an actor that serves many at once.
        records = sorted(self._records, key=lambda record: record["created"])
        heard = ChannelUpdate(
            records, self._beats, self._has_failed, self._failures, self._controller
        )
        self._records, self._beats, self._has_failed = [], [], False
        return heard

    async def workers_started(self, num_workers: int) -> ProcessIdentity | None:
        """Take the number of workers that train from now on; return Ray's controller of them."""
        self._num_workers = num_workers
        return self._controller

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

    def __init__(
        self,
        failures: FailurePolicy | None = None,
        listen: Callable[[ChannelUpdate], None] | None = None,
    ) -> None:
        """Open the line.

        Args:
            failures: what has failed before.
            listen: told what was heard, about once a second, in a thread of the channel's.
        """
        # Beside the driver, so that no other node's end is the channel's.
        node_id = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        actor: Any = ray.remote(ChannelActor)
        # Every worker waits in the actor for the request to stop, so it serves many calls at once.
        options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
        self.actor: Any = actor.options(**options).remote(failures or FailurePolicy(max_failures=1))
        self._listen = listen
        self._process: ProcessIdentity = ray.get(
            self.actor.process_id.remote(), timeout=CHANNEL_START_SECONDS
        )
        self._controller: ProcessIdentity | None = None
        self._is_closing = self._is_stopping = False
        # A queue that a signal handler may put into.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._forward, name="channel", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the workers to save and stop; safe in a signal handler, which must not call Ray."""
        self._is_stopping = True
        self._wake.put(None)

    def num_workers(self) -> int:
        """Return how many workers were started last; 0 before the first."""
        return ray.get(self.actor.num_workers.remote())

    def close(self) -> None:
        """Show what is left, and end."""
        self._is_closing = True
        self._wake.put(None)
        self._thread.join()
        ray.kill(self.actor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _forward(self) -> None:
        is_last = has_told = False
        while not is_last:
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=CHANNEL_POLL_SECONDS)
            is_last = self._is_closing
            try:
                if self._is_stopping and not has_told:
                    ray.get(self.actor.request_stop.remote(), timeout=CHANNEL_TIMEOUT_SECONDS)
                    has_told = True
                heard: ChannelUpdate = ray.get(
                    self.actor.drain.remote(), timeout=CHANNEL_TIMEOUT_SECONDS
                )
            except RayError as error:
                self._give_up(error)
                return
            self._controller = heard.controller
            for record in heard.records:
                entry = logging.makeLogRecord(record)
                logging.getLogger(entry.name).handle(entry)
            if self._listen is not None:
                self._listen(heard)

    def _give_up(self, error: RayError) -> None:
        """End the run's processes: without the actor nobody watches them or tells them to stop."""
        logger.warning("the channel to the workers is lost: %s", describe_error(error))
        self._process.kill()
        if self._controller is not None:
            # The workers go with it; whoever waits for it gets an error.
            self._controller.kill()


class FailureCallback(ray.train.UserCallback):
    """Tells the channel, from Ray's controller, what has become of the workers.

    A worker whose process was killed can tell nothing itself.
    """

    def __init__(self, actor: Any) -> None:  # noqa: ANN401  # an actor handle has no type
        self._actor = actor
        self._driver = ProcessIdentity.current()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Unpickled first where Ray's controller is, whose process nothing else tells.
        self.__dict__ |= state
        if ProcessIdentity.current() != self._driver:
            self._actor.set_controller.remote(ProcessIdentity.current())

    def after_exception(
        self,
        run_context: Any,  # noqa: ANN401, ARG002  # Ray's own
        worker_exceptions: dict[int, Exception],
    ) -> None:
        """Pass on what the workers died of."""
        causes = [
            f"worker {rank}: {describe_error(error)}" for rank, error in worker_exceptions.items()
        ]
        # Before Ray starts others, which ask how often this has happened.
        ray.get(self._actor.record_failure.remote(causes), timeout=CHANNEL_TIMEOUT_SECONDS)


class WorkerLogHandler(logging.Handler):
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
        self._actor.put_log_record.remote({**fields, "msg": message, "created": record.created})


class StopRequest:
    """A worker's view of the request to stop; asking costs no message."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401  # an actor handle has no type
        self._answer = actor.wait_for_stop.remote()

    def __call__(self) -> bool:
        """Whether a stop was requested.

        Raises:
            RayActorError: the channel is gone, which is no request.
        """
        return self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Wait until a stop is requested, or so many seconds; return whether it was."""
        ready, _ = ray.wait([self._answer], timeout=seconds)
        if ready:
            ray.get(ready)
        return bool(ready)
