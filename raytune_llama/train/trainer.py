"""The driver of a training run: check, prepare, hand the loop to Ray Train, sum up."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raytune_llama.config import ConfigError
from raytune_llama.connection import connected
from raytune_llama.data.encode import prepare_data
from raytune_llama.data.mixture import log_mixture
from raytune_llama.data.store import TokenStore
from raytune_llama.logs import setup_logging
from raytune_llama.storage import Place
from raytune_llama.train.channel import Channel, StopRequest, WorkerHandler
from raytune_llama.train.cluster import (
    check_nodes,
    in_submitted_job,
    wait_for_resources,
    worker_resources,
)
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.export import read_result, result_path
from raytune_llama.train.loop import Outcome, build_evaluation, build_sources, plan_run, train
from raytune_llama.train.metrics import EVAL_BITS_PER_BYTE, EVAL_LOSS, read_metrics
from raytune_llama.train.plot import write_plot
from raytune_llama.train.preflight import (
    check_identity,
    check_run,
    identify,
    resolve_places,
    write_identity,
)
from raytune_llama.train.scale import ScaleConfig
from raytune_llama.train.workers import Workers

logger = logging.getLogger(__name__)

STARTUP_FAILURES = 5
"""Attempts of Ray to start the workers; its own default is without end."""


@dataclass(frozen=True)
class Summary:
    """A run as it stands when its driver ends."""

    status: Literal["finished", "already finished", "stopped"]
    """Stopped: saved on SIGTERM; the same command goes on."""

    run_dir: Place
    """Where everything of the run lies."""

    result: Place | None
    """The adapter or model directory of a finished run."""

    step: int
    """Optimizer steps done."""

    bits_per_byte_before: float | None
    """Of the validation text before the first step, where there is any."""

    bits_per_byte_after: float | None
    """At the last evaluation."""

    loss_before: float | None
    """Of the validation targets before the first step, where there are any."""

    loss_after: float | None
    """At the last evaluation."""


def run_training(config: AnyTrainConfig) -> Summary:
    """Run or go on with a training run, to its end or until SIGTERM.

    Raises:
        ConfigError: the config, its files or the cluster do not allow the run; found before any
            training worker starts.
        ray.train.TrainingFailedError: the workers failed more often than `scale.max_failures`.
    """
    config = resolve_places(config, in_job=in_submitted_job())
    check_run(config)
    run_dir = config.run_place
    identity = identify(config)
    check_identity(run_dir, identity)
    result = read_result(config)
    if result is not None:
        return _summary(config, "already finished", result["step"])

    with connected():
        wait_for_resources(config.scale)
        store = prepare_data(config.encoded_data, Path(config.model.tokenizer_path))
        _check_plan(config, store)
        identity["store"] = store.fingerprint
        check_identity(run_dir, identity)
        check_nodes(config)
        write_identity(config, identity)
        outcome = _fit(config)
    write_plot(run_dir)
    return _summary(config, outcome.status, outcome.step)


def _check_plan(config: AnyTrainConfig, store: TokenStore) -> None:
    """Refuse a store that the run can't be trained or evaluated on; log what it will see of it."""
    sources = build_sources(config, store)
    plan = plan_run(config, sources)
    if not build_evaluation(config, store):
        needing = {
            "eval.patience": config.eval.patience is not None,
            "checkpoint.result": config.checkpoint.result == "best",
        }
        problems = [
            f"{field}: nothing is evaluated, since the store has no validation split; set "
            "data.validation_fraction, or leave the field out"
            for field, is_set in needing.items()
            if is_set
        ]
        if problems:
            raise ConfigError(problems)
    log_mixture(sources, plan.order.shares, plan.total_positions)


def _fit(config: AnyTrainConfig) -> Outcome:
    channel = Channel()
    try:
        with _signals(channel):
            result = build_trainer(config, channel.actor).fit()
    finally:
        channel.close()
    # What the loop returned on the first worker; see train_worker.
    return cast("Outcome", result.return_value)


def build_trainer(config: AnyTrainConfig, channel: Any) -> TorchTrainer:  # noqa: ANN401  # an actor
    """Build Ray's trainer around the loop.

    Checkpoints are our own and are found by scanning the run directory, so none is registered
    with Ray: its snapshot file is not written atomically, and a torn one ends a run for good.
    """
    scale = config.scale
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": config, "channel": channel},
        torch_config=TorchConfig(
            backend="nccl" if scale.use_gpu else "gloo",
            timeout_s=int(scale.collective_timeout_seconds),
        ),
        scaling_config=ScalingConfig(
            num_workers=scale.num_workers,
            use_gpu=scale.use_gpu,
            resources_per_worker=worker_resources(scale),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=config.run_place.key,
            storage_filesystem=config.run_place.filesystem,
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

    config: AnyTrainConfig = job["config"]
    device = ray.train.torch.get_device() if config.scale.use_gpu else torch.device("cpu")
    workers = Workers.of_process_group(device)
    torch.set_num_threads(config.scale.cpus_per_worker)
    setup_logging()
    handler = WorkerHandler(job["channel"], workers.rank)
    package = logging.getLogger("raytune_llama")
    package.addHandler(handler)
    try:
        outcome = train(config, workers, StopRequest(job["channel"]))
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


def _summary(
    config: AnyTrainConfig, status: Literal["finished", "already finished", "stopped"], step: int
) -> Summary:
    run_dir = config.run_place
    records = read_metrics(run_dir)
    bits, losses = (
        [record[name] for record in records if record.get(name) is not None]
        for name in (EVAL_BITS_PER_BYTE, EVAL_LOSS)
    )
    return Summary(
        status=status,
        run_dir=run_dir,
        result=None if status == "stopped" else result_path(config),
        step=step,
        bits_per_byte_before=bits[0] if bits else None,
        bits_per_byte_after=bits[-1] if bits else None,
        loss_before=losses[0] if losses else None,
        loss_after=losses[-1] if losses else None,
    )
