"""The workers' placement group (their CPUs and GPUs), and its removal when Ray leaks it.

A placement group lives as long as its job unless it is removed. Ray Train's controller removes it
on a normal exit; if the controller is killed, as when Tune stops a trial, Ray's own cleaner should.
But that queries the State API without an address: its thread dies on a machine with several
clusters, and it finds nothing in a cluster without a dashboard. The next run in the same job would
then wait for CPUs that nothing uses.
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
"""File in the run directory with the newest workers' placement group and controller."""

END_SECONDS = 60.0
"""Timeout for the exit of a controller that was asked to stop."""

PLACEMENT_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WorkerPlacement:
    """Placement group of a run's newest workers, and its owner."""

    controller: ProcessIdentity | None
    """Ray Train's controller process, which (re)starts the workers; None: unknown."""

    group: PlacementGroup
    """Placement group of the workers' CPUs and GPUs."""

    @classmethod
    def read(cls, run_dir: Place) -> Self | None:
        """Return the newest placement; None if none was written or it is unreadable (logged)."""
        file = run_dir / WORKER_PLACEMENT_FILE
        try:
            if not file.exists():
                return None
            data = file.read_json()
        except (OSError, ValueError) as error:
            logger.warning("cannot read the workers' placement group: %s", error)
            return None
        process = data["controller"]
        return cls(
            ProcessIdentity.from_json(process) if process else None,
            PlacementGroup(PlacementGroupID.from_hex(data["placement_group"])),
        )

    def release(self) -> bool:
        """Remove the group once the controller has exited; return whether that was needed.

        A running controller would only start new workers in another group. A group of another
        cluster or an earlier session does not exist here, and is ignored.
        """
        deadline = time.monotonic() + END_SECONDS
        try:
            while self._is_held():
                if self.controller is None or self.controller.has_exited is not False:
                    remove_placement_group(self.group)
                    logger.info("removed the leaked placement group of exited workers")
                    return True
                if time.monotonic() > deadline:
                    logger.warning(
                        "placement group %s not removed: Ray's controller still runs: %s",
                        self.group.id.hex(),
                        self.controller,
                    )
                    return False
                time.sleep(PLACEMENT_POLL_SECONDS)
        except RayError as error:
            logger.warning("cannot remove the workers' placement group: %s", error)
        return False

    def _is_held(self) -> bool:
        return placement_group_table(self.group).get("state", "REMOVED") != "REMOVED"


def write_worker_placement(run_dir: Place, controller: ProcessIdentity | None) -> None:
    """Record the workers' placement group in the run directory; called by one worker.

    If the write fails, it is logged and the run continues: a disk that is full for a while may be
    free again at the next checkpoint.
    """
    group = get_current_placement_group()
    if group is None:
        return
    process = controller.to_json() if controller else None
    data = {"placement_group": group.id.hex(), "controller": process}
    try:
        (run_dir / WORKER_PLACEMENT_FILE).write_json(data)
    except OSError as error:
        logger.warning("cannot record the workers' placement group: %s", error)
