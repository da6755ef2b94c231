"""Hand a run to Ray Train, and wait for it.

What starts a run needs no model: only the workers import what a config is made of. A process that
starts runs and nothing else, as a sweep's trials have, is there in a third of the time.
"""

import contextlib
import logging
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, cast

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raytune_llama.logs import setup_logging
from raytune_llama.storage import Place
from raytune_llama.train.channel import Channel, StopRequest, WorkerHandler
from raytune_llama.train.outcome import Outcome
from raytune_llama.train.scale import ScaleConfig

if TYPE_CHECKING:
    from raytune_llama.train.config import AnyTrainConfig

logger = logging.getLogger(__name__)

STARTUP_FAILURES = 5
"""Attempts of Ray to start the workers; its own default is without end."""


@dataclass(frozen=True)
class Launch:
    """A run that was checked and may start."""

    config: bytes
    """The pickled config, for the workers alone."""

    scale: ScaleConfig
    """The workers, and what Ray is asked for."""

    run_dir: Place
    """Of the run."""

    @classmethod
    def of(cls, config: "AnyTrainConfig") -> Self:
        """Pack a config."""
        return cls(pickle.dumps(config), config.scale, config.run_place)


def launch(run: Launch) -> Outcome:
    """Run the loop on Ray Train to its end, or until SIGTERM.

    Raises:
        FloatingPointError: a number of the run is no longer finite.
        ray.train.TrainingFailedError: the workers failed more often than `scale.max_failures`.
    """
    channel = Channel()
    try:
        with _signals(channel):
            result = build_trainer(run, channel.actor).fit()
    finally:
        channel.close()
    # What the loop returned on the first worker; see train_worker.
    outcome = cast("Outcome", result.return_value)
    if outcome.status == "diverged":
        raise FloatingPointError(outcome.cause)
    return outcome


def build_trainer(run: Launch, channel: Any) -> TorchTrainer:  # noqa: ANN401  # an actor
    """Build Ray's trainer around the loop.

    Checkpoints are our own and are found by scanning the run directory, so none is registered
    with Ray: its snapshot file is not written atomically, and a torn one ends a run for good.
    """
    scale = run.scale
    # Left by whatever other program, a torn one would end this run too.
    (run.run_dir / "ray" / "checkpoint_manager_snapshot.json").delete()
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": run.config, "channel": channel},
        torch_config=TorchConfig(
            backend="nccl" if scale.use_gpu else "gloo",
            timeout_s=int(scale.collective_timeout_seconds),
        ),
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers,
            use_gpu=scale.use_gpu,
            resources_per_worker=scale.worker_resources,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=run.run_dir.key,
            storage_filesystem=run.run_dir.filesystem,
            failure_config=FailureConfig(
                max_failures=scale.max_failures, controller_failure_limit=STARTUP_FAILURES
            ),
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


def train_worker(job: dict[str, Any]) -> Outcome:
    """Run the loop as one of Ray Train's workers; the process group is there already."""
    import ray.train.torch
    import torch

    from raytune_llama.train.loop import train
    from raytune_llama.train.workers import Workers

    config: AnyTrainConfig = pickle.loads(job["config"])  # noqa: S301  # made by our own driver
    device = ray.train.torch.get_device() if config.scale.use_gpu else torch.device("cpu")
    workers = Workers.of_process_group(device)
    torch.set_num_threads(config.scale.cpus_per_worker)
    setup_logging()
    handler = WorkerHandler(job["channel"], workers.rank)
    package = logging.getLogger("raytune_llama")
    package.addHandler(handler)
    try:
        outcome = train(config, workers, StopRequest(job["channel"]))
    except FloatingPointError as error:
        # Every worker finds it, and would again: Ray is not to restart them.
        logger.error("%s", error)  # noqa: TRY400  # the message says it all
        return Outcome("diverged", 0, str(error))
    except BaseException:
        # Ray restarts the workers and shows an error only once it gives up.
        logger.exception("failed")
        raise
    finally:
        package.removeHandler(handler)
    return outcome


@contextlib.contextmanager
def _signals(channel: Channel) -> Iterator[None]:
    """Let SIGTERM save and stop the run; entered after Ray has set its own handler.

    Ray's trainer lets SIGINT abort the run, and leaves that handler behind: Ctrl-C would then do
    nothing in whatever the process does next.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # Python's signature
        # Logging could wait for a lock that the interrupted code holds.
        os.write(2, b"SIGTERM: saving a checkpoint after this step, then stopping\n")
        channel.request_stop()

    before = signal.signal(signal.SIGTERM, handle)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)
