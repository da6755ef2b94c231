"""How a run of the loop ended: what its first worker returns to the driver."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Outcome:
    """How a worker's run of the loop ended."""

    status: Literal["finished", "stopped", "diverged"]
    """Stopped: on request, after saving; the same command goes on. Diverged: a number is no longer
    finite, which another attempt would find again."""

    step: int
    """Optimizer steps done."""

    cause: str | None = None
    """What is not finite, where it has diverged."""
