"""How a run of the loop ended: the result that rank 0 returns to the driver."""

from dataclasses import dataclass
from typing import Literal

from raytune_llama.config.errors import UserError

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
"""Errors of data, files or config, which a retry would repeat; others may be hardware faults."""


class InvalidRunError(UserError):
    """The run's data, files or settings are invalid; a retry would fail in the same way."""


class RetriesExhaustedError(RuntimeError):
    """The workers failed too often without a new checkpoint; the message lists the causes."""


@dataclass(frozen=True)
class AbortReason:
    """Why a run ends before its last step and is not retried."""

    kind: Literal["diverged", "refused", "gave up"]
    """Diverged: non-finite loss or gradient, or replicas that differ. Refused: invalid data, files
    or settings. Gave up: the workers failed too often without a new checkpoint."""

    cause: str
    """Error message for the user."""

    def to_exception(self) -> Exception:
        """Return the exception that the driver raises."""
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
    """Stopped: saved on request; the same command resumes. Aborted: see `abort_reason`."""

    step: int
    """Optimizer steps done."""

    abort_reason: AbortReason | None = None
    """Why the run was aborted; None if it was not."""
