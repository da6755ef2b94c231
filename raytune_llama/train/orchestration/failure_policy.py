"""Retry policy: when failed workers are restarted, and when the run gives up.

Ray's own failure counters are never reset by progress, and record no causes. So Ray is set to
restart workers without limit, and every group of workers requests admission here before it starts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from raytune_llama.train.result import AbortReason

INITIAL_BACKOFF_SECONDS = 5.0
BACKOFF_FACTOR = 4.0
MAX_BACKOFF_SECONDS = 300.0

_MANY_CAUSES = 5


@dataclass(frozen=True)
class StartDecision:
    """Decision on a group of workers that is about to start."""

    attempt: int
    """Number of the attempt under this driver, from 1."""

    wait_seconds: float
    """Backoff before it starts, in seconds."""

    abort_reason: AbortReason | None = None
    """Why neither this nor any later group may start; None: it may."""


@dataclass
class FailurePolicy:
    """Failures so far under one driver, and whether to retry."""

    max_failures: int
    """Failures in a row without a new checkpoint at which the run gives up."""

    num_attempts: int = 0
    """Number of groups of workers that have started."""

    num_in_a_row: int = 0
    """Number of failures since the last new checkpoint."""

    _step: int = -1
    _causes: tuple[str, ...] | None = None
    _reported_causes: list[str] = field(default_factory=list)
    _abort_reason: AbortReason | None = None

    def record(self, causes: Iterable[str]) -> None:
        """Record that the workers have failed; only the first call per attempt counts."""
        if self._causes is None:
            self._causes = tuple(dict.fromkeys(causes))

    def abort(self, reason: AbortReason) -> None:
        """Let no further group start; the first reason is kept."""
        self._abort_reason = self._abort_reason or reason

    @property
    def abort_reason(self) -> AbortReason | None:
        """Why no further group may start; None: it may."""
        return self._abort_reason

    def decide(self, step: int) -> StartDecision:
        """Count the last failure, if any, and decide whether another attempt may start.

        Args:
            step: step of the newest checkpoint, 0 without one; a new maximum is progress.
        """
        if step > self._step:
            self._step = step
            self.num_in_a_row = 0
            self._reported_causes = []
        if self._causes is not None:
            self.num_in_a_row += 1
            self._reported_causes.append("; ".join(self._causes[:_MANY_CAUSES]) or "unknown")
            self._causes = None
            if self.num_in_a_row >= self.max_failures:
                self.abort(AbortReason("gave up", self._reason()))
        return StartDecision(
            self.num_attempts, backoff_seconds(self.num_in_a_row), self._abort_reason
        )

    def admit(self, step: int) -> StartDecision:
        """Decide on a group of workers that is about to start; see `decide`."""
        self.num_attempts += 1
        return self.decide(step)

    def _reason(self) -> str:
        times = "once" if self.num_in_a_row == 1 else f"{self.num_in_a_row} times in a row"
        causes = "".join(
            f"\n  {number}. {cause}" for number, cause in enumerate(self._reported_causes, 1)
        )
        return (
            f"the workers failed {times} without a checkpoint newer than step {self._step}, which "
            f"is the limit (scale.max_failures):{causes}\n"
            "Fix the cause and run the same command again; if machines fail more often than "
            "checkpoints are written, lower checkpoint.every_steps"
        )


def backoff_seconds(in_a_row: int) -> float:
    """Return the seconds to wait after failures in a row without progress: 0, 5, 20, ..., 300."""
    if in_a_row <= 1:
        return 0.0
    # The exponent is capped, as large powers overflow.
    wait = INITIAL_BACKOFF_SECONDS * BACKOFF_FACTOR ** min(in_a_row - 2, 20)
    return min(wait, MAX_BACKOFF_SECONDS)


def describe_error(error: BaseException) -> str:
    """Return an error as one line: its type and the first line of its message.

    Ray's messages often begin with a heading (`Training failed due to controller error:`): the line
    after it says what happened.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
