"""The CPUs and GPUs that a run's workers reserve, and how they come free when Ray frees them not.

A placement group lives as long as its job unless somebody removes it. Ray Train's controller does
so when it ends by itself; where it is killed, as with a trial that Tune stops, Ray's own cleaner
does. It asks the State API without an address, so its thread dies on a machine with several
clusters, and it finds nothing in a cluster without a dashboard. Whatever runs next in the same job
would then wait for CPUs that nobody uses.
"""

import logging
import time
from dataclasses import dataclass
from typing import Self

from ray import PlacementGroupID
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group_table,
    remove_placement_group,
)

from raytune_llama.storage.place import Place
from raytune_llama.storage.process import ProcessIdentity

logger = logging.getLogger(__name__)

WORKER_PLACEMENT_FILE = "ray/workers.json"
"""In the run directory: what the newest workers reserve, and for which controller."""

END_SECONDS = 60.0
"""In which a controller that was told to end has ended."""

PLACEMENT_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WorkerPlacement:
    """What a run's newest workers have reserved."""

    controller: ProcessIdentity | None
    """Ray's process that starts and restarts the workers; None: not known."""

    group: PlacementGroup
    """The workers' CPUs, GPUs and memory."""

    @classmethod
    def read(cls, run_dir: Place) -> Self | None:
        """Return what was written last; None where nothing was, or it cannot be read (logged)."""
        file = run_dir / WORKER_PLACEMENT_FILE
        try:
            if not file.exists():
                return None
            data = file.read_json()
        except (OSError, ValueError) as error:
            logger.warning("what the workers reserve is not known: %s", error)
            return None
        process = data["controller"]
        return cls(
            ProcessIdentity.from_json(process) if process else None,
            PlacementGroup(PlacementGroupID.from_hex(data["placement_group"])),
        )

    def release(self) -> bool:
        """Remove the group once the controller is gone; return whether that was needed.

        Before, the controller would only start new workers in another group. The group of another
        cluster, or of an earlier time, is not there and is let be.
        """
        deadline = time.monotonic() + END_SECONDS
        try:
            while self._is_held():
                if self.controller is None or self.controller.has_exited is not False:
                    remove_placement_group(self.group)
                    logger.info("removed the placement group of workers that are gone")
                    return True
                if time.monotonic() > deadline:
                    logger.warning(
                        "the workers' placement group %s stays, as Ray's controller of it runs: %s",
                        self.group.id.hex(),
                        self.controller,
                    )
                    return False
                time.sleep(PLACEMENT_POLL_SECONDS)
        except RayError as error:
            logger.warning("cannot free what the workers have reserved: %s", error)
        return False

    def _is_held(self) -> bool:
        return placement_group_table(self.group).get("state", "REMOVED") != "REMOVED"


def write_worker_placement(run_dir: Place, controller: ProcessIdentity | None) -> None:
    """Write down what the workers reserve; called by one of them.

    Where that cannot be written it is logged, and the run goes on: a disk that is full for a while
    is for its checkpoints to judge.
    """
    group = get_current_placement_group()
    if group is None:
        return
    process = controller.to_json() if controller else None
    data = {"placement_group": group.id.hex(), "controller": process}
    try:
        (run_dir / WORKER_PLACEMENT_FILE).write_json(data)
    except OSError as error:
        logger.warning("what the workers reserve could not be written down: %s", error)
