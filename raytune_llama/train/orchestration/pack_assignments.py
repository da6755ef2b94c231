"""The assignments of a pack: an actor that says which runs the pack's workers are to train.

Ray Train calls its workers once, with arguments that never change, so the workers ask: the actor
holds the runs that are wanted now, and the workers compare them with those that they train. A group
of workers that is restarted therefore begins with every run that has not ended, each from its
newest checkpoint.
"""

import asyncio
import logging
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from raytune_llama.logs import waiting
from raytune_llama.train.orchestration.channel import CHANNEL_TIMEOUT_SECONDS, StopRequest
from raytune_llama.train.result import USER_ERRORS, AbortReason, RunResult

if TYPE_CHECKING:
    from raytune_llama.storage.place import Place
    from raytune_llama.train.config import AnyTrainConfig
    from raytune_llama.train.pack.pack import Changes
    from raytune_llama.train.process_group import ProcessGroup

logger = logging.getLogger(__name__)

IDLE_POLL_SECONDS = 1.0

_RUN_THREAD = re.compile(r"run \d+")
"""What the names of a run's threads in a pack begin with; see `train.pack.slot`."""


@dataclass(frozen=True)
class WantedRuns:
    """Runs that a pack is to train now."""

    version: int
    """Number of changes before this state."""

    runs: Mapping[int, bytes]
    """Pickled configs by the number of the run."""

    is_last: bool
    """Whether no run will be added any more."""


class PackAssignments:
    """The actor; its driver adds and removes runs, the workers' rank 0 reports their ends."""

    def __init__(self) -> None:
        self._wanted = WantedRuns(0, {}, is_last=False)
        self._changed = asyncio.Condition()
        self._results: asyncio.Queue[tuple[int, RunResult]] = asyncio.Queue()
        self._run_dirs: dict[int, Place] = {}
        self._failures: dict[int, tuple[int, int]] = {}

    async def add(self, number: int, config: bytes, run_dir: "Place") -> None:
        """Add a run to train, with its directory."""
        self._run_dirs[number] = run_dir
        await self._change(lambda now: replace(now, runs={**now.runs, number: config}))

    async def remove(self, number: int) -> None:
        """Remove a run, which is to end where it is."""

        def without(now: WantedRuns) -> WantedRuns:
            return replace(now, runs={n: each for n, each in now.runs.items() if n != number})

        await self._change(without)

    async def run_dirs(self) -> "list[Place]":
        """Return the directories of all runs so far, also of those that have ended."""
        return list(self._run_dirs.values())

    async def count_failure(self, number: int, step: int) -> int:
        """Count a failure of a run by itself.

        Args:
            number: number of the run.
            step: step of its newest checkpoint.

        Returns:
            How often it has failed in a row without a newer checkpoint.
        """
        last, count = self._failures.get(number, (-1, 0))
        self._failures[number] = (step, count + 1 if step <= last else 1)
        return self._failures[number][1]

    async def close(self) -> None:
        """Add no more runs: the workers end after the last one."""
        await self._change(lambda now: replace(now, is_last=True))

    async def _change(self, changed: Callable[[WantedRuns], WantedRuns]) -> None:
        async with self._changed:
            # Not before: another call may change them while this one waits.
            self._wanted = replace(changed(self._wanted), version=self._wanted.version + 1)
            self._changed.notify_all()

    async def wait_for_change(self, version: int) -> WantedRuns:
        """Return the wanted runs once they differ from those of a version."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._wanted.version > version)
            return self._wanted

    async def put_result(self, number: int, result: RunResult) -> None:
        """Take the result of a run that has ended, and no longer want it."""
        await self.remove(number)
        await self._results.put((number, result))

    async def next_result(self) -> tuple[int, RunResult]:
        """Wait for the next run that ends; return its number and result."""
        return await self._results.get()


class AssignedRuns:
    """A worker's source of runs: what rank 0 reads of the assignments, sent to all workers."""

    def __init__(self, assignments: Any, workers: "ProcessGroup", stop: StopRequest) -> None:  # noqa: ANN401
        """Start to wait for changes of the assignments.

        Args:
            assignments: a `PackAssignments`.
            workers: all workers of the pack.
            stop: what asks all runs to save and stop.
        """
        self._assignments, self._workers, self._stop = assignments, workers, stop
        self._known: set[int] = set()
        self._ended: set[int] = set()
        self._wanted = WantedRuns(-1, {}, is_last=False)
        self._answer = assignments.wait_for_change.remote(-1) if workers.is_rank_zero else None

    def changes(self, *, is_idle: bool) -> "Changes":
        """Return the changes since the last call; see `RunSource`."""
        from raytune_llama.train.pack.pack import Changes, SlotRun

        # What rank 0 has read, or None if nothing has changed.
        read = self._read(IDLE_POLL_SECONDS if is_idle else 0.0) if self._answer else None
        is_asked = self._workers.is_rank_zero and self._stop()
        wanted, is_stopping = self._workers.broadcast((read, is_asked))
        if is_idle:
            self._workers.progress.enter_phase("starting")
        if is_stopping:
            return Changes(is_last=True)
        self._wanted = wanted or self._wanted
        due = self._wanted.runs.keys() - self._ended
        joining, leaving = sorted(due - self._known), sorted(self._known - due)
        self._known = set(due)
        runs = [
            SlotRun(number, pickle.loads(self._wanted.runs[number]), self._stop)  # noqa: S301  # our driver's
            for number in joining
        ]
        return Changes(runs, leaving, is_last=self._wanted.is_last)

    def _read(self, seconds: float) -> WantedRuns | None:
        """Return the wanted runs if they have changed; on rank 0."""
        ready, _ = ray.wait([self._answer], timeout=seconds)
        if not ready:
            return None
        wanted: WantedRuns = ray.get(ready[0])
        self._answer = self._assignments.wait_for_change.remote(wanted.version)
        return wanted

    def gives_up(self, number: int, error: Exception) -> bool:
        """Count a failure of a run, on its only worker; see `RunSource`."""
        from raytune_llama.train.orchestration.worker import newest_step

        config: AnyTrainConfig = pickle.loads(self._wanted.runs[number])  # noqa: S301  # our driver's
        step = newest_step(config.run_place)
        count: int = ray.get(
            self._assignments.count_failure.remote(number, step), timeout=CHANNEL_TIMEOUT_SECONDS
        )
        logger.warning(
            "run %d has failed, %d of at most %d times in a row without a checkpoint newer than "
            "step %d",
            *(number, count, config.scale.max_failures, step),
            exc_info=error,
        )
        return count >= config.scale.max_failures

    def ended(self, number: int, outcome: RunResult | BaseException) -> None:
        """Report the end of a run; see `RunSource`. A stopped one continues in the next group."""
        self._known.discard(number)
        self._ended.add(number)
        if isinstance(outcome, RunResult) and outcome.status == "stopped":
            return
        if self._workers.is_rank_zero:
            result = outcome if isinstance(outcome, RunResult) else _describe(outcome)
            put = self._assignments.put_result.remote(number, result)
            ray.get(put, timeout=CHANNEL_TIMEOUT_SECONDS)


def _describe(error: BaseException) -> RunResult:
    """Return the result of a run that has failed."""
    from raytune_llama.train.orchestration.worker import describe_user_error

    if isinstance(error, FloatingPointError):
        return RunResult("aborted", 0, AbortReason("diverged", str(error)))
    if isinstance(error, USER_ERRORS):
        return RunResult("aborted", 0, AbortReason("refused", describe_user_error(error)))
    cause = (
        f"{describe_user_error(error)}; the run has failed this way as often as "
        "scale.max_failures allows"
    )
    return RunResult("aborted", 0, AbortReason("gave up", cause))


class SlotLogFilter(logging.Filter):
    """Names the run in the records of a slot's thread, and drops those below warnings.

    A run's metrics are in its own directory; the progress of all runs would hide the sweep's.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to send the record to the driver."""
        found = _RUN_THREAD.match(record.threadName or "")
        if found is None:
            return True
        record.msg, record.args = f"{found[0]}: {record.getMessage()}", ()
        return record.levelno >= logging.WARNING


def train_pack(
    config: "AnyTrainConfig",
    workers: "ProcessGroup",
    stop: StopRequest,
    assignments: Any,  # noqa: ANN401  # an actor
) -> RunResult:
    """Load the base, and train the assigned runs until there are no more; collective.

    Args:
        config: config of any of the runs: they share model, precision and workers.
        workers: all workers of the pack.
        stop: what asks all runs to save and stop.
        assignments: a `PackAssignments`.
    """
    from raytune_llama.model.llama import load_model
    from raytune_llama.train.pack.pack import run_pack
    from raytune_llama.train.pack.shared_model import SharedModel

    with waiting(logger, f"loading the model {config.model.path}", usually="2 to 10 s per GB"):
        # The slots' masks are those of SDPA.
        attention = replace(config.model, attention="sdpa")
        model = load_model(attention, config.engine.precision, workers.device)
        shared = SharedModel(
            model,
            config.engine.precision,
            workers.device,
            gradient_checkpointing=config.engine.gradient_checkpointing,
        )
    run_pack(shared, AssignedRuns(assignments, workers, stop), workers)
    return RunResult("stopped" if stop() else "finished", 0)
