"""What a run directory records of its run in a tracker, so that a resumed run continues in it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.trackers.tracker import EndState, RunAddress

TRACKER_KEYS = ("mlflow", "wandb")
"""Keys of the trackers, in configs and in the names of files."""


@dataclass
class SentState:
    """A run in one tracker, and how much of it has been sent; `tracker-KEY.json` in its directory.

    Each tracker has a file of its own, as each has a thread of its own.
    """

    address: RunAddress | None = None
    """Where the run is; None: the tracker has not been reached yet."""

    is_configured: bool = False
    """Whether the config has been sent, which trackers take once."""

    last_steps: dict[str, int] = field(default_factory=dict)
    """Step of the last value that was sent, by the name of the metric."""

    ended: EndState | None = None
    """How the run has ended, once everything has been sent; None: something may be left to send."""

    def is_sent(self, name: str, step: int) -> bool:
        """Whether a value was sent; steps that run again after a failure are not sent twice."""
        return step <= self.last_steps.get(name, -1)

    @classmethod
    def read(cls, run_dir: Place, key: str) -> Self:
        """Return what was sent to a tracker; an empty state if the run has none."""
        file = run_dir / f"tracker-{key}.json"
        if file.status() is None:
            return cls()
        recorded = file.read_json()
        address = recorded["address"] and RunAddress(**recorded["address"])
        return cls(**{**recorded, "address": address})

    def write(self, run_dir: Place, key: str) -> None:
        """Record it in the run directory."""
        (run_dir / f"tracker-{key}.json").write_json(asdict(self))


def read_addresses(run_dir: Place) -> dict[str, dict[str, Any]]:
    """Return a run's addresses in trackers as plain data, for the manifest of its result."""
    states = {key: SentState.read(run_dir, key) for key in TRACKER_KEYS}
    return {key: asdict(state.address) for key, state in states.items() if state.address}
