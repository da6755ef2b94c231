"""When failed workers are started again, and when the run gives up.

Ray's own counters of failures are never reset by progress, and know no cause: so it is told to
restart workers without limit, and every group of workers asks here before it starts.
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
    """The answer to a group of workers that is about to start."""

    attempt: int
    """Number of the group, from 1; the first of this driver is 1."""

    wait_seconds: float
    """How long it waits before it starts."""

    abort_reason: AbortReason | None = None
    """Why it does not start, and no other will."""


@dataclass
class FailurePolicy:
    """What has failed so far, under one driver."""

    max_failures: int
    """Failures in a row, without a new checkpoint in between, at which the run gives up."""

    num_attempts: int = 0
    """Groups of workers that have started."""

    num_in_a_row: int = 0
    """Failures since the last new checkpoint."""

    _step: int = -1
    _causes: tuple[str, ...] | None = None
    _reported_causes: list[str] = field(default_factory=list)
    _abort_reason: AbortReason | None = None

    def record(self, causes: Iterable[str]) -> None:
        """Note that the workers have failed; once an attempt, whoever finds it first."""
        if self._causes is None:
            self._causes = tuple(dict.fromkeys(causes))

    def abort(self, ending: AbortReason) -> None:
        """Let no group start any more; the first reason stands."""
        self._abort_reason = self._abort_reason or ending

    @property
    def abort_reason(self) -> AbortReason | None:
        """Why no group starts any more."""
        return self._abort_reason

    def decide(self, step: int) -> StartDecision:
        """Count the last failure, if there is any, and say whether another attempt may start.

        Args:
            step: of the newest checkpoint, 0 without one; more than ever before is progress.
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
        """Answer a group that is about to start; see `settle`."""
        self.num_attempts += 1
        return self.decide(step)

    def _reason(self) -> str:
        times = "once" if self.num_in_a_row == 1 else f"{self.num_in_a_row} times in a row"
        causes = "".join(
            f"\n  {number}. {cause}" for number, cause in enumerate(self._reported_causes, 1)
        )
        return (
            f"the workers have failed {times} without a checkpoint newer than that of step "
            f"{self._step}, which is as often as scale.max_failures allows:{causes}\n"
            "Mend the cause and run the same command again; where the machines fail more often "
            "than checkpoints are written, lower checkpoint.every_steps"
        )


def backoff_seconds(in_a_row: int) -> float:
    """Return how long workers wait that have failed so often without progress: 0, 5, 20, ... s."""
    if in_a_row <= 1:
        return 0.0
    # Powers of large numbers overflow.
    wait = INITIAL_BACKOFF_SECONDS * BACKOFF_FACTOR ** min(in_a_row - 2, 20)
    return min(wait, MAX_BACKOFF_SECONDS)


def describe_error(error: BaseException) -> str:
    """Return an error as one line: its type and what it says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
