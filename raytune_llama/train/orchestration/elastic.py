"""Elastic training: notice lost nodes quickly, and scale up when nodes return.

Ray Train chooses the number of workers whenever it starts them, by what its autoscaling coordinator
has reserved for the run. That actor polls the cluster only every 20 s, and keeps the reservations
of a killed driver for 180 s. So the driver polls every second itself, and has the coordinator
recompute at once when nodes have come or gone.

To scale up, Ray would stop running workers at any moment, and the steps since the newest checkpoint
would be repeated. Here the run is asked to save and stop, as on Ctrl-C, and is started again: no
step is repeated.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train.torch import TorchTrainer

from raytune_llama.storage.place import Place
from raytune_llama.train.orchestration.channel import Channel
from raytune_llama.train.orchestration.config import ScaleConfig, WorkerRange

logger = logging.getLogger(__name__)

NODE_POLL_SECONDS = 1.0
RECOUNT_SECONDS = 10.0
"""Seconds between counts while no node comes or goes: other runs may release resources."""

WAIT_LOG_SECONDS = 30.0
"""Seconds between two log lines of a run that waits for nodes."""

COORDINATOR_TIMEOUT_SECONDS = 10.0
WORKER_START_SECONDS = 10
"""Seconds that Ray has to place the workers that it counted; then it counts again."""

_TOO_FEW_NODES = "waiting for nodes: they can hold %d workers, scale.num_workers.min is %d"

RESERVATION_FILE = "ray/reservation.json"
"""File in the run directory with the requester name of the run's newest driver."""


class AutoscalerReservation:
    """A run's reservation with Ray's autoscaling coordinator.

    The actor is internal to Ray, not public API; without it, every method is a no-op.
    """

    def __init__(self, requester: str, needs: Mapping[str, float]) -> None:
        self._requester = requester
        self._needs = needs

    @classmethod
    def take_over(
        cls, run_dir: Place, requester: str, needs: Mapping[str, float]
    ) -> "AutoscalerReservation":
        """Return the reservation of a new driver; cancel that of a killed one.

        Args:
            run_dir: directory of the run, which has no other driver now.
            requester: Ray's name for the new driver's run.
            needs: resources per worker.
        """
        file = run_dir / RESERVATION_FILE
        if file.exists():
            cls(file.read_json()["requester"], needs).cancel()
        file.write_json({"requester": requester})
        return cls(requester, needs)

    def cancel(self) -> None:
        """Release the reservation; idempotent."""
        self._ask("cancel_request", self._requester)

    def count_workers(self) -> int | None:
        """Have the coordinator recompute now; return how many workers its reservation holds.

        None: it does not answer.
        """
        reserved = self._ask("get_reserved_resources", self._requester, recompute=True)
        return None if reserved is None else count_reserved(reserved, self._needs)

    def _ask(self, method: str, *args: object, **kwargs: object) -> Any:  # noqa: ANN401  # Ray's
        try:
            coordinator = ray.get_actor("AutoscalingCoordinator", "AutoscalingCoordinator")
            answer = getattr(coordinator, method).remote(*args, **kwargs)
            return ray.get(answer, timeout=COORDINATOR_TIMEOUT_SECONDS)
        except (ValueError, RayActorError, GetTimeoutError) as error:
            # The actor does not exist yet, or its node is lost.
            logger.debug("Ray's autoscaling coordinator: %s", error)
            return None


def count_reserved(reserved: Mapping[str, Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """Return how many workers fit in the reserved resources.

    Args:
        reserved: amount of each resource, by node.
        needs: resources per worker.
    """
    return sum(
        min(int(node.get(name, 0.0) // amount) for name, amount in needs.items())
        for node in reserved.values()
    )


class ScaleUpPolicy:
    """Decides when a run is to resume with more workers; times are in seconds of one clock."""

    def __init__(self, limits: WorkerRange) -> None:
        self._limits = limits
        self._since: float | None = None

    def is_due(self, running: int, room: int, now: float) -> bool:
        """Whether there has been room for more workers for long enough.

        Args:
            running: number of workers that train now.
            room: number of workers that the nodes can hold.
            now: current time.
        """
        if running == 0 or min(room, self._limits.max) <= running:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        return now - self._since >= self._limits.grow_seconds


def watch_nodes(
    scale: ScaleConfig,
    run_dir: Place,
    trainer: TorchTrainer,
    channel: Channel,
    on_waiting: Callable[[], None],
) -> contextlib.AbstractContextManager[None]:
    """Watch the cluster's nodes while the block runs a trainer, if the run is elastic.

    Args:
        scale: scale settings of the run.
        run_dir: directory of the run, which has no other driver.
        trainer: trainer that the block runs.
        channel: channel to the workers, which are asked to stop once there is room for more.
        on_waiting: callback, called every second while the nodes are too few to train on.
    """
    requester = f"train-{trainer.train_run_context.run_id}"
    needs = scale.worker_resources
    # Ray reserves for a fixed number of workers too; a run may be killed fixed and resume elastic.
    reservation = AutoscalerReservation.take_over(run_dir, requester, needs)
    if scale.elastic_range is None:
        return contextlib.nullcontext()
    # Ray's controller takes its settings from the driver's environment; a user's value is kept.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(WORKER_START_SECONDS))
    return NodeWatcher(scale.elastic_range, needs, reservation, channel, on_waiting).watch()


class NodeWatcher:
    """Watches the nodes of an elastic run's cluster, in a thread of the driver."""

    def __init__(
        self,
        limits: WorkerRange,
        needs: Mapping[str, float],
        reservation: AutoscalerReservation,
        channel: Channel,
        on_waiting: Callable[[], None],
    ) -> None:
        self._limits = limits
        self._needs = needs
        self._reservation = reservation
        self._channel = channel
        self._on_waiting = on_waiting
        self._closed = threading.Event()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watch while the block runs."""
        thread = threading.Thread(target=self._watch, name="nodes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closed.set()
            thread.join()

    def _watch(self) -> None:
        try:
            self._watch_growth()
        except RayError as error:
            # The run continues with the workers that it has, or fails for the same reason.
            logger.warning("no longer watching the nodes; the run will not scale up: %s", error)

    def _watch_growth(self) -> None:
        growth = ScaleUpPolicy(self._limits)
        alive: set[str] = set()
        room: int | None = None
        counted = logged = time.monotonic()
        while not self._closed.wait(NODE_POLL_SECONDS):
            before, alive = alive, {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            now = time.monotonic()
            if room is None or alive != before or now - counted >= RECOUNT_SECONDS:
                room, counted = self._reservation.count_workers(), now
            if room is None:
                continue
            if room < self._limits.min:
                self._on_waiting()
                if now - logged >= WAIT_LOG_SECONDS:
                    logged = now
                    logger.warning(_TOO_FEW_NODES, room, self._limits.min)
            running = self._channel.num_workers()
            if growth.is_due(running, min(room, running + self._count_free()), now):
                logger.info(
                    "scaling up: room for %d workers, %d running; saving, then resuming with more",
                    room,
                    running,
                )
                self._channel.request_stop()
                return

    def _count_free(self) -> int:
        """Return how many more workers fit now; reservations omit what other programs use."""
        return count_reserved({"free": ray.available_resources()}, self._needs)
