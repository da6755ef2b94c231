"""How far a worker has come: a few numbers that its loop sets, which costs nothing."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

Phase = Literal["starting", "training", "evaluating", "saving", "finishing", "over"]
"""What a worker is doing."""


class Progress:
    """Set by the loop, read by the thread that sends it."""

    def __init__(self) -> None:
        self.ticks = 0
        self.step = 0
        self.phase: Phase = "starting"
        self._slowest = 0.0
        self._since = time.monotonic()

    def record_step(self, step: int) -> None:
        """Note that a step has ended: it is the first, or another's end is when it began."""
        now = time.monotonic()
        if self.phase == "training":
            self._slowest = max(self._slowest, now - self._since)
        self.step, self.phase, self._since = step, "training", now
        self.ticks += 1

    def enter_phase(self, phase: Phase) -> None:
        """Note that something begins that is no step."""
        self.phase = phase
        self._since = time.monotonic()
        self.ticks += 1

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Note what is done in the block."""
        before = self.phase
        self.enter_phase(phase)
        try:
            yield
        finally:
            self.enter_phase(before)

    def pop_slowest_seconds(self) -> float:
        """Return how long the slowest step took since this was asked last."""
        slowest, self._slowest = self._slowest, 0.0
        return slowest
