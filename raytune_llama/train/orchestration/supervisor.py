"""Driver-side supervision of the workers: hung workers, draining nodes, a lost run lease."""

import contextlib
import logging
import queue
import time
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray._private.state import state
from ray._private.worker import global_worker
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_llama.storage.lease import Fence, LeaseError
from raytune_llama.storage.process import ProcessIdentity, kill_process
from raytune_llama.train.orchestration.channel import Channel, ChannelUpdate
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.orchestration.exported_metrics import ExportedMetrics
from raytune_llama.train.orchestration.failure_policy import FailurePolicy, describe_error
from raytune_llama.train.orchestration.heartbeat import Heartbeat
from raytune_llama.train.orchestration.stall_detector import Stall, StallDetector
from raytune_llama.train.result import AbortReason, RetriesExhaustedError

logger = logging.getLogger(__name__)

CHECK_SECONDS = 5.0
"""Seconds between checks of the nodes and of the lease."""

KILL_SECONDS = 60.0

STOP_SECONDS = 3.0
"""Seconds that workers without a step have to stop by themselves, before they are killed."""


@dataclass(frozen=True)
class EndedBeforeStep:
    """The run was asked to stop while no worker had done a step, so that there is nothing to save.

    Until the first step, workers load the model or compile, and do not look at the stop request; or
    they wait for nodes, and are not even there.
    """


class Supervisor:
    """Supervises one call of Ray's trainer; every retry has a new supervisor."""

    def __init__(
        self,
        scale: ScaleConfig,
        failures: FailurePolicy,
        fence: Fence | None,
        exported: ExportedMetrics,
    ) -> None:
        self.failure_policy = failures
        """Failures so far."""
        self.has_drained = False
        """Whether nodes of the workers have drained; idle ones have exited since."""
        self.trainer_results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """Result or error of Ray's trainer; what the supervisor puts there first comes instead of
        it: an error to raise, or `EndedBeforeStep`."""
        self._stop_requested_at: float | None = None
        self._steps = StepWatch()
        self._controller: ProcessIdentity | None = None
        self._fence = fence
        self._exported = exported
        self._stall_detector = StallDetector(scale.watch, time.monotonic()) if scale.watch else None
        self._node_ids: set[str] = set()
        self._checked_at = time.monotonic()
        self._num_hung = 0
        self.channel = Channel(failures, self._listen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()

    def _listen(self, update: ChannelUpdate) -> None:
        """Handle an update; called about once per second, in the channel's thread."""
        try:
            self._process_update(update)
        except RayError as error:
            logger.warning("the Ray cluster does not answer: %s", describe_error(error))
        except BaseException as error:
            # The run would be unsupervised, so the main thread has to raise this.
            self.trainer_results.put(error)
            raise

    def _process_update(self, update: ChannelUpdate) -> None:
        now = time.monotonic()
        self.failure_policy = update.failure_policy
        self._controller = update.controller
        self._exported.observe(update.heartbeats)
        self._node_ids |= {beat.node_id for beat in update.heartbeats}
        self._steps.observe(update.heartbeats, has_failed=update.has_failed)
        self._end_before_step(now)
        if self._stall_detector is not None:
            if update.has_failed:
                self._stall_detector.reset(now)
            self._stall_detector.observe(update.heartbeats, now)
            stall = self._stall_detector.check(now)
            if stall is not None:
                self._kill_stalled_workers(stall)
                self._stall_detector.reset(time.monotonic())
        if now - self._checked_at >= CHECK_SECONDS:
            self._checked_at = now
            self._check_nodes()
            self._check_lease()

    def request_stop(self) -> None:
        """Ask the workers to save and stop; safe in a signal handler, which must not call Ray."""
        self._stop_requested_at = time.monotonic()
        self.channel.request_stop()

    def _end_before_step(self, now: float) -> None:
        """End a run that was asked to stop and has nothing to save."""
        since = self._stop_requested_at
        is_late = since is not None and now - since > STOP_SECONDS
        # Without its controller, Ray would continue to start workers.
        if is_late and not self._steps.has_begun and self._controller is not None:
            logger.info("stopping before the first step: there is nothing to save")
            self._stop_requested_at = None
            self.trainer_results.put(EndedBeforeStep())

    def _kill_stalled_workers(self, stall: Stall) -> None:
        """Kill the hung workers, so that Ray notices and restarts all workers."""
        logger.error("%s", stall)
        self._exported.count_stall()
        self.channel.actor.record_failure.remote([str(stall)])
        if stall.culprits:
            kill_workers(stall.culprits)
            return
        # No worker is running, and Ray starts none: its controller hangs.
        self._num_hung += 1
        if self._num_hung > 1 or not self.kill_controller():
            self.trainer_results.put(
                RetriesExhaustedError(f"Ray's controller hangs and starts no workers: {stall}")
            )

    def note_waiting_for_nodes(self) -> None:
        """Note that no workers can start for lack of nodes; called repeatedly while that lasts."""
        if self._stall_detector is not None:
            self._stall_detector.restart_timer(time.monotonic())

    def kill_controller(self) -> bool:
        """Kill Ray Train's controller, and with it the workers; False if none could be killed."""
        return self._controller is not None and self._controller.kill()

    def end_controller(self) -> None:
        """End Ray Train's controller, and with it the workers, as `ray.kill` does.

        Ray would report one that is killed by a signal as a failure. Its handle is Ray's own.
        """
        if self._controller is None:
            return
        for actor_id, actor in state.actor_table(None, global_worker.current_job_id).items():
            if actor["Pid"] == self._controller.pid and actor["State"] != "DEAD":
                core: Any = vars(global_worker)["core_worker"]  # set by `ray.init`
                core.kill_actor(ray.ActorID.from_hex(actor_id), True)

    def _check_nodes(self) -> None:
        draining = self._node_ids & set(draining_nodes())
        if draining and not self.has_drained:
            self.has_drained = True
            names = ", ".join(sorted(node_id[:8] for node_id in draining))
            logger.warning("nodes are draining (Ray node %s): saving after this step", names)
            self.channel.request_stop()

    def _check_lease(self) -> None:
        if self._fence is None:
            return
        try:
            self._fence.check()
        except LeaseError as error:
            self.channel.actor.abort.remote(AbortReason("refused", str(error)))
            self.channel.request_stop()
        except OSError as error:
            logger.warning("run_dir: cannot check the lease: %s", error)


class StepWatch:
    """Notes whether the current group of workers has done a step, from its heartbeats."""

    def __init__(self) -> None:
        self.has_begun = False
        """Whether the current group has done a step, or saves or finishes the run."""
        self._attempt = self._ended = 0

    def observe(self, heartbeats: list[Heartbeat], *, has_failed: bool) -> None:
        """Record the heartbeats since the last call, and whether the group has failed since."""
        for beat in heartbeats:
            self._attempt = max(self._attempt, beat.attempt)
            is_before = beat.step == 0 and beat.phase in {"starting", "evaluating"}
            if beat.attempt > self._ended and not is_before:
                self.has_begun = True
        if has_failed:
            # The next group begins at the newest checkpoint.
            self._ended, self.has_begun = self._attempt, False


def draining_nodes() -> dict[str, int]:
    """Return Ray ids of the draining nodes, with their deadlines in ms since the epoch (0: none).

    Ray's only public API, `ray.train.get_preemption_info`, synchronizes all workers in every step;
    this is its implementation.
    """
    return state.get_draining_nodes()


def kill_workers(workers: tuple[Heartbeat, ...]) -> None:
    """Kill processes on their nodes with SIGKILL, the only signal that ends a stopped process."""
    task: Any = ray.remote(kill_process)
    pending: dict[Any, Heartbeat] = {}
    for beat in workers:
        on_node = NodeAffinitySchedulingStrategy(node_id=beat.node_id, soft=False)
        call = task.options(num_cpus=0, scheduling_strategy=on_node, max_retries=0)
        pending[call.remote(beat.process)] = beat
    done, late = ray.wait(list(pending), num_returns=len(pending), timeout=KILL_SECONDS)
    for ref in late:
        logger.error("cannot kill %s: its node does not answer", pending[ref].process)
    for ref in done:
        # A worker on a lost node is dead already.
        with contextlib.suppress(RayError):
            if ray.get(ref):
                logger.warning("killed %s", pending[ref].process)
