"""When failed workers are started again, and when the run gives up.

Ray's own counters of failures are never reset by progress, and know no cause: so it is told to
restart workers without limit, and every group of workers asks here before it starts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from raytune_llama.train.result import Ending

FIRST_WAIT_SECONDS = 5.0
WAIT_FACTOR = 4.0
LONGEST_WAIT_SECONDS = 300.0

_MANY_CAUSES = 5


@dataclass(frozen=True)
class Admission:
    """The answer to a group of workers that is about to start."""

    attempt: int
    """Number of the group, from 1; the first of this driver is 1."""

    wait_seconds: float
    """How long it waits before it starts."""

    ending: Ending | None = None
    """Why it does not start, and no other will."""


@dataclass
class Failures:
    """What has failed so far, under one driver."""

    tolerated: int
    """Failures in a row, without a new checkpoint in between, at which the run gives up."""

    attempts: int = 0
    """Groups of workers that have started."""

    in_a_row: int = 0
    """Failures since the last new checkpoint."""

    _step: int = -1
    _causes: tuple[str, ...] | None = None
    _told: list[str] = field(default_factory=list)
    _ending: Ending | None = None

    def fail(self, causes: Iterable[str]) -> None:
        """Note that the workers have failed; once an attempt, whoever finds it first."""
        if self._causes is None:
            self._causes = tuple(dict.fromkeys(causes))

    def end(self, ending: Ending) -> None:
        """Let no group start any more; the first reason stands."""
        self._ending = self._ending or ending

    @property
    def ending(self) -> Ending | None:
        """Why no group starts any more."""
        return self._ending

    def settle(self, step: int) -> Admission:
        """Count the last failure, if there is any, and say whether another attempt may start.

        Args:
            step: of the newest checkpoint, 0 without one; more than ever before is progress.
        """
        if step > self._step:
            self._step = step
            self.in_a_row = 0
            self._told = []
        if self._causes is not None:
            self.in_a_row += 1
            self._told.append("; ".join(self._causes[:_MANY_CAUSES]) or "unknown")
            self._causes = None
            if self.in_a_row >= self.tolerated:
                self.end(Ending("gave up", self._reason()))
        return Admission(self.attempts, wait_seconds(self.in_a_row), self._ending)

    def admit(self, step: int) -> Admission:
        """Answer a group that is about to start; see `settle`."""
        self.attempts += 1
        return self.settle(step)

    def _reason(self) -> str:
        times = "once" if self.in_a_row == 1 else f"{self.in_a_row} times in a row"
        causes = "".join(f"\n  {number}. {cause}" for number, cause in enumerate(self._told, 1))
        return (
            f"the workers have failed {times} without a checkpoint newer than that of step "
            f"{self._step}, which is as often as scale.max_failures allows:{causes}\n"
            "Mend the cause and run the same command again; where the machines fail more often "
            "than checkpoints are written, lower checkpoint.every_steps"
        )


def wait_seconds(in_a_row: int) -> float:
    """Return how long workers wait that have failed so often without progress: 0, 5, 20, ... s."""
    if in_a_row <= 1:
        return 0.0
    # Powers of large numbers overflow.
    wait = FIRST_WAIT_SECONDS * WAIT_FACTOR ** min(in_a_row - 2, 20)
    return min(wait, LONGEST_WAIT_SECONDS)


def describe(error: BaseException) -> str:
    """Return an error as one line: its type and what it says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
