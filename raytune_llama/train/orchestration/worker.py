"""Entry point of a Ray Train worker: request admission, train, report the result."""

import logging
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray

from raytune_llama.logs import setup_logging
from raytune_llama.model.bitsandbytes_import import hide_bitsandbytes_unless
from raytune_llama.storage.place import Place
from raytune_llama.train.orchestration.channel import (
    CHANNEL_TIMEOUT_SECONDS,
    StopRequest,
    WorkerLogHandler,
)
from raytune_llama.train.orchestration.failure_policy import StartDecision
from raytune_llama.train.orchestration.heartbeat import HeartbeatSender
from raytune_llama.train.orchestration.pack_assignments import SlotLogFilter, train_pack
from raytune_llama.train.orchestration.placement_group import write_worker_placement
from raytune_llama.train.result import USER_ERRORS, AbortReason, RunResult

if TYPE_CHECKING:
    import torch

    from raytune_llama.train.config import AnyTrainConfig
    from raytune_llama.train.process_group import ProcessGroup

logger = logging.getLogger(__name__)


def train_worker(job: dict[str, Any]) -> RunResult:
    """Run the loop as a Ray Train worker; the torch process group is already initialized."""
    import ray.train.torch
    import torch

    from raytune_llama.train.process_group import ProcessGroup

    config: AnyTrainConfig = pickle.loads(job["config"])  # noqa: S301  # made by our own driver
    hide_bitsandbytes_unless(config.model.quantization)
    device = ray.train.torch.get_device() if config.scale.use_gpu else torch.device("cpu")
    if config.scale.gpus_per_worker < 1:
        # Ray only counts the shares: a trial must not take the memory of others on its GPU.
        torch.cuda.set_per_process_memory_fraction(config.scale.gpus_per_worker, device)
    workers = ProcessGroup.from_torch(device)
    torch.set_num_threads(config.scale.cpus_per_worker)
    setup_logging()
    handler = WorkerLogHandler(job["channel"], workers.rank)
    if job["assignments"] is not None:
        handler.addFilter(SlotLogFilter())
    package = logging.getLogger("raytune_llama")
    package.addHandler(handler)
    try:
        return _run_loop(config, workers, job)
    except FloatingPointError as error:
        # Every worker raises it, and a retry would again, so Ray must not restart them.
        logger.error("%s", error)  # noqa: TRY400  # the message says it all
        return RunResult("aborted", 0, _abort(job["channel"], AbortReason("diverged", str(error))))
    except USER_ERRORS as error:
        logger.exception("failed")
        reason = _abort(job["channel"], AbortReason("refused", describe_user_error(error)))
        if not unblock_other_workers(device):
            # Ray then restarts the workers, and they are refused admission.
            raise
        return RunResult("aborted", 0, reason)
    except BaseException:
        # This worker may have failed only because another has aborted the run.
        abort_reason: AbortReason | None = ray.get(
            job["channel"].abort_reason.remote(), timeout=CHANNEL_TIMEOUT_SECONDS
        )
        if abort_reason is not None:
            return RunResult("aborted", 0, abort_reason)
        # Ray restarts the workers, and shows the error only once it gives up.
        logger.exception("failed")
        raise
    finally:
        package.removeHandler(handler)


def _run_loop(config: "AnyTrainConfig", workers: "ProcessGroup", job: dict[str, Any]) -> RunResult:
    """Request admission, and train; collective."""
    from raytune_llama.train.export import read_result
    from raytune_llama.train.fetched_inputs import fetch_inputs
    from raytune_llama.train.loop import train

    channel, assignments = job["channel"], job["assignments"]
    stop = StopRequest(channel)
    decision: StartDecision | None = None
    if workers.is_rank_zero:
        step = newest_step(config.run_place, assignments)
        decision = ray.get(channel.admit.remote(step), timeout=CHANNEL_TIMEOUT_SECONDS)
    admission = workers.broadcast(decision)
    assert admission is not None, "rank 0 has set it"
    if admission.abort_reason is not None:
        return RunResult("aborted", 0, admission.abort_reason)
    if admission.attempt > 1 and workers.is_rank_zero:
        logger.info("starting attempt %d in %.0f s", admission.attempt, admission.wait_seconds)
    is_stopped = stop.wait(admission.wait_seconds)
    if workers.all_reduce_sum([float(is_stopped)])[0] > 0:
        return RunResult("stopped", newest_step(config.run_place, assignments))
    # An earlier attempt may have finished the run after Ray's controller had failed.
    is_retry = workers.is_rank_zero and admission.attempt > 1
    result = workers.broadcast(read_result(config) if is_retry else None)
    if result is not None:
        return RunResult("finished", result["step"])
    if workers.is_rank_zero:
        started = channel.workers_started.remote(workers.world_size)
        write_worker_placement(config.run_place, ray.get(started, timeout=CHANNEL_TIMEOUT_SECONDS))
    # They are on this node since its check, the tokenizer's without weights.
    fetch_inputs(config)
    workers = replace(workers, restarts=admission.attempt - 1, fence=job["fence"])
    with HeartbeatSender(channel, workers.progress, attempt=admission.attempt, rank=workers.rank):
        if assignments is not None:
            return train_pack(config, workers, stop, assignments)
        return train(config, workers, stop)


def _abort(channel: Any, reason: AbortReason) -> AbortReason:  # noqa: ANN401  # an actor
    """Abort the run; return the first reason that was reported."""
    ray.get(channel.abort.remote(reason), timeout=CHANNEL_TIMEOUT_SECONDS)
    return ray.get(channel.abort_reason.remote(), timeout=CHANNEL_TIMEOUT_SECONDS)


def unblock_other_workers(device: "torch.device") -> bool:
    """Make workers that wait for this one in a collective fail at once; False if impossible."""
    import torch.distributed as dist

    if device.type != "cpu":
        return False
    # Closes gloo's connections. DeepSpeed and FSDP derive their groups from this one.
    if dist.is_initialized():
        dist.destroy_process_group()
    return True


def describe_user_error(error: BaseException) -> str:
    """Return the message to show the user; prefixed with its type unless it is our own error."""
    is_ours = type(error).__module__.startswith("raytune_llama")
    return str(error) if is_ours else f"{type(error).__name__}: {error}"


def newest_step(run_dir: Place, assignments: Any = None) -> int:  # noqa: ANN401  # an actor
    """Return the step of the newest checkpoint, verified or not; 0 without one.

    Args:
        run_dir: directory of the run.
        assignments: for a pack, its `PackAssignments`: the steps of its runs are added up.
    """
    from raytune_llama.train.checkpoint.layout import newest_checkpoint_step

    if assignments is not None:
        folders = ray.get(assignments.run_dirs.remote(), timeout=CHANNEL_TIMEOUT_SECONDS)
        return sum(map(newest_step, folders))
    return newest_checkpoint_step(run_dir)
