"""The driver of a training run: check, prepare, launch the loop on Ray Train, summarize."""

import logging
from dataclasses import dataclass
from typing import Literal

from raytune_llama.config.settings import ConfigError
from raytune_llama.connection import connect_to_ray
from raytune_llama.data.batches.mixture import log_mixture
from raytune_llama.data.build.preparation import prepare_data
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.storage.lease import Fence, Lease
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.export import read_result, result_path
from raytune_llama.train.inputs import build_batch_plan, build_evaluation_sources, build_sources
from raytune_llama.train.monitoring.metrics import EVAL_BITS_PER_BYTE, EVAL_LOSS, read_metrics
from raytune_llama.train.monitoring.plot import write_plot
from raytune_llama.train.orchestration.launch import PreparedRun, launch
from raytune_llama.train.orchestration.nodes import (
    check_nodes,
    is_submitted_job,
    wait_for_resources,
)
from raytune_llama.train.preflight import (
    check_identity,
    identify,
    open_inputs,
    resolve_places,
    write_identity,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSummary:
    """State of a run when its driver ends."""

    status: Literal["finished", "already finished", "stopped"]
    """Stopped: checkpoint saved on SIGTERM; the same command resumes the run."""

    run_dir: Place
    """Directory of the run."""

    result: Place | None
    """Adapter or model directory of a finished run; None if it was stopped."""

    step: int
    """Optimizer steps done."""

    bits_per_byte_before: float | None
    """Validation bits per byte before the first step; None without validation text."""

    bits_per_byte_after: float | None
    """Validation bits per byte at the last evaluation."""

    loss_before: float | None
    """Validation loss in nats per target before the first step; None without validation text."""

    loss_after: float | None
    """Validation loss in nats per target at the last evaluation."""


def run_training(config: AnyTrainConfig) -> RunSummary:
    """Start or resume a training run; return at its end, or once it is saved after SIGTERM.

    Raises:
        ConfigError: the config, its files or the cluster do not allow the run; raised before any
            training worker starts.
        FloatingPointError: the loss or a gradient is not finite, or the workers' replicas differ.
        RetriesExhaustedError: the workers failed `scale.max_failures` times in a row without a new
            checkpoint.
        InvalidRunError: the workers found data or files that do not allow the run.
    """
    config = resolve_places(config, in_job=is_submitted_job())
    inputs = open_inputs(config)
    check_identity(config.run_place, identify(config))
    result = read_result(config)
    if result is not None:
        return _summary(config, "already finished", result["step"])

    with Lease(config.run_place) as lease, connect_to_ray():
        wait_for_resources(config.scale)
        store = prepare_data(config.encoded_data, inputs.data)
        check_nodes(config)
        outcome = launch(prepare_run(config, store, lease.confirm()))
        assert outcome.status != "aborted", "launch raises instead"
        write_plot(config.run_place)
    return _summary(config, outcome.status, outcome.step)


def prepare_run(config: AnyTrainConfig, store: TokenStore, fence: Fence) -> PreparedRun:
    """Check a run against its token store, and write its identity to its directory.

    Args:
        config: config of the run, with absolute paths.
        store: token store that the run trains on.
        fence: proof of the lease on the directory of the run, or of its sweep.

    Raises:
        ConfigError: the store does not allow the run, or the directory belongs to another run.
    """
    _check_plan(config, store)
    known = {**identify(config), "store": store.fingerprint}
    check_identity(config.run_place, known)
    write_identity(config, known)
    return PreparedRun.from_config(config, fence)


def _check_plan(config: AnyTrainConfig, store: TokenStore) -> None:
    """Refuse a store that the run can't train or evaluate on; log the mixture of its sources."""
    sources = build_sources(config, store)
    plan = build_batch_plan(config, sources)
    if not build_evaluation_sources(config, store):
        needing = {
            "eval.patience": config.eval.patience is not None,
            "checkpoint.result": config.checkpoint.result == "best",
        }
        problems = [
            f"{field}: nothing is evaluated, since the store has no validation split; set "
            "data.validation_fraction, or remove the field"
            for field, is_set in needing.items()
            if is_set
        ]
        if problems:
            raise ConfigError(problems)
    log_mixture(sources, plan.order.shares, plan.total_positions)


def _summary(
    config: AnyTrainConfig, status: Literal["finished", "already finished", "stopped"], step: int
) -> RunSummary:
    run_dir = config.run_place
    records = read_metrics(run_dir)
    bits, losses = (
        [record[name] for record in records if record.get(name) is not None]
        for name in (EVAL_BITS_PER_BYTE, EVAL_LOSS)
    )
    return RunSummary(
        status=status,
        run_dir=run_dir,
        result=None if status == "stopped" else result_path(config),
        step=step,
        bits_per_byte_before=bits[0] if bits else None,
        bits_per_byte_after=bits[-1] if bits else None,
        loss_before=losses[0] if losses else None,
        loss_after=losses[-1] if losses else None,
    )
