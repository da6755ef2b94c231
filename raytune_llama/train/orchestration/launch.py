"""Hand a run to Ray Train, and wait for it.

What starts a run needs no model: only the workers import what a config is made of. A process that
starts runs and nothing else, as a sweep's trials have, is there in a third of the time.
"""

import logging
import pickle
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from raytune_llama.storage.lease import Fence
from raytune_llama.storage.place import Place
from raytune_llama.train.orchestration.channel import FailureCallback
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.orchestration.elastic import watch_nodes
from raytune_llama.train.orchestration.failure_policy import (
    FailurePolicy,
    StartDecision,
    describe_error,
)
from raytune_llama.train.orchestration.placement_group import WorkerPlacement
from raytune_llama.train.orchestration.signals import StopSignal
from raytune_llama.train.orchestration.supervisor import Supervisor, draining_nodes
from raytune_llama.train.orchestration.worker import newest_step, train_worker
from raytune_llama.train.result import RunResult

if TYPE_CHECKING:
    from raytune_llama.train.config import AnyTrainConfig

logger = logging.getLogger(__name__)

MAX_STARTUP_FAILURES = 5
"""Attempts of Ray to start the workers; its own default is without end."""

NEVER_SECONDS = 1e12

WITHOUT_LIMIT = -1


@dataclass(frozen=True)
class PreparedRun:
    """A run that was checked and may start."""

    config: bytes
    """The pickled config, for the workers alone."""

    scale: ScaleConfig
    """The workers, and what Ray is asked for."""

    run_dir: Place
    """Of the run."""

    fence: Fence | None
    """What allows to publish in the run directory; None where nobody else could."""

    @classmethod
    def from_config(cls, config: "AnyTrainConfig", fence: Fence | None = None) -> Self:
        """Pack a config."""
        return cls(pickle.dumps(config), config.scale, config.run_place, fence)


def launch(run: PreparedRun) -> RunResult:
    """Run the loop on Ray Train to its end, or until SIGTERM.

    Ray restarts workers that fail. What it does not restart is started again here: a controller of
    Ray's that has failed, and workers that had to leave nodes which are taken away.

    Raises:
        FloatingPointError: a number of the run is no longer finite.
        GaveUpError: the workers failed `config.max_failures` times without a new checkpoint.
        RefusedError: the run's data, files or settings do not allow it.
    """
    failures = FailurePolicy(run.scale.max_failures)
    with StopSignal() as stop:
        while True:
            with Supervisor(run.scale, failures, run.fence) as guard:
                stop.set_callback(guard.channel.request_stop)
                outcome, error = _fit(run, guard)
            failures = guard.failure_policy
            ending = failures.abort_reason or (outcome and outcome.abort_reason)
            if ending is not None:
                raise ending.to_exception()
            if outcome is not None and (outcome.status == "finished" or stop.is_requested):
                return outcome
            admission = _decide_retry(run, failures, error)
            if stop.wait(admission.wait_seconds) or not has_room(
                run.scale, stop, has_drained=guard.has_drained
            ):
                return RunResult("stopped", newest_step(run.run_dir))


def _fit(run: PreparedRun, guard: Supervisor) -> tuple[RunResult | None, Exception | None]:
    """Train; return how it ended, or what Ray has failed with.

    Raises:
        GaveUpError: nothing happens any more.
    """
    trainer = build_trainer(run, guard.channel.actor)

    def fit() -> None:
        try:
            guard.trainer_results.put(trainer.fit())
        except BaseException as error:  # noqa: BLE001  # raised again by whoever waits
            guard.trainer_results.put(error)

    # Not in the main thread: there Ray would take Ctrl-C for itself, and where its controller hangs
    # so would the driver.
    threading.Thread(target=fit, name="fit", daemon=True).start()
    try:
        with watch_nodes(
            run.scale, run.run_dir, trainer, guard.channel, guard.note_waiting_for_nodes
        ):
            answer = guard.trainer_results.get()
    except BaseException:
        guard.kill_controller()
        raise
    if isinstance(answer, (TrainingFailedError, RayError)):
        logger.warning("Ray's trainer has failed: %s", describe_error(answer))
        return None, answer
    if isinstance(answer, BaseException):
        raise answer
    # What the loop returned on the first worker; see train_worker.
    return cast("RunResult", answer.return_value), None


def _decide_retry(
    run: PreparedRun, failures: FailurePolicy, error: Exception | None
) -> StartDecision:
    """Count a failure of Ray's own as one of the workers is, and free what it has left reserved.

    Raises:
        GaveUpError: it is one too many.
    """
    if error is not None:
        failures.record([describe_error(error)])
        reserved = WorkerPlacement.read(run.run_dir)
        if reserved is not None:
            reserved.release()
    admission = failures.decide(newest_step(run.run_dir))
    if admission.abort_reason is not None:
        raise admission.abort_reason.to_exception()
    return admission


def has_room(scale: ScaleConfig, stop: StopSignal, *, has_drained: bool) -> bool:
    """Whether nodes that stay can hold the workers; waits for them at most `wait_seconds`.

    Args:
        scale: the workers, and how long to wait.
        stop: ends the waiting.
        has_drained: whether nodes were taken away under the workers. Where none were, Ray waits
            for nodes itself.
    """
    from raytune_llama.train.orchestration.nodes import RESOURCE_POLL_SECONDS, find_shortage

    start = time.monotonic()
    while True:
        draining = draining_nodes()
        nodes = [node for node in ray.nodes() if node["NodeID"] not in draining]
        shortage = find_shortage(nodes, scale.worker_resources, scale)
        left = start + scale.wait_seconds - time.monotonic()
        # A node that is drained ends once it is idle, and is in no list any more.
        if shortage is None or not (has_drained or draining):
            return True
        if left <= 0:
            logger.warning("stopping, as the nodes that stay are too few: %s", shortage)
            return False
        if stop.wait(min(RESOURCE_POLL_SECONDS, left)):
            return False


def build_trainer(run: PreparedRun, channel: Any) -> TorchTrainer:  # noqa: ANN401  # an actor
    """Build Ray's trainer around the loop.

    Checkpoints are our own and are found by scanning the run directory, so none is registered
    with Ray: its snapshot file is not written atomically, and a torn one ends a run for good.
    """
    scale = run.scale
    # Left by whatever other program, a torn one would end this run too.
    (run.run_dir / "ray" / "checkpoint_manager_snapshot.json").delete()
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": run.config, "channel": channel, "fence": run.fence},
        torch_config=TorchConfig(
            backend="nccl" if scale.use_gpu else "gloo",
            timeout_s=int(scale.collective_timeout_seconds),
        ),
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers
            if isinstance(scale.num_workers, int)
            else (scale.num_workers.min, scale.num_workers.max),
            # Running workers are stopped by us alone; see elastic.py.
            elastic_resize_monitor_interval_s=NEVER_SECONDS,
            use_gpu=scale.use_gpu,
            resources_per_worker=scale.worker_resources,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=run.run_dir.key,
            storage_filesystem=run.run_dir.filesystem,
            failure_config=FailureConfig(
                # Every group of workers asks the channel whether it may start.
                max_failures=WITHOUT_LIMIT,
                max_preemption_failures=WITHOUT_LIMIT,
                controller_failure_limit=MAX_STARTUP_FAILURES,
            ),
            callbacks=[FailureCallback(channel)],
            worker_runtime_env={"env_vars": worker_environment(scale)},
        ),
    )


def worker_environment(scale: ScaleConfig) -> dict[str, str]:
    """Return the environment variables that every training worker starts with."""
    environment = {
        "OMP_NUM_THREADS": str(scale.cpus_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not scale.use_gpu:
        # glibc maps and unmaps each large tensor, and its pages are zeroed anew every time: a
        # quarter of a small model's step. So freed memory is kept for the next step. Ray runs the
        # loop in a thread of its own, whose arena could not grow beyond 64 MiB: one arena for all.
        environment["MALLOC_ARENA_MAX"] = "1"
        environment["MALLOC_MMAP_THRESHOLD_"] = str(4 * 2**30)
        environment["MALLOC_TRIM_THRESHOLD_"] = str(8 * 2**30)
    if scale.network_interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = scale.network_interface
        environment["NCCL_SOCKET_IFNAME"] = scale.network_interface
    return environment
