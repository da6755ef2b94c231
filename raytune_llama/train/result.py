"""How a run of the loop ended: what its first worker returns to the driver."""

from dataclasses import dataclass
from typing import Literal

from raytune_llama.config.errors import UserError


class InvalidRunError(UserError):
    """The run's data, files or settings do not allow it; another attempt would end alike."""


class RetriesExhaustedError(RuntimeError):
    """The workers failed too often without progress; the message has the causes."""


@dataclass(frozen=True)
class AbortReason:
    """Why a run ends before its last step, and is not tried again."""

    kind: Literal["diverged", "refused", "gave up"]
    """Diverged: a number is no longer finite. Refused: data, files or settings do not allow it.
    Gave up: the workers failed too often without progress."""

    cause: str
    """What was found, for people."""

    def to_exception(self) -> Exception:
        """Return what the driver raises."""
        kinds = {
            "diverged": FloatingPointError,
            "refused": InvalidRunError,
            "gave up": RetriesExhaustedError,
        }
        return kinds[self.kind](self.cause)


@dataclass(frozen=True)
class RunResult:
    """How a worker's run of the loop ended."""

    status: Literal["finished", "stopped", "aborted"]
    """Stopped: on request, after saving; the same command goes on. Aborted: see `abort_reason`."""

    step: int
    """Optimizer steps done."""

    abort_reason: AbortReason | None = None
    """Set where it was aborted."""
