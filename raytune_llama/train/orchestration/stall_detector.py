"""Finds a worker that is alive and does not get on, from what the workers tell of themselves.

All times are the watcher's own: `now` is its `time.monotonic()`, and no two clocks are compared.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from raytune_llama.train.orchestration.config import WatchConfig
from raytune_llama.train.orchestration.heartbeat import BEAT_SECONDS, Beat

SILENT_BEATS = 5
"""A worker that has left out fewer answers still."""

RECENT = 100


@dataclass(frozen=True)
class Stuck:
    """What does not get on."""

    culprits: tuple[Beat, ...]
    """The workers that the others wait for, as they were last heard of; empty: no worker can be
    named, since none has been heard of."""

    seconds: float
    """How long nothing has happened."""

    deadline: float
    """How long it may have taken."""

    def __str__(self) -> str:
        took = f"for {self.seconds:.0f} s, and may take {self.deadline:.0f} s"
        if not self.culprits:
            return f"no worker has been heard of {took}"
        return f"stuck {took}: {'; '.join(str(beat) for beat in self.culprits)}"


@dataclass
class _Heard:
    beat: Beat
    heard: float
    changed: float


class Watch:
    """Keeps what the workers tell, and judges it."""

    def __init__(self, config: WatchConfig, now: float) -> None:
        self._config = config
        self._quiet_since = now
        self._attempt = 0
        self._ended = 0
        self._workers: dict[int, _Heard] = {}
        self._recent: deque[float] = deque(maxlen=RECENT)

    def hear(self, beats: Iterable[Beat], now: float) -> None:
        """Take what workers have told since the last time."""
        for beat in beats:
            if beat.attempt < self._attempt or beat.attempt <= self._ended:
                continue  # a worker that was replaced
            if beat.attempt > self._attempt:
                self._begin(beat.attempt)
            known = self._workers.get(beat.rank)
            if known is not None and known.beat.marks > beat.marks:
                continue  # overtaken by a later one
            has_changed = known is None or known.beat.marks != beat.marks
            changed = now if known is None or has_changed else known.changed
            self._workers[beat.rank] = _Heard(beat, now, changed)
            if beat.slowest_seconds:
                self._recent.append(beat.slowest_seconds)

    def forget(self, now: float) -> None:
        """Expect nothing of this group of workers any more: it has ended, or is replaced."""
        self._quiet_since = now
        self._ended = self._attempt
        self._begin(self._attempt)

    def excuse(self, now: float) -> None:
        """Expect no workers to start from now on: the nodes that are there are too few."""
        self._quiet_since = now

    def _begin(self, attempt: int) -> None:
        self._attempt = attempt
        self._workers = {}
        self._recent.clear()

    @property
    def node_ids(self) -> set[str]:
        """The nodes that workers run on."""
        return {worker.beat.node_id for worker in self._workers.values()}

    def judge(self, now: float) -> Stuck | None:
        """Return what is stuck, if anything is."""
        running = [w for w in self._workers.values() if w.beat.phase != "over"]
        if not running:
            # Between two groups, or after the last: Ray is to do something.
            told = [worker.heard for worker in self._workers.values()]
            quiet = now - max([self._quiet_since, *told])
            deadline = self._config.slow_seconds
            return Stuck((), quiet, deadline) if quiet > deadline else None
        late = [(now - w.changed, self._deadline(w.beat)) for w in running]
        if all(seconds <= deadline for seconds, deadline in late):
            return None
        seconds, deadline = max(late, key=lambda pair: pair[0] - pair[1])
        culprits = _find_culprits(running, now)
        return Stuck(tuple(worker.beat for worker in culprits), seconds, deadline)

    def _deadline(self, beat: Beat) -> float:
        if beat.phase != "training" or not self._recent:
            return self._config.slow_seconds
        return max(self._config.min_seconds, self._config.factor * max(self._recent))


def _find_culprits(workers: list[_Heard], now: float) -> list[_Heard]:
    """Return those that the others wait for."""
    # One that runs has told its place ever since it got on last.
    silent = [w for w in workers if _is_silent(w, now)]
    if silent:
        return silent
    fewest = min(worker.beat.marks for worker in workers)
    behind = [worker for worker in workers if worker.beat.marks == fewest]
    # Of those that are equally far, who waits in a collective waits for the rest.
    return [worker for worker in behind if not worker.beat.waits] or behind


def _is_silent(worker: _Heard, now: float) -> bool:
    silence = now - worker.heard
    return silence > SILENT_BEATS * BEAT_SECONDS and silence > (now - worker.changed) / 2
