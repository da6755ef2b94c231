"""Detects hung workers, alive but without progress, from their heartbeats.

All times are on the driver's clock: `now` is its `time.monotonic()`; no two clocks are compared.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from raytune_llama.train.orchestration.config import StallDetectorConfig
from raytune_llama.train.orchestration.heartbeat import HEARTBEAT_SECONDS, Heartbeat

MAX_MISSED_HEARTBEATS = 5
"""Heartbeats that a responsive worker may miss in a row."""

NUM_RECENT_STEPS = 100


@dataclass(frozen=True)
class Stall:
    """A stall: the workers at fault, and how long nothing has progressed."""

    culprits: tuple[Heartbeat, ...]
    """Last heartbeats of the workers that the others wait for; empty: no worker is running."""

    seconds: float
    """Seconds without progress."""

    timeout_seconds: float
    """Seconds without progress that were allowed."""

    def __str__(self) -> str:
        duration = f"for {self.seconds:.0f} s (timeout {self.timeout_seconds:.0f} s)"
        if not self.culprits:
            return f"no heartbeat from any worker {duration}"
        return f"no progress {duration}, hung: {'; '.join(str(beat) for beat in self.culprits)}"


@dataclass
class _WorkerStatus:
    heartbeat: Heartbeat
    heard_at: float
    progressed_at: float


class StallDetector:
    """Tracks the workers' heartbeats, and detects workers without progress."""

    def __init__(self, config: StallDetectorConfig, now: float) -> None:
        self._config = config
        self._quiet_since = now
        self._attempt = 0
        self._ended = 0
        self._workers: dict[int, _WorkerStatus] = {}
        self._recent: deque[float] = deque(maxlen=NUM_RECENT_STEPS)

    def observe(self, heartbeats: Iterable[Heartbeat], now: float) -> None:
        """Record the heartbeats received since the last call."""
        for beat in heartbeats:
            if beat.attempt < self._attempt or beat.attempt <= self._ended:
                continue  # from a replaced worker
            if beat.attempt > self._attempt:
                self._start_attempt(beat.attempt)
            known = self._workers.get(beat.rank)
            if known is not None and known.heartbeat.ticks > beat.ticks:
                continue  # older than one already received
            has_progressed = known is None or known.heartbeat.ticks != beat.ticks
            progressed_at = now if known is None or has_progressed else known.progressed_at
            self._workers[beat.rank] = _WorkerStatus(beat, now, progressed_at)
            if beat.slowest_step_seconds:
                self._recent.append(beat.slowest_step_seconds)

    def reset(self, now: float) -> None:
        """Ignore this group of workers from now on: it has ended or is being replaced."""
        self._quiet_since = now
        self._ended = self._attempt
        self._start_attempt(self._attempt)

    def restart_timer(self, now: float) -> None:
        """Restart the start-up timeout: too few nodes are available to start workers."""
        self._quiet_since = now

    def _start_attempt(self, attempt: int) -> None:
        self._attempt = attempt
        self._workers = {}
        self._recent.clear()

    @property
    def node_ids(self) -> set[str]:
        """Ray ids of the nodes that workers run on."""
        return {worker.heartbeat.node_id for worker in self._workers.values()}

    def check(self, now: float) -> Stall | None:
        """Return the current stall; None if there is none."""
        running = [w for w in self._workers.values() if w.heartbeat.phase != "over"]
        if not running:
            # Between two groups, or after the last: Ray must start workers or end the run.
            heard = [worker.heard_at for worker in self._workers.values()]
            quiet = now - max([self._quiet_since, *heard])
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
    """Return the workers that the others wait for."""
    # A running worker keeps sending heartbeats, also without progress.
    silent = [w for w in workers if _is_silent(w, now)]
    if silent:
        return silent
    fewest = min(worker.heartbeat.ticks for worker in workers)
    slowest = [worker for worker in workers if worker.heartbeat.ticks == fewest]
    # Among equally slow workers, those in a collective wait for the others.
    return [worker for worker in slowest if not worker.heartbeat.is_in_collective] or slowest


def _is_silent(worker: _WorkerStatus, now: float) -> bool:
    silence = now - worker.heard_at
    return (
        silence > MAX_MISSED_HEARTBEATS * HEARTBEAT_SECONDS
        and silence > (now - worker.progressed_at) / 2
    )
