"""An elastic run: quick news of lost nodes, and more workers when nodes return.

Ray Train chooses the number of workers whenever it starts them, by what its autoscaling coordinator
has reserved for the run. That actor looks at the cluster every 20 s only, and remembers for 180 s
what a driver that was killed had reserved. So the driver looks itself, every second, and lets the
coordinator look at once where nodes have come or gone.

Ray would also stop running workers at any moment to start more of them, and the steps since the
newest checkpoint would be taken again. Here the run is asked to save and stop, as on SIGTERM, and
is started again: no step is repeated.
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
"""Between two counts while no node comes or goes: other runs also give back what they had."""

WAIT_LOG_SECONDS = 30.0
"""Between two lines of a run that waits for nodes."""

COORDINATOR_TIMEOUT_SECONDS = 10.0
WORKER_START_SECONDS = 10
"""In which Ray has to find places for workers that it counted itself; then it counts again."""

_TOO_FEW_NODES = "waiting for nodes: they hold %d workers, and scale.num_workers.min is %d"

RESERVATION_FILE = "ray/reservation.json"
"""In the run directory: under which name the run's newest driver reserves."""


class AutoscalerReservation:
    """What Ray's autoscaling coordinator keeps for a run.

    The actor is Ray's own and in no public API; without it, all here does nothing.
    """

    def __init__(self, requester: str, needs: Mapping[str, float]) -> None:
        self._requester = requester
        self._needs = needs

    @classmethod
    def take_over(
        cls, run_dir: Place, requester: str, needs: Mapping[str, float]
    ) -> "AutoscalerReservation":
        """Return the reservation of a new driver; give back what a killed one had.

        Args:
            run_dir: of the run, which has no other driver now.
            requester: Ray's name for the new driver's run.
            needs: what one worker reserves.
        """
        file = run_dir / RESERVATION_FILE
        if file.exists():
            cls(file.read_json()["requester"], needs).cancel()
        file.write_json({"requester": requester})
        return cls(requester, needs)

    def cancel(self) -> None:
        """Let others have it; nothing happens where it is no more."""
        self._ask("cancel_request", self._requester)

    def count_workers(self) -> int | None:
        """Let the coordinator look at the nodes now, and return for how many workers it reserves.

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
            # No such actor yet, or not any more: the node that had it is lost.
            logger.debug("Ray's autoscaling coordinator: %s", error)
            return None


def count_reserved(reserved: Mapping[str, Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """Return how many workers fit in what is reserved.

    Args:
        reserved: of each resource, by node.
        needs: what one worker reserves.
    """
    return sum(
        min(int(node.get(name, 0.0) // amount) for name, amount in needs.items())
        for node in reserved.values()
    )


class ScaleUpPolicy:
    """Decides when a run goes on with more workers; times are given, in seconds of one clock."""

    def __init__(self, limits: WorkerRange) -> None:
        self._limits = limits
        self._since: float | None = None

    def is_due(self, running: int, room: int, now: float) -> bool:
        """Whether there has been room for more workers for long enough.

        Args:
            running: workers that train; 0 while none do.
            room: workers that the nodes can hold.
            now: the time.
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
    tell_waiting: Callable[[], None],
) -> contextlib.AbstractContextManager[None]:
    """Watch the nodes under a run of Ray's trainer, if it is elastic.

    Args:
        scale: of the run.
        run_dir: of the run, which has no other driver.
        trainer: which is to be run in the block.
        channel: to its workers, which are asked to stop once there is room for more of them.
        tell_waiting: called every second while the nodes are too few to train on.
    """
    if scale.elastic_range is None:
        return contextlib.nullcontext()
    # Ray's controller has its settings from the driver's environment; a user's own is kept.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(WORKER_START_SECONDS))
    requester = f"train-{trainer.train_run_context.run_id}"
    needs = scale.worker_resources
    reservation = AutoscalerReservation.take_over(run_dir, requester, needs)
    return NodeWatcher(scale.elastic_range, needs, reservation, channel, tell_waiting).watch()


class NodeWatcher:
    """Watches the nodes under an elastic run, in a thread of the driver."""

    def __init__(
        self,
        limits: WorkerRange,
        needs: Mapping[str, float],
        reservation: AutoscalerReservation,
        channel: Channel,
        tell_waiting: Callable[[], None],
    ) -> None:
        self._limits = limits
        self._needs = needs
        self._reservation = reservation
        self._channel = channel
        self._tell_waiting = tell_waiting
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
            # The run trains on with the workers that it has, or ends for the same reason.
            logger.warning("nodes are not watched any more: %s", error)

    def _watch_growth(self) -> None:
        growth = ScaleUpPolicy(self._limits)
        alive: set[str] = set()
        room: int | None = None
        counted = told = time.monotonic()
        while not self._closed.wait(NODE_POLL_SECONDS):
            before, alive = alive, {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            now = time.monotonic()
            if room is None or alive != before or now - counted >= RECOUNT_SECONDS:
                room, counted = self._reservation.count_workers(), now
            if room is None:
                continue
            if room < self._limits.min:
                self._tell_waiting()
                if now - told >= WAIT_LOG_SECONDS:
                    told = now
                    logger.warning(_TOO_FEW_NODES, room, self._limits.min)
            running = self._channel.num_workers()
            if growth.is_due(running, min(room, running + self._count_free()), now):
                logger.info(
                    "nodes: room for %d workers, and %d train: saving, to go on with more",
                    room,
                    running,
                )
                self._channel.request_stop()
                return

    def _count_free(self) -> int:
        """Return how many more workers could start: what is no trainer's is not in reservations."""
        return count_reserved({"free": ray.available_resources()}, self._needs)
