"""The driver of a training run: check, prepare, launch the loop on Ray Train, summarize."""

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

from raytune_llama.config.settings import ConfigError
from raytune_llama.connection import connect_to_ray
from raytune_llama.data.batches.mixture import log_mixture
from raytune_llama.data.build.preparation import (
    DataInputs,
    describe_inputs,
    open_current_store,
    prepare_data,
)
from raytune_llama.data.store.manifest import StoreError, fingerprint_of
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.storage.lease import Fence, Lease
from raytune_llama.storage.place import Place
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.control_rows import find_unseen_tokens
from raytune_llama.train.export import RUN_KEY, read_result, result_path
from raytune_llama.train.identity import (
    check_run,
    describe_continuation,
    identify,
    keep_recorded_bos,
    write_identity,
)
from raytune_llama.train.inputs import (
    build_batch_plan,
    build_evaluation_sources,
    build_sources,
    check_evaluated,
    find_horizon_warnings,
)
from raytune_llama.train.monitoring.metrics import EVAL_BITS_PER_BYTE, EVAL_LOSS, read_metrics
from raytune_llama.train.monitoring.plot import write_plot
from raytune_llama.train.orchestration.launch import PreparedRun, launch
from raytune_llama.train.orchestration.nodes import (
    check_nodes,
    is_submitted_job,
    wait_for_resources,
)
from raytune_llama.train.preflight import open_inputs, resolve_places

logger = logging.getLogger(__name__)


RunStatus = Literal["finished", "already finished", "evaluated", "stopped"]
"""Status of a run when its driver ends. Evaluated: nothing was trained, with `max_steps: 0`.
Stopped: saved on Ctrl-C, a closed terminal or SIGTERM; the same command resumes the run."""


@dataclass(frozen=True)
class RunSummary:
    """State of a run when its driver ends."""

    status: RunStatus
    """Status of the run."""

    run_dir: Place
    """Directory of the run."""

    result: Place | None
    """Adapter or model directory of a finished run; None if it was stopped or only evaluated."""

    step: int
    """Optimizer steps done."""

    bits_per_byte_before: float | None
    """Validation bits per byte before the first step; None without validation text."""

    bits_per_byte_after: float | None
    """Validation bits per byte at the last evaluation; NaN if not finite, as the others."""

    loss_before: float | None
    """Validation loss in nats per target before the first step; None without validation text."""

    loss_after: float | None
    """Validation loss in nats per target at the last evaluation."""

    result_step: int | None = None
    """Step whose weights are the result; None without a result."""

    best_step: int | None = None
    """Step with the lowest evaluation loss; None without a result or an evaluation."""

    best_loss: float | None = None
    """Evaluation loss of `best_step`, in nats per target."""

    @property
    def evaluation_line(self) -> str | None:
        """The evaluations on one line, in bits per byte or nats; None without validation text."""
        name, before, after = "bits per byte", self.bits_per_byte_before, self.bits_per_byte_after
        if before is None or after is None:
            name, before, after = "validation loss", self.loss_before, self.loss_after
        if before is None or after is None:
            return None
        change = "" if self.status == "evaluated" else f" -> {after:.4f}"
        return f"{name}: {before:.4f}{change}"

    @property
    def result_line(self) -> str | None:
        """The result on one line, and which step it is; None without a result."""
        if self.result is None:
            return None
        facts = [] if self.result_step is None else [f"step {self.result_step}"]
        if self.best_step is not None and self.best_loss is not None:
            is_best = self.best_step == self.result_step
            best = "the best" if is_best else f"the best is step {self.best_step}"
            facts.append(f"{best}, eval/loss {self.best_loss:.4f}")
        return f"result: {self.result}" + (f" ({', '.join(facts)})" if facts else "")


def run_training(config: AnyTrainConfig) -> RunSummary:
    """Start or resume a training run; return at its end, or once it is saved after a signal.

    Raises:
        ConfigError: the config, its files or the cluster do not allow the run; raised before any
            training worker starts.
        FloatingPointError: the loss or a gradient is not finite, or the workers' replicas differ.
        RetriesExhaustedError: the workers failed `scale.max_failures` times in a row without a new
            checkpoint.
        InvalidRunError: the workers found data or files that do not allow the run.
    """
    config = resolve_places(config, in_job=is_submitted_job())
    config = keep_recorded_bos(config, config.run_place)
    inputs = open_inputs(config)
    check_run(config, identify(config))
    result = read_result(config)
    if result is not None:
        _check_finished(config, inputs.data, result)
        return _summary(config, "already finished", _last_step(result))

    # Before Ray starts: the store may be damaged, or stale.
    open_current_store(config.encoded_data, inputs.data)
    with Lease(config.run_place) as lease, connect_to_ray():
        wait_for_resources(config.scale)
        store = prepare_data(config.encoded_data, inputs.data)
        for warning in find_unseen_tokens(config, inputs.data.tokenizer, inputs.vocabulary, store):
            logger.warning("%s", warning)
        check_nodes(config)
        outcome = launch(prepare_run(config, store, lease.confirm()))
        assert outcome.status != "aborted", "launch raises instead"
        write_plot(config.run_place)
    is_evaluated = outcome.status == "finished" and config.max_steps == 0
    return _summary(config, "evaluated" if is_evaluated else outcome.status, outcome.step)


def _last_step(result: dict[str, Any]) -> int:
    """Return the last step of a finished run; its result may be that of an earlier step."""
    return result.get(RUN_KEY, {}).get("last_step", result["step"])


def _check_finished(config: AnyTrainConfig, data: DataInputs, result: dict[str, Any]) -> None:
    """Refuse to call a run finished if its result is not what the config asks for now.

    Args:
        config: config of the run.
        data: tokenizer and corpus of the run.
        result: manifest of its result.

    Raises:
        ConfigError: the data has changed since, or another step is to be the result.
    """
    run, wanted = result.get(RUN_KEY, {}), config.checkpoint.result
    step = run.get("last_step")
    if wanted == "best" and run.get("best_step"):
        step = run["best_step"]
    problems: list[str] = []
    if step is not None and step != result["step"]:
        problems.append(
            f"checkpoint.result: got {wanted}, which is step {step}, but the run is finished and "
            f"its result is step {result['step']}; delete {result_path(config)} and run the same "
            "command to export the other step, or undo the change"
        )
    described = describe_inputs(config.encoded_data, data, like=result["store"])
    if fingerprint_of(described, like=result["store"]) != result["store"]:
        problems += _describe_changed_data(config, data)
    if problems:
        raise ConfigError(problems)


def _describe_changed_data(config: AnyTrainConfig, data: DataInputs) -> list[str]:
    """Return what has changed in the data of a finished run, and the choices."""
    changed = (
        f"data.store_dir: the token store that the run was trained on is not at "
        f"{config.data.store_dir}, so that the changes cannot be listed"
    )
    try:
        open_current_store(config.encoded_data, data)
    except StoreError as error:
        changed = str(error)
    store = Place.parse(config.data.store_dir, "data.store_dir")
    new_store = {"data.store_dir": str(store.with_name(f"{store.name}-changed"))}
    return [
        f"run_dir: {config.run_place} is finished, but its data has changed since; undo the "
        "change to keep the result as it is, or set another run_dir and data.store_dir to train "
        "on the changed data from the start",
        changed,
        describe_continuation(config, "train its result on the changed data", new_store),
    ]


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
    check_run(config, known)
    write_identity(config, known)
    return PreparedRun.from_config(config, fence)


def _check_plan(config: AnyTrainConfig, store: TokenStore) -> None:
    """Refuse a store that the run can't train or evaluate on; log the mixture of its sources."""
    sources = build_sources(config, store)
    plan = build_batch_plan(config, sources)
    problems = [] if build_evaluation_sources(config, store) else check_evaluated(config)
    if problems:
        raise ConfigError(problems)
    if plan.num_steps == 0:
        return
    log_mixture(sources, plan.order.shares, plan.total_positions)
    num_sequences = sum(plan.order.source_sequences)
    for warning in find_horizon_warnings(config, plan.num_steps, num_sequences):
        logger.warning("%s", warning)


def _summary(config: AnyTrainConfig, status: RunStatus, step: int) -> RunSummary:
    run_dir = config.run_place
    records = read_metrics(run_dir)
    bits, losses = (
        [math.nan if record[name] is None else record[name] for record in records if name in record]
        for name in (EVAL_BITS_PER_BYTE, EVAL_LOSS)
    )
    result = (read_result(config) if "finished" in status else None) or {}
    run = result.get(RUN_KEY, {})
    return RunSummary(
        status=status,
        run_dir=run_dir,
        result=result_path(config) if "finished" in status else None,
        step=step,
        bits_per_byte_before=bits[0] if bits else None,
        bits_per_byte_after=bits[-1] if bits else None,
        loss_before=losses[0] if losses else None,
        loss_after=losses[-1] if losses else None,
        result_step=result.get("step"),
        best_step=run.get("best_step"),
        best_loss=run.get("best_loss"),
    )
