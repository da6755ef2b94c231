"""How a run of the loop ended: what its first worker returns to the driver."""

from dataclasses import dataclass
from typing import Literal


class RefusedError(ValueError):
    """The run's data, files or settings do not allow it; another attempt would end alike."""


class GaveUpError(RuntimeError):
    """The workers failed too often without progress; the message has the causes."""


@dataclass(frozen=True)
class Ending:
    """Why a run ends before its last step, and is not tried again."""

    status: Literal["diverged", "refused", "gave up"]
    """Diverged: a number is no longer finite. Refused: data, files or settings do not allow it.
    Gave up: the workers failed too often without progress."""

    cause: str
    """What was found, for people."""

    def error(self) -> Exception:
        """Return what the driver raises."""
        kinds = {"diverged": FloatingPointError, "refused": RefusedError, "gave up": GaveUpError}
        return kinds[self.status](self.cause)


@dataclass(frozen=True)
class Outcome:
    """How a worker's run of the loop ended."""

    status: Literal["finished", "stopped", "ended"]
    """Stopped: on request, after saving; the same command goes on. Ended: see `ending`."""

    step: int
    """Optimizer steps done."""

    ending: Ending | None = None
    """Why it has ended, where it has neither finished nor stopped."""
