"""What the driver does while the workers train: finds the stuck, the draining and the usurper."""

import contextlib
import logging
import queue
import time
from typing import Any, Self

import ray
from ray._private.state import state
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_llama.storage.lease import Fence, LeaseError
from raytune_llama.storage.process import ProcessIdentity, kill_process
from raytune_llama.train.orchestration.channel import Channel, ChannelUpdate
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.orchestration.failure_policy import FailurePolicy, describe_error
from raytune_llama.train.orchestration.heartbeat import Heartbeat
from raytune_llama.train.orchestration.stall_detector import Stall, StallDetector
from raytune_llama.train.result import AbortReason, RetriesExhaustedError

logger = logging.getLogger(__name__)

CHECK_SECONDS = 5.0
"""Between two looks at the nodes and at the lease."""

KILL_SECONDS = 60.0


class Supervisor:
    """Over one run of Ray's trainer; a new one is under a new guard."""

    def __init__(self, scale: ScaleConfig, failures: FailurePolicy, fence: Fence | None) -> None:
        self.failure_policy = failures
        """All so far."""
        self.has_drained = False
        """Whether nodes of the workers were taken away; those that were idle since are gone."""
        self.trainer_results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """What Ray's trainer has returned or raised, or what the guard raises in its place."""
        self._controller: ProcessIdentity | None = None
        self._fence = fence
        self._watch = StallDetector(scale.watch, time.monotonic()) if scale.watch else None
        self._node_ids: set[str] = set()
        self._checked = time.monotonic()
        self._num_hung = 0
        self.channel = Channel(failures, self._listen)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()

    def _listen(self, heard: ChannelUpdate) -> None:
        """Take what the workers have said; called about once a second, in the channel's thread."""
        try:
            self._process_update(heard)
        except RayError as error:
            logger.warning("the cluster does not answer: %s", describe_error(error))
        except BaseException as error:
            # Nobody would watch over the run any more: whoever waits for it is to know.
            self.trainer_results.put(error)
            raise

    def _process_update(self, heard: ChannelUpdate) -> None:
        now = time.monotonic()
        self.failure_policy = heard.failure_policy
        self._controller = heard.controller
        self._node_ids |= {beat.node_id for beat in heard.heartbeats}
        if self._watch is not None:
            if heard.has_failed:
                self._watch.reset(now)
            self._watch.observe(heard.heartbeats, now)
            stuck = self._watch.check(now)
            if stuck is not None:
                self._kill_stalled_workers(stuck)
                self._watch.reset(time.monotonic())
        if now - self._checked >= CHECK_SECONDS:
            self._checked = now
            self._check_nodes()
            self._check_lease()

    def _kill_stalled_workers(self, stuck: Stall) -> None:
        """Kill what is stuck, so that Ray finds it dead, and starts all workers again."""
        logger.error("%s", stuck)
        self.channel.actor.record_failure.remote([str(stuck)])
        if stuck.culprits:
            kill_workers(stuck.culprits)
            return
        # No worker is there, and Ray starts none: its controller hangs.
        self._num_hung += 1
        if self._num_hung > 1 or not self.kill_controller():
            self.trainer_results.put(
                RetriesExhaustedError(f"Ray starts no workers, and does not end: {stuck}")
            )

    def note_waiting_for_nodes(self) -> None:
        """Learn that no workers can start now; to be told again as long as that is so."""
        if self._watch is not None:
            self._watch.restart_timer(time.monotonic())

    def kill_controller(self) -> bool:
        """End Ray's controller of the workers, and them with it; False where there is none."""
        return self._controller is not None and self._controller.kill()

    def _check_nodes(self) -> None:
        draining = self._node_ids & set(draining_nodes())
        if draining and not self.has_drained:
            self.has_drained = True
            names = ", ".join(sorted(node_id[:8] for node_id in draining))
            logger.warning("nodes are taken away (Ray node %s): saving after this step", names)
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
            logger.warning("run_dir: cannot see whose it is: %s", error)


def draining_nodes() -> dict[str, int]:
    """Return the nodes that Ray was told to take away, with the time in ms (0: any) until then.

    Ray has no public way to ask but `ray.train.get_preemption_info`, which lets all workers wait
    for one another in every step; this is what stands behind it.
    """
    return state.get_draining_nodes()


def kill_workers(workers: tuple[Heartbeat, ...]) -> None:
    """Kill processes on their nodes with SIGKILL: a stopped process answers to nothing else."""
    task: Any = ray.remote(kill_process)
    pending: dict[Any, Heartbeat] = {}
    for beat in workers:
        there = NodeAffinitySchedulingStrategy(node_id=beat.node_id, soft=False)
        call = task.options(num_cpus=0, scheduling_strategy=there, max_retries=0)
        pending[call.remote(beat.process)] = beat
    done, late = ray.wait(list(pending), num_returns=len(pending), timeout=KILL_SECONDS)
    for ref in late:
        logger.error("%s cannot be killed: its node does not answer", pending[ref].process)
    for ref in done:
        # A node that is lost has taken its worker along.
        with contextlib.suppress(RayError):
            if ray.get(ref):
                logger.warning("%s killed", pending[ref].process)
