"""The message channel between the driver and its workers: an actor that both sides call.

Workers send log records, heartbeats and failures; the driver sends admissions and stop requests.
Ray's own forwarding of worker output repeats and prefixes every line, so it is off, and the driver
polls the actor for the workers' log records.
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
"""Timeout for the start of the actor's process, which is slow on a busy machine."""

CHANNEL_TIMEOUT_SECONDS = 120.0
"""Timeout of a call to the actor, which answers at once: after it, the actor counts as lost."""


@dataclass(frozen=True)
class ChannelUpdate:
    """Messages of the workers since the driver last polled, and the state of the channel."""

    records: list[dict[str, Any]]
    """Log records, in order of time."""

    heartbeats: list[Heartbeat]
    """Heartbeats of the workers."""

    has_failed: bool
    """Whether the workers have failed since the last poll."""

    failure_policy: FailurePolicy
    """Failures so far."""

    controller: ProcessIdentity | None
    """Ray Train's controller process, which (re)starts the workers; None until it is known."""


class ChannelActor:
    """Buffers messages in both directions, and holds the failure policy."""

    def __init__(self, failures: FailurePolicy) -> None:
        self._failures = failures
        self._records: list[dict[str, Any]] = []
        self._heartbeats: list[Heartbeat] = []
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

    async def put_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Take a heartbeat of a worker."""
        self._heartbeats.append(heartbeat)

    async def set_controller(self, process: ProcessIdentity) -> None:
        """Record the process of Ray Train's controller; the first call wins."""
        # Workers unpickle the same callback, but later than the controller.
        self._controller = self._controller or process

    async def admit(self, step: int) -> StartDecision:
        """Decide whether a group of workers may start at a step, and when."""
        return self._failures.admit(step)

    async def record_failure(self, causes: list[str]) -> None:
        """Record that the workers have failed."""
        self._has_failed = True
        self._failures.record(causes)

    async def abort(self, reason: AbortReason) -> None:
        """Abort the run; the first reason is kept."""
        self._failures.abort(reason)

    async def abort_reason(self) -> AbortReason | None:
        """Return why the run is aborted; None if it is not."""
        return self._failures.abort_reason

    async def drain(self) -> ChannelUpdate:
        """Return the messages since the last call, and clear them."""
        # Ray does not keep the order of calls to an actor that serves many at once.
        records = sorted(self._records, key=lambda record: record["created"])
        update = ChannelUpdate(
            records, self._heartbeats, self._has_failed, self._failures, self._controller
        )
        self._records, self._heartbeats, self._has_failed = [], [], False
        return update

    async def workers_started(self, num_workers: int) -> ProcessIdentity | None:
        """Record the number of workers that now train; return Ray Train's controller process."""
        self._num_workers = num_workers
        return self._controller

    async def num_workers(self) -> int:
        """Return the size of the newest group of workers; 0 before the first."""
        return self._num_workers

    async def request_stop(self) -> None:
        """Ask all workers to save and stop."""
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Return once a stop was requested."""
        await self._stop.wait()


class Channel:
    """The driver's end: logs the workers' records while training runs, and can request a stop."""

    def __init__(
        self,
        failures: FailurePolicy | None = None,
        listen: Callable[[ChannelUpdate], None] | None = None,
    ) -> None:
        """Start the actor, and a thread that polls it.

        Args:
            failures: failures so far; None: none.
            listen: callback for each update, called about once per second in the channel's thread.
        """
        # On the driver's node, so that the loss of another node does not end the channel.
        node_id = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        actor: Any = ray.remote(ChannelActor)
        # Every worker waits in the actor for the stop request, so it serves many calls at once.
        options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here}
        self.actor: Any = actor.options(**options).remote(failures or FailurePolicy(max_failures=1))
        self._listen = listen
        self._process: ProcessIdentity = ray.get(
            self.actor.process_id.remote(), timeout=CHANNEL_START_SECONDS
        )
        self._controller: ProcessIdentity | None = None
        self._is_closing = self._is_stopping = False
        # SimpleQueue.put is reentrant: a signal handler may call it.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._forward, name="channel", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the workers to save and stop; safe in a signal handler, which must not call Ray."""
        self._is_stopping = True
        self._wake.put(None)

    def num_workers(self) -> int:
        """Return the size of the newest group of workers; 0 before the first."""
        return ray.get(self.actor.num_workers.remote())

    def close(self) -> None:
        """Log the remaining records, and stop the thread and the actor."""
        self._is_closing = True
        self._wake.put(None)
        self._thread.join()
        ray.kill(self.actor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _forward(self) -> None:
        is_last = has_sent_stop = False
        while not is_last:
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=CHANNEL_POLL_SECONDS)
            is_last = self._is_closing
            try:
                if self._is_stopping and not has_sent_stop:
                    ray.get(self.actor.request_stop.remote(), timeout=CHANNEL_TIMEOUT_SECONDS)
                    has_sent_stop = True
                update: ChannelUpdate = ray.get(
                    self.actor.drain.remote(), timeout=CHANNEL_TIMEOUT_SECONDS
                )
            except RayError as error:
                self._kill_run(error)
                return
            self._controller = update.controller
            for record in update.records:
                entry = logging.makeLogRecord(record)
                logging.getLogger(entry.name).handle(entry)
            if self._listen is not None:
                self._listen(update)

    def _kill_run(self, error: RayError) -> None:
        """Kill the run's processes: without the actor, nothing supervises or stops them."""
        logger.warning(
            "lost the channel to the workers; killing the run's processes: %s",
            describe_error(error),
        )
        self._process.kill()
        if self._controller is not None:
            # The workers die with it, and the driver's `fit` raises.
            self._controller.kill()


class FailureCallback(ray.train.UserCallback):
    """Ray Train callback in the controller that reports worker failures to the channel.

    A worker whose process was killed cannot report its own failure.
    """

    def __init__(self, actor: Any) -> None:  # noqa: ANN401  # an actor handle has no type
        self._actor = actor
        self._driver = ProcessIdentity.current()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Ray Train's controller is the first to unpickle this; nothing else reports its process.
        self.__dict__ |= state
        if ProcessIdentity.current() != self._driver:
            self._actor.set_controller.remote(ProcessIdentity.current())

    def after_exception(
        self,
        run_context: Any,  # noqa: ANN401, ARG002  # Ray's own
        worker_exceptions: dict[int, Exception],
    ) -> None:
        """Report the errors of failed workers to the channel."""
        causes = [
            f"worker {rank}: {describe_error(error)}" for rank, error in worker_exceptions.items()
        ]
        # Waits: the workers that Ray starts next ask the failure policy for admission.
        ray.get(self._actor.record_failure.remote(causes), timeout=CHANNEL_TIMEOUT_SECONDS)


class WorkerLogHandler(logging.Handler):
    """Sends a worker's log records to the driver."""

    def __init__(self, actor: Any, rank: int) -> None:  # noqa: ANN401  # an actor handle has no type
        # Rank 0 alone logs what all workers do; every rank logs its warnings.
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
    """A worker's view of the stop request; polling it sends no message."""

    def __init__(self, actor: Any) -> None:  # noqa: ANN401  # an actor handle has no type
        self._answer = actor.wait_for_stop.remote()

    def __call__(self) -> bool:
        """Whether a stop was requested.

        Raises:
            RayActorError: the channel is lost, which is not a stop request.
        """
        return self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for a stop request; return whether there was one."""
        ready, _ = ray.wait([self._answer], timeout=seconds)
        if ready:
            ray.get(ready)
        return bool(ready)
