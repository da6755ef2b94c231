"""Progress of a worker: a few counters that its loop sets, at no measurable cost."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Literal

Phase = Literal["starting", "training", "evaluating", "saving", "finishing", "over"]
"""Phase that a worker is in."""

STEP = "step"
"""Key of the number of optimizer steps in what `Progress.pop_values` returns."""

_MAX_VALUES = 1000
"""Records that are kept for the next heartbeat; of more, the newest."""


class Progress:
    """Step, phase and tick counter; set by the loop, read by the heartbeat thread."""

    def __init__(self) -> None:
        self.ticks = 0
        self.step = 0
        self.phase: Phase = "starting"
        self.thread_id: int | None = None
        """Thread of the run of a pack whose turn it is; None: the thread that sends heartbeats."""
        self._slowest = 0.0
        self._since = time.monotonic()
        # Appending and popping are atomic, so that the loop needs no lock.
        self._values: deque[tuple[str, int, Mapping[str, float]]] = deque(maxlen=_MAX_VALUES)

    def record_values(self, run: str, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a run; the runs of a pack share this object.

        Args:
            run: label of the run.
            step: optimizer steps done.
            values: metrics by name.
        """
        self._values.append((run, step, values))

    def pop_values(self) -> dict[str, dict[str, float]]:
        """Return the newest metrics by run since the last call, each with its `STEP`."""
        newest: dict[str, dict[str, float]] = {}
        with contextlib.suppress(IndexError):
            while True:
                run, step, values = self._values.popleft()
                known = newest.setdefault(run, {STEP: step})
                known.update(values)
                # A checkpoint's record comes some steps later.
                known[STEP] = max(known[STEP], step)
        return newest

    def record_step(self, step: int) -> None:
        """Record the end of a step; its time counts only if it directly followed another step."""
        now = time.monotonic()
        if self.phase == "training":
            self._slowest = max(self._slowest, now - self._since)
        self.step, self.phase, self._since = step, "training", now
        self.ticks += 1

    def record_round(self) -> None:
        """Record that a pack has computed a micro-batch of each run: a part of a step."""
        self.ticks += 1

    def enter_phase(self, phase: Phase) -> None:
        """Record the start of a phase other than a training step."""
        self.phase = phase
        self._since = time.monotonic()
        self.ticks += 1

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Enter a phase for the duration of the block, then return to the previous one."""
        before = self.phase
        self.enter_phase(phase)
        try:
            yield
        finally:
            self.enter_phase(before)

    def pop_slowest_seconds(self) -> float:
        """Return the seconds of the slowest step since the last call; 0 without one."""
        slowest, self._slowest = self._slowest, 0.0
        return slowest
