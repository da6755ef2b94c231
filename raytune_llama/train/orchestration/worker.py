"""What one of Ray Train's workers does: ask for leave to start, train, and tell how it ended."""

import logging
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from raytune_llama.logs import setup_logging
from raytune_llama.storage.lease import Fence
from raytune_llama.storage.place import Place
from raytune_llama.train.orchestration.channel import (
    CHANNEL_TIMEOUT_SECONDS,
    StopRequest,
    WorkerLogHandler,
)
from raytune_llama.train.orchestration.failure_policy import StartDecision
from raytune_llama.train.orchestration.heartbeat import HeartbeatSender
from raytune_llama.train.orchestration.placement_group import write_worker_placement
from raytune_llama.train.result import AbortReason, RunResult

if TYPE_CHECKING:
    import torch

    from raytune_llama.train.config import AnyTrainConfig
    from raytune_llama.train.process_group import ProcessGroup

logger = logging.getLogger(__name__)

USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)
"""What another attempt would find again: of the data, the files and the config. All else may be the
machines' fault."""


def train_worker(job: dict[str, Any]) -> RunResult:
    """Run the loop as one of Ray Train's workers; the process group is there already."""
    import ray.train.torch
    import torch

    from raytune_llama.train.process_group import ProcessGroup

    config: AnyTrainConfig = pickle.loads(job["config"])  # noqa: S301  # made by our own driver
    device = ray.train.torch.get_device() if config.scale.use_gpu else torch.device("cpu")
    workers = ProcessGroup.from_torch(device)
    torch.set_num_threads(config.scale.cpus_per_worker)
    setup_logging()
    handler = WorkerLogHandler(job["channel"], workers.rank)
    package = logging.getLogger("raytune_llama")
    package.addHandler(handler)
    try:
        return _run_loop(config, workers, job["channel"], job["fence"])
    except FloatingPointError as error:
        # Every worker finds it, and would again: Ray is not to restart them.
        logger.error("%s", error)  # noqa: TRY400  # the message says it all
        return RunResult("aborted", 0, _abort(job["channel"], AbortReason("diverged", str(error))))
    except USER_ERRORS as error:
        logger.exception("failed")
        mistake = _abort(job["channel"], AbortReason("refused", describe_user_error(error)))
        if not unblock_other_workers(device):
            # Ray then restarts them, and they are told not to start.
            raise
        return RunResult("aborted", 0, mistake)
    except BaseException:
        # What another worker has found may be why this one fails.
        ending: AbortReason | None = ray.get(
            job["channel"].abort_reason.remote(), timeout=CHANNEL_TIMEOUT_SECONDS
        )
        if ending is not None:
            return RunResult("aborted", 0, ending)
        # Ray restarts the workers and shows an error only once it gives up.
        logger.exception("failed")
        raise
    finally:
        package.removeHandler(handler)


def _run_loop(
    config: "AnyTrainConfig",
    workers: "ProcessGroup",
    channel: Any,  # noqa: ANN401  # an actor
    fence: Fence | None,
) -> RunResult:
    """Ask for leave to start, and train; the same on every worker."""
    from raytune_llama.train.export import read_result
    from raytune_llama.train.loop import train

    stop = StopRequest(channel)
    answer: StartDecision | None = None
    if workers.is_rank_zero:
        step = newest_step(config.run_place)
        answer = ray.get(channel.admit.remote(step), timeout=CHANNEL_TIMEOUT_SECONDS)
    admission = workers.broadcast(answer)
    assert admission is not None, "it is the first worker's"
    if admission.abort_reason is not None:
        return RunResult("aborted", 0, admission.abort_reason)
    if admission.attempt > 1 and workers.is_rank_zero:
        logger.info("start %d of the workers, in %.0f s", admission.attempt, admission.wait_seconds)
    is_stopped = stop.wait(admission.wait_seconds)
    if workers.all_reduce_sum([float(is_stopped)])[0] > 0:
        return RunResult("stopped", newest_step(config.run_place))
    # Workers before these may have ended the run when Ray's controller could not hear it any more.
    is_again = workers.is_rank_zero and admission.attempt > 1
    result = workers.broadcast(read_result(config) if is_again else None)
    if result is not None:
        return RunResult("finished", result["step"])
    if workers.is_rank_zero:
        started = channel.workers_started.remote(workers.world_size)
        write_worker_placement(config.run_place, ray.get(started, timeout=CHANNEL_TIMEOUT_SECONDS))
    workers = replace(workers, restarts=admission.attempt - 1, fence=fence)
    with HeartbeatSender(channel, workers.progress, attempt=admission.attempt, rank=workers.rank):
        return train(config, workers, stop)


def _abort(channel: Any, ending: AbortReason) -> AbortReason:  # noqa: ANN401  # an actor
    """Let no worker be started again; return the first reason."""
    ray.get(channel.abort.remote(ending), timeout=CHANNEL_TIMEOUT_SECONDS)
    return ray.get(channel.abort_reason.remote(), timeout=CHANNEL_TIMEOUT_SECONDS)


def unblock_other_workers(device: "torch.device") -> bool:
    """Let workers that wait for this one in a collective fail at once, where that can be done."""
    import torch.distributed as dist

    if device.type != "cpu":
        return False
    # Closes gloo's connections. DeepSpeed and FSDP make their groups of this one.
    if dist.is_initialized():
        dist.destroy_process_group()
    return True


def describe_user_error(error: BaseException) -> str:
    """Return what a user reads: a message of ours says all, others lack the kind of the error."""
    is_ours = type(error).__module__.startswith("raytune_llama")
    return str(error) if is_ours else f"{type(error).__name__}: {error}"


def newest_step(run_dir: Place) -> int:
    """Return the step of the newest checkpoint, trusted or not; 0 without one."""
    from raytune_llama.train.checkpoint.layout import list_checkpoints

    steps = [int(path.name.rpartition("-")[2]) for path in list_checkpoints(run_dir)]
    return max(steps, default=0)
