"""Launch a run on Ray Train, and wait for it.

Launching needs no model: only the workers import the modules that a config is composed of. A
process that only launches, such as a sweep's trial, starts in a third of the time.
"""

import logging
import pickle
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import ray
import ray.util.metrics
from ray.exceptions import RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from raytune_llama.signals import StopSignal
from raytune_llama.storage.lease import Fence
from raytune_llama.storage.place import Place
from raytune_llama.train.monitoring.metrics import run_label
from raytune_llama.train.orchestration import resources
from raytune_llama.train.orchestration.channel import FailureCallback
from raytune_llama.train.orchestration.config import ScaleConfig
from raytune_llama.train.orchestration.elastic import watch_nodes
from raytune_llama.train.orchestration.exported_metrics import ExportedMetrics, GaugeApi
from raytune_llama.train.orchestration.failure_policy import (
    FailurePolicy,
    StartDecision,
    describe_error,
)
from raytune_llama.train.orchestration.placement_group import WorkerPlacement
from raytune_llama.train.orchestration.resources import (
    describe_used,
    find_shortage,
    wait_until_free,
)
from raytune_llama.train.orchestration.supervisor import (
    EndedBeforeStep,
    Supervisor,
    draining_nodes,
)
from raytune_llama.train.orchestration.worker import newest_step, train_worker
from raytune_llama.train.result import RunResult

if TYPE_CHECKING:
    from raytune_llama.train.config import AnyTrainConfig

logger = logging.getLogger(__name__)

MAX_STARTUP_FAILURES = 5
"""Failed starts of the workers after which Ray's trainer fails; Ray's default is unlimited."""

NEVER_SECONDS = 1e12

WITHOUT_LIMIT = -1


@dataclass(frozen=True)
class PreparedRun:
    """A run that has passed its checks and may start."""

    config: bytes
    """Pickled config; only the workers unpickle it."""

    scale: ScaleConfig
    """Workers and their resources."""

    run_dir: Place
    """Directory of the run."""

    fence: Fence | None
    """Proof of the lease, checked before publishing in the run directory; None: no other writer."""

    assignments: Any = None
    """For a pack, its `PackAssignments`; `config` is that of any of its runs. None: no pack."""

    @property
    def saved_steps(self) -> int:
        """Step of the newest checkpoint; for a pack, the sum over its runs."""
        return newest_step(self.run_dir, self.assignments)

    @classmethod
    def from_config(cls, config: "AnyTrainConfig", fence: Fence | None = None) -> Self:
        """Build the run from its config, which is pickled."""
        return cls(pickle.dumps(config), config.scale, config.run_place, fence)


def launch(run: PreparedRun, stop_signal: StopSignal | None = None) -> RunResult:
    """Run the loop on Ray Train to its end, or until it is asked to save and stop.

    Ray restarts workers that fail. This restarts what Ray does not: its own controller if that
    fails, and workers that saved and stopped to leave draining nodes or to scale up.

    Args:
        run: run to launch.
        stop_signal: what asks it to stop; None: SIGINT, SIGHUP and SIGTERM of this process.

    Raises:
        FloatingPointError: the loss or a gradient is not finite, or the workers' replicas differ.
        RetriesExhaustedError: the workers failed `scale.max_failures` times in a row without a new
            checkpoint.
        InvalidRunError: the run's data, files or settings do not allow it.
    """
    failures = FailurePolicy(run.scale.max_failures)
    api = cast("GaugeApi", ray.util.metrics)  # its defaults of None are not annotated
    exported = ExportedMetrics(api, run_label(run.run_dir))
    with stop_signal or StopSignal() as stop:
        while not stop.is_requested and wait_until_free(run.scale, stop):
            with Supervisor(run.scale, failures, run.fence, exported) as supervisor:
                stop.set_callback(supervisor.request_stop)
                result, error = _fit(run, supervisor)
            failures = supervisor.failure_policy
            reason = failures.abort_reason or (result and result.abort_reason)
            if reason is not None:
                raise reason.to_exception()
            if result is not None and (result.status == "finished" or stop.is_requested):
                return result
            decision = _decide_retry(run, failures, error)
            if stop.wait(decision.wait_seconds) or not has_room(
                run.scale, stop, has_drained=supervisor.has_drained
            ):
                break
    return RunResult("stopped", run.saved_steps)


def _fit(run: PreparedRun, supervisor: Supervisor) -> tuple[RunResult | None, Exception | None]:
    """Run Ray's trainer; return the loop's result, or the error that Ray's trainer failed with.

    Raises:
        RetriesExhaustedError: Ray starts no workers and does not end.
    """
    trainer = build_trainer(run, supervisor.channel.actor)
    logger.info(
        "starting %s%d training workers, which import PyTorch; usually takes 10 to 40 s",
        "up to " if run.scale.elastic_range else "",
        run.scale.max_workers,
    )

    def fit() -> None:
        try:
            supervisor.trainer_results.put(trainer.fit())
        except BaseException as error:  # noqa: BLE001  # raised again in the main thread
            supervisor.trainer_results.put(error)

    # Not in the main thread: there Ray would handle Ctrl-C itself, and the driver would hang with
    # Ray's controller.
    threading.Thread(target=fit, name="fit", daemon=True).start()
    try:
        with watch_nodes(
            run.scale, run.run_dir, trainer, supervisor.channel, supervisor.note_waiting_for_nodes
        ):
            result = supervisor.trainer_results.get()
    except BaseException:
        supervisor.kill_controller()
        raise
    if isinstance(result, EndedBeforeStep):
        supervisor.end_controller()
        _release_placement(run)
        return RunResult("stopped", run.saved_steps), None
    if isinstance(result, (TrainingFailedError, RayError)):
        logger.warning("Ray's trainer failed: %s", describe_error(result))
        return None, result
    if isinstance(result, BaseException):
        raise result
    # The loop's return value on rank 0; see train_worker.
    return cast("RunResult", result.return_value), None


def _decide_retry(
    run: PreparedRun, failures: FailurePolicy, error: Exception | None
) -> StartDecision:
    """Count a failure of Ray's trainer like one of the workers, and release leaked resources.

    Raises:
        RetriesExhaustedError: `scale.max_failures` is reached.
    """
    if error is not None:
        _release_placement(run)
        if _is_start_timeout(error) and describe_used(run.scale):
            logger.info("others have taken the resources of the workers first: waiting again")
        else:
            failures.record([describe_error(error)])
    decision = failures.decide(run.saved_steps)
    if decision.abort_reason is not None:
        raise decision.abort_reason.to_exception()
    return decision


def _is_start_timeout(error: Exception) -> bool:
    """Whether Ray's trainer failed because its workers got no resources."""
    cause = error.controller_failure if isinstance(error, ControllerError) else None
    return isinstance(cause, WorkerGroupStartupTimeoutError)


def _release_placement(run: PreparedRun) -> None:
    """Release what Ray leaks of a killed controller's workers."""
    placement = WorkerPlacement.read(run.run_dir)
    if placement is not None:
        placement.release()


def has_room(scale: ScaleConfig, stop: StopSignal, *, has_drained: bool) -> bool:
    """Whether the nodes that are not draining can hold the workers; waits up to `wait_seconds`.

    Args:
        scale: scale settings of the run.
        stop: stop signal that ends the wait.
        has_drained: whether nodes of the workers were drained; if not, Ray waits for nodes itself.
    """
    start = time.monotonic()
    while True:
        draining = draining_nodes()
        nodes = [node for node in ray.nodes() if node["NodeID"] not in draining]
        shortage = find_shortage(nodes, scale)
        left = start + scale.wait_seconds - time.monotonic()
        # A drained node exits once it is idle, and is then no longer listed.
        if shortage is None or not (has_drained or draining):
            return True
        if left <= 0:
            logger.warning("stopping: too few nodes remain after draining: %s", shortage)
            return False
        if stop.wait(min(resources.RESOURCE_POLL_SECONDS, left)):
            return False


def build_trainer(run: PreparedRun, channel: Any) -> TorchTrainer:  # noqa: ANN401  # an actor
    """Build Ray's trainer around the loop.

    Checkpoints are found by scanning the run directory, and none is registered with Ray: its
    snapshot file is not written atomically, and a torn one makes a run unable to resume.
    """
    scale = run.scale
    # A torn one left by any other program would fail this run too.
    (run.run_dir / "ray" / "checkpoint_manager_snapshot.json").delete()
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "config": run.config,
            "channel": channel,
            "fence": run.fence,
            "assignments": run.assignments,
        },
        torch_config=TorchConfig(
            backend="nccl" if scale.use_gpu else "gloo",
            timeout_s=int(scale.collective_timeout_seconds),
        ),
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers
            if isinstance(scale.num_workers, int)
            else (scale.num_workers.min, scale.num_workers.max),
            # Only elastic.py stops running workers to scale up.
            elastic_resize_monitor_interval_s=NEVER_SECONDS,
            use_gpu=scale.use_gpu,
            resources_per_worker=scale.worker_resources,
            placement_strategy=scale.placement.upper(),
            label_selector=scale.label_selector or None,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=run.run_dir.key,
            storage_filesystem=run.run_dir.filesystem,
            failure_config=FailureConfig(
                # The failure policy limits restarts instead; see failure_policy.py.
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
        # glibc maps and unmaps each large tensor, and zeroing its pages every time takes a quarter
        # of a small model's step. So freed memory is kept for the next step. Ray runs the loop in a
        # thread of its own, whose arena could not grow beyond 64 MiB: one arena for all.
        environment["MALLOC_ARENA_MAX"] = "1"
        environment["MALLOC_MMAP_THRESHOLD_"] = str(4 * 2**30)
        environment["MALLOC_TRIM_THRESHOLD_"] = str(8 * 2**30)
    if scale.network_interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = scale.network_interface
        environment["NCCL_SOCKET_IFNAME"] = scale.network_interface
    return environment
