"""The driver of a training run: check, prepare, launch the loop on Ray Train, summarize."""

import logging
from collections.abc import Mapping, Sequence
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
from raytune_llama.evaluate.tasks.task import EvaluationTask
from raytune_llama.storage.lease import Fence, Lease
from raytune_llama.storage.place import Place, is_submitted_job
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.control_rows import find_unseen_tokens
from raytune_llama.train.export import RUN_KEY, read_result, result_path
from raytune_llama.train.fetched_inputs import fetch_inputs
from raytune_llama.train.identity import (
    check_run,
    describe_continuation,
    identify,
    identify_evaluated,
    keep_recorded_bos,
    read_identity,
    write_identity,
)
from raytune_llama.train.inputs import (
    build_batch_plan,
    build_evaluation_sources,
    build_sources,
    build_text_sources,
    check_evaluated,
    find_horizon_warnings,
)
from raytune_llama.train.monitoring.metrics import (
    EVAL_BITS_PER_BYTE,
    EVAL_LOSS,
    EVAL_TEXT_BITS_PER_BYTE,
    MetricChange,
    describe_accuracy_change,
    describe_text_change,
    is_accuracy,
    read_change,
    read_metrics,
)
from raytune_llama.train.monitoring.plot import write_plot
from raytune_llama.train.monitoring.trackers.session import check_trackers, is_sent, track_run
from raytune_llama.train.orchestration.launch import PreparedRun, launch
from raytune_llama.train.orchestration.nodes import check_nodes
from raytune_llama.train.orchestration.resources import wait_for_resources
from raytune_llama.train.preflight import open_inputs, resolve_places
from raytune_llama.train.run_files import EVALUATED_KEY
from raytune_llama.train.texts import check_text_store, prepare_texts

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
    """Validation bits per byte at the last evaluation up to the result; NaN if not finite, as the
    others."""

    loss_before: float | None
    """Validation loss in nats per target before the first step; None without validation text."""

    loss_after: float | None
    """Validation loss in nats per target at the last evaluation up to the result."""

    text_before: float | None
    """Bits per byte of `eval.texts` before the first step; None if they were not evaluated then."""

    text_after: float | None
    """Bits per byte of `eval.texts` at the last evaluation up to the result; None without texts."""

    accuracies: Mapping[str, MetricChange]
    """Share of right answers of each benchmark of `eval.tasks`, by the name of the metric."""

    result_step: int | None = None
    """Step whose weights are the result; None without a result."""

    best_step: int | None = None
    """Step with the lowest evaluation loss; None without a result or an evaluation."""

    best_loss: float | None = None
    """Evaluation loss of `best_step`, in nats per target."""

    @property
    def evaluation_line(self) -> str | None:
        """The evaluations on one line, in bits per byte or nats; None if nothing was evaluated.

        With `eval.texts`, it says whether tuning has made them better or worse; with `eval.tasks`,
        it has the accuracies.
        """
        name, before, after = "bits per byte", self.bits_per_byte_before, self.bits_per_byte_after
        if before is None or after is None:
            name, before, after = "validation loss", self.loss_before, self.loss_after
        is_evaluated = self.status == "evaluated"
        parts: list[str] = []
        if before is not None and after is not None:
            parts.append(f"{name}: {before:.4f}" + ("" if is_evaluated else f" -> {after:.4f}"))
        if self.text_after is not None:
            text_before = None if is_evaluated else self.text_before
            parts.append(describe_text_change(text_before, self.text_after))
        for name, change in self.accuracies.items():
            start = None if is_evaluated else change.before
            parts.append(describe_accuracy_change(name, start, change.after))
        return "; ".join(parts) or None

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
    fetch_inputs(config)
    config = keep_recorded_bos(config, config.run_place)
    inputs = open_inputs(config)
    check_run(config, identify(config))
    result = read_result(config)
    if result is not None:
        _check_finished(config, inputs.data, result)
        if not is_sent(config.logging, config.run_place):
            _send_finished(config)
        return _summary(config, "already finished", _last_step(result))

    # Before Ray starts: the store may be damaged, or stale.
    open_current_store(config.encoded_data, inputs.data)
    check_text_store(config, inputs.texts)
    check_trackers(config.logging)
    with Lease(config.run_place) as lease, connect_to_ray():
        wait_for_resources(config.scale)
        store = prepare_data(config.encoded_data, inputs.data)
        texts = prepare_texts(config, inputs.texts)
        for warning in find_unseen_tokens(config, inputs.data.tokenizer, inputs.vocabulary, store):
            logger.warning("%s", warning)
        check_nodes(config)
        run = prepare_run(config, store, lease.confirm(), texts=texts, tasks=inputs.tasks)
        with track_run(config, read_identity(config.run_place)) as tracked:
            outcome = launch(run)
            assert outcome.status != "aborted", "launch raises instead"
            write_plot(config.run_place)
            is_stopped = outcome.status == "stopped"
            tracked.end("interrupted" if is_stopped else "finished", result_path(config))
    is_evaluated = outcome.status == "finished" and config.max_steps == 0
    return _summary(config, "evaluated" if is_evaluated else outcome.status, outcome.step)


def _send_finished(config: AnyTrainConfig) -> None:
    """Send a finished run to its trackers, which were down or are configured since."""
    with (
        Lease(config.run_place),
        track_run(config, read_identity(config.run_place)) as tracked,
    ):
        tracked.end("finished", result_path(config))


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


def prepare_run(
    config: AnyTrainConfig,
    store: TokenStore,
    fence: Fence,
    *,
    texts: TokenStore | None = None,
    tasks: Sequence[EvaluationTask] = (),
) -> PreparedRun:
    """Check a run against its token stores, and write its identity to its directory.

    Args:
        config: config of the run, with absolute paths.
        store: token store that the run trains on.
        fence: proof of the lease on the directory of the run, or of its sweep.
        texts: token store of `eval.texts`; None without texts.
        tasks: tasks of `eval.tasks`, with their questions.

    Raises:
        ConfigError: a store does not allow the run, or the directory belongs to another run.
    """
    _check_plan(config, store, texts)
    known = {**identify(config), "store": store.fingerprint}
    before = read_identity(config.run_place).get(EVALUATED_KEY, {})
    now = identify_evaluated(texts, tasks)
    # Texts and tasks may be added to a run or left out. Those that change are refused: their values
    # are compared with the earlier ones.
    same = {name: value for name, value in now.items() if name in before}
    check_run(config, {**known, EVALUATED_KEY: {**before, **same}} if before else known)
    write_identity(config, {**known, EVALUATED_KEY: {**before, **now}})
    return PreparedRun.from_config(config, fence)


def _check_plan(config: AnyTrainConfig, store: TokenStore, texts: TokenStore | None) -> None:
    """Refuse stores that the run can't train or evaluate on; log the mixture of its sources."""
    sources = build_sources(config, store)
    build_text_sources(config, texts)
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
    result = (read_result(config) if "finished" in status else None) or {}
    run = result.get(RUN_KEY, {})
    last_step = result.get("step", step)
    bits, loss, text = (
        read_change(records, name, last_step)
        for name in (EVAL_BITS_PER_BYTE, EVAL_LOSS, EVAL_TEXT_BITS_PER_BYTE)
    )
    return RunSummary(
        status=status,
        run_dir=run_dir,
        result=result_path(config) if "finished" in status else None,
        step=step,
        bits_per_byte_before=bits.before,
        bits_per_byte_after=bits.after,
        loss_before=loss.before,
        loss_after=loss.after,
        text_before=text.before,
        text_after=text.after,
        accuracies={
            name: read_change(records, name, last_step)
            for name in dict.fromkeys(name for record in records for name in record)
            if is_accuracy(name)
        },
        result_step=result.get("step"),
        best_step=run.get("best_step"),
        best_loss=run.get("best_loss"),
    )
