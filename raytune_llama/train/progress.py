"""Progress of a worker: a few counters that its loop sets, at no measurable cost."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

Phase = Literal["starting", "training", "evaluating", "saving", "finishing", "over"]
"""Phase that a worker is in."""


class Progress:
    """Step, phase and tick counter; set by the loop, read by the heartbeat thread."""

    def __init__(self) -> None:
        self.ticks = 0
        self.step = 0
        self.phase: Phase = "starting"
        self._slowest = 0.0
        self._since = time.monotonic()

    def record_step(self, step: int) -> None:
        """Record the end of a step; its time counts only if it directly followed another step."""
        now = time.monotonic()
        if self.phase == "training":
            self._slowest = max(self._slowest, now - self._since)
        self.step, self.phase, self._since = step, "training", now
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
