"""The protocol of a tracker, and what is sent to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from raytune_llama.storage.place import Place

EndState = Literal["finished", "stopped", "interrupted", "diverged", "failed"]
"""How a run has ended. Stopped: by the scheduler of its sweep. Interrupted: it can be resumed."""


class UnreachableError(RuntimeError):
    """The tracker does not answer; a later attempt may succeed."""


class RefusedError(RuntimeError):
    """The tracker refuses what was sent; it would refuse it again."""


class MissingRunError(RefusedError):
    """The tracker no longer has the run."""


@dataclass(frozen=True)
class TrackedRun:
    """A run, or a sweep, as a tracker shows it from its start."""

    run_dir: Place
    """Directory of the run."""

    name: str
    """Name of the run."""

    job: str
    """Command that started it: pretrain, sft or sweep."""

    config: Mapping[str, Any]
    """Config of the run: nested plain data, without credentials."""

    tags: Mapping[str, str]
    """Where it comes from, by name: paths and hashes."""

    group: str | None = None
    """Name of the sweep that it belongs to; None: it belongs to none."""

    parent_dir: Place | None = None
    """Directory of that sweep, itself a tracked run; None: it belongs to none."""


@dataclass(frozen=True)
class MetricPoint:
    """One value of a metric."""

    name: str
    """Name of the metric, as in `metrics.jsonl`."""

    value: float
    """Value; NaN if it was not finite."""

    step: int
    """Optimizer steps done."""

    time: float
    """When it was read, in seconds since the epoch."""


@dataclass(frozen=True)
class RunAddress:
    """A run in a tracker, as it is recorded in the run directory and in manifests."""

    server: str
    """Address of the server; for W&B, the entity or an empty text."""

    project: str
    """Experiment of MLflow, or project of W&B."""

    id: str
    """Identifier of the run in the tracker."""

    url: str | None = field(default=None)
    """Page of the run; None if the tracker has none."""


class OpenRun(Protocol):
    """A run that is open in a tracker."""

    @property
    def address(self) -> RunAddress:
        """Where the run is."""
        ...

    def configure(self, config: Mapping[str, Any]) -> None:
        """Log the config, once per run; raises as `log` does."""
        ...

    def log(self, points: Sequence[MetricPoint]) -> None:
        """Log values of metrics, in order of their steps.

        Raises:
            UnreachableError: The tracker does not answer; nothing of `points` counts as logged.
            RefusedError: It refuses them.
        """
        ...

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags; raises as `log` does."""
        ...

    def upload(self, name: str, data: bytes) -> None:
        """Upload a file, or replace it; raises as `log` does."""
        ...

    def end(self, state: EndState | None) -> None:
        """Close the run; raises as `log` does.

        Args:
            state: How it has ended; None: as it was before it was opened.
        """
        ...


class Tracker(Protocol):
    """A tracking service; used by one thread at a time."""

    @property
    def name(self) -> str:
        """Name of the service and its address, for messages."""
        ...

    @property
    def key(self) -> str:
        """Key of the service in configs and in the run directory: mlflow or wandb."""
        ...

    def is_own(self, address: RunAddress) -> bool:
        """Whether a recorded run is in the server and project that are configured now."""
        ...

    def check(self) -> None:
        """Ask the server whether it accepts runs.

        Raises:
            UnreachableError: It does not answer.
            RefusedError: It refuses, for example the credentials.
        """
        ...

    def open(self, run: TrackedRun, known: str | None, parent: str | None) -> OpenRun:
        """Create a run, or continue one; raises as `OpenRun.log` does.

        Args:
            run: Run to open.
            known: Its identifier from an earlier start; None: a new run.
            parent: Identifier of its sweep's run; None: it belongs to none.

        Raises:
            MissingRunError: The tracker no longer has the run `known`.
        """
        ...

    def reopen(self, address: RunAddress) -> OpenRun:
        """Open a run that has ended, to add to it; raises as `open` does."""
        ...

    def abandon(self) -> None:
        """Give up what is being sent, so that nothing of it keeps this process from ending."""
        ...
