"""Finds a worker that is alive and does not get on, from what the workers tell of themselves.

All times are the watcher's own: `now` is its `time.monotonic()`, and no two clocks are compared.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from raytune_llama.train.orchestration.config import StallDetectorConfig
from raytune_llama.train.orchestration.heartbeat import HEARTBEAT_SECONDS, Heartbeat

MAX_MISSED_HEARTBEATS = 5
"""A worker that has left out fewer answers still."""

NUM_RECENT_STEPS = 100


@dataclass(frozen=True)
class Stall:
    """What does not get on."""

    culprits: tuple[Heartbeat, ...]
    """The workers that the others wait for, as they were last heard of; empty: no worker can be
    named, since none has been heard of."""

    seconds: float
    """How long nothing has happened."""

    timeout_seconds: float
    """How long it may have taken."""

    def __str__(self) -> str:
        took = f"for {self.seconds:.0f} s, and may take {self.timeout_seconds:.0f} s"
        if not self.culprits:
            return f"no worker has been heard of {took}"
        return f"stuck {took}: {'; '.join(str(beat) for beat in self.culprits)}"


@dataclass
class _WorkerStatus:
    heartbeat: Heartbeat
    heard_at: float
    progressed_at: float


class StallDetector:
    """Keeps what the workers tell, and judges it."""

    def __init__(self, config: StallDetectorConfig, now: float) -> None:
        self._config = config
        self._quiet_since = now
        self._attempt = 0
        self._ended = 0
        self._workers: dict[int, _WorkerStatus] = {}
        self._recent: deque[float] = deque(maxlen=NUM_RECENT_STEPS)

    def observe(self, beats: Iterable[Heartbeat], now: float) -> None:
        """Take what workers have told since the last time."""
        for beat in beats:
            if beat.attempt < self._attempt or beat.attempt <= self._ended:
                continue  # a worker that was replaced
            if beat.attempt > self._attempt:
                self._start_attempt(beat.attempt)
            known = self._workers.get(beat.rank)
            if known is not None and known.heartbeat.ticks > beat.ticks:
                continue  # overtaken by a later one
            has_changed = known is None or known.heartbeat.ticks != beat.ticks
            changed = now if known is None or has_changed else known.progressed_at
            self._workers[beat.rank] = _WorkerStatus(beat, now, changed)
            if beat.slowest_step_seconds:
                self._recent.append(beat.slowest_step_seconds)

    def reset(self, now: float) -> None:
        """Expect nothing of this group of workers any more: it has ended, or is replaced."""
        self._quiet_since = now
        self._ended = self._attempt
        self._start_attempt(self._attempt)

    def restart_timer(self, now: float) -> None:
        """Expect no workers to start from now on: the nodes that are there are too few."""
        self._quiet_since = now

    def _start_attempt(self, attempt: int) -> None:
        self._attempt = attempt
        self._workers = {}
        self._recent.clear()

    @property
    def node_ids(self) -> set[str]:
        """The nodes that workers run on."""
        return {worker.heartbeat.node_id for worker in self._workers.values()}

    def check(self, now: float) -> Stall | None:
        """Return what is stuck, if anything is."""
        running = [w for w in self._workers.values() if w.heartbeat.phase != "over"]
        if not running:
            # Between two groups, or after the last: Ray is to do something.
            told = [worker.heard_at for worker in self._workers.values()]
            quiet = now - max([self._quiet_since, *told])
            deadline = self._config.slow_seconds
            return Stall((), quiet, deadline) if quiet > deadline else None
        late = [(now - w.progressed_at, self._deadline(w.heartbeat)) for w in running]
        if all(seconds <= deadline for seconds, deadline in late):
            return None
        seconds, deadline = max(late, key=lambda pair: pair[0] - pair[1])
        culprits = _find_culprits(running, now)
        return Stall(tuple(worker.heartbeat for worker in culprits), seconds, deadline)

    def _deadline(self, beat: Heartbeat) -> float:
        if beat.phase != "training" or not self._recent:
            return self._config.slow_seconds
        return max(self._config.min_seconds, self._config.factor * max(self._recent))


def _find_culprits(workers: list[_WorkerStatus], now: float) -> list[_WorkerStatus]:
    """Return those that the others wait for."""
    # One that runs has told its place ever since it got on last.
    silent = [w for w in workers if _is_silent(w, now)]
    if silent:
        return silent
    fewest = min(worker.heartbeat.ticks for worker in workers)
    behind = [worker for worker in workers if worker.heartbeat.ticks == fewest]
    # Of those that are equally far, who waits in a collective waits for the rest.
    return [worker for worker in behind if not worker.heartbeat.is_in_collective] or behind


def _is_silent(worker: _WorkerStatus, now: float) -> bool:
    silence = now - worker.heard_at
    return (
        silence > MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS
        and silence > (now - worker.progressed_at) / 2
    )
