"""The training loop that every worker runs. Reads top to bottom; start at `train`."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from raytune_llama.data.batches.evaluation import EvaluationSource, read_evaluation_batches
from raytune_llama.data.batches.mixture import TrainingSource, mixture_record
from raytune_llama.data.batches.provenance import Provenance
from raytune_llama.data.batches.step_batches import BatchPlan, StepBatch, StepTotal, read_steps
from raytune_llama.data.store.token_store import TokenStore, open_store
from raytune_llama.logs import waiting
from raytune_llama.model.loss import IGNORE_INDEX
from raytune_llama.train.checkpoint.layout import RunState
from raytune_llama.train.checkpoint.restore import restore, restore_step, roll_back
from raytune_llama.train.checkpoint.saver import Saver
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.engines.build import build_engine
from raytune_llama.train.engines.protocol import StepResult, TrainEngine
from raytune_llama.train.eval_config import EvalConfig
from raytune_llama.train.export import write_result
from raytune_llama.train.inputs import (
    build_batch_plan,
    build_evaluation_sources,
    build_sources,
    build_text_sources,
    open_text_store,
)
from raytune_llama.train.monitoring.metrics import (
    EVAL_LOSS,
    EvaluationResult,
    evaluation_metrics,
)
from raytune_llama.train.monitoring.nonfinite import (
    check_updates,
    choose_action,
    find_suspects,
    state_after_rollback,
    stop_message,
)
from raytune_llama.train.monitoring.replica_check import compare_replicas
from raytune_llama.train.monitoring.reporter import Reporter
from raytune_llama.train.monitoring.self_test import run_self_tests
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.result import RunResult
from raytune_llama.train.schedule import learning_rate_factor
from raytune_llama.train.tasks import TaskEvaluator

logger = logging.getLogger(__name__)

EngineBuilder = Callable[[AnyTrainConfig, BatchPlan, ProcessGroup], TrainEngine]
"""Builds the engine of a run; collective."""


@dataclass(frozen=True)
class Session:
    """Everything that stays constant while the loop runs."""

    config: AnyTrainConfig
    store: TokenStore
    sources: tuple[TrainingSource, ...]
    evaluation_sources: tuple[EvaluationSource, ...]
    text_sources: tuple[EvaluationSource, ...]
    tasks: TaskEvaluator | None
    plan: BatchPlan
    engine: TrainEngine
    process_group: ProcessGroup

    @property
    def provenance(self) -> Provenance:
        """Maps a step to the source text that it trains on."""
        return Provenance(self.store, self.store.split("train"), self.sources, self.plan)

    @property
    def last_step(self) -> int:
        """Step after which the run ends, unless early stopping ends it before."""
        return min(self.config.stop_step or self.plan.num_steps, self.plan.num_steps)


def train(
    config: AnyTrainConfig,
    workers: ProcessGroup,
    stop_requested: Callable[[], bool],
    build: EngineBuilder = build_engine,
) -> RunResult:
    """Train from the newest checkpoint to the end of the run; collective.

    With `max_steps: 0`, evaluate only.

    Args:
        config: config of the run.
        workers: all workers of the run.
        stop_requested: whether the run is asked to save and stop; called once per step.
        build: builds the run's engine.

    Raises:
        FloatingPointError: the loss or gradient of a step is not finite, no step has updated the
            weights, or `max_steps` is 0 and the evaluation is not finite.
    """
    session = open_session(config, workers, build)
    run_self_tests(
        session.engine,
        config.engine.precision,
        workers,
        isolate_documents=config.batch.isolates_documents,
    )
    state = restore(config.run_place, session.engine, workers)

    with (
        Reporter(config, session.provenance, session.engine.module, state, workers) as reporter,
        Saver(config.run_place, config.checkpoint, session.engine, workers, reporter) as saver,
    ):
        if state.step == 0:
            state = evaluate_before_training(session, state, reporter, saver)
        for batch in reporter.time_batches(read_batches(session, state.step)):
            if state.step == session.last_step or is_early_stopping_due(config.eval, state):
                break
            total, stop = reduce_step_totals(batch, stop_requested, workers)
            if stop:
                saver.save(state)
                return RunResult("stopped", state.step)
            result, learning_rate = train_step(session, batch, total.num_targets)
            state = reporter.log_step(state, batch, result, total, learning_rate)
            if result.is_bad:
                state = handle_bad_step(session, state, batch, result, reporter, saver=saver)
            check_replicas(session, state)
            if is_due(state.step, config.eval.every_steps, session.last_step):
                state = evaluate(session, state, reporter)
            if is_checkpoint_due(state, config, session.last_step):
                state = replace(state, rollback_step=state.step)
                saver.save(state)

    if session.plan.num_steps == 0:
        check_evaluation(session, state)
    else:
        check_updates(state, workers)
        export_result(session, state)
    return RunResult("finished", state.step)


def open_session(
    config: AnyTrainConfig, workers: ProcessGroup, build: EngineBuilder = build_engine
) -> Session:
    """Open the token store, plan the batches and build the engine."""
    store = open_store(config.data)
    sources, evaluated = build_sources(config, store), build_evaluation_sources(config, store)
    texts = build_text_sources(config, open_text_store(config))
    plan = build_batch_plan(config, sources)
    engine = build(config, plan, workers)
    tasks = TaskEvaluator.open(config, engine, workers)
    return Session(config, store, sources, evaluated, texts, tasks, plan, engine, workers)


def read_batches(session: Session, start_step: int) -> Iterator[StepBatch]:
    """Yield this worker's share of every step, from `start_step` to the end of the plan."""
    return read_steps(
        [source.sequences for source in session.sources],
        session.store.fingerprint,
        session.plan,
        rank=session.process_group.rank,
        world_size=session.process_group.world_size,
        start_step=start_step,
    )


def reduce_step_totals(
    batch: StepBatch, stop_requested: Callable[[], bool], workers: ProcessGroup
) -> tuple[StepTotal, bool]:
    """Return the step's totals over all workers, and whether any was asked to stop; collective."""
    count = len(batch.source_sequences)
    local = [*batch.source_sequences, *batch.source_targets, batch.num_tokens]
    *sums, num_stops = workers.all_reduce_sum([*local, float(stop_requested())])
    *counts, num_tokens = [round(value) for value in sums]
    total = StepTotal(tuple(counts[:count]), tuple(counts[count:]), num_tokens)
    return total, num_stops > 0


def train_step(session: Session, batch: StepBatch, num_targets: int) -> tuple[StepResult, float]:
    """Take one optimizer step; return its result and its learning rate; collective."""
    config, workers = session.config, session.process_group
    factor = learning_rate_factor(batch.step, session.plan.num_steps, config.schedule)
    learning_rate = config.optim.learning_rate * factor
    seeds = [
        dropout_seed(config.seed, batch.step, micro_batch, workers.rank)
        for micro_batch in range(len(batch.micro_batches))
    ]
    result = session.engine.train_step(
        batch.micro_batches, seeds, max(num_targets, 1), learning_rate
    )
    return result, learning_rate


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Return the dropout seed of one forward pass; derived, so no RNG state is checkpointed."""
    digest = blake2b(f"{seed}/{step}/{micro_batch}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def evaluate_before_training(
    session: Session, state: RunState, reporter: Reporter, saver: Saver
) -> RunState:
    """Evaluate before the first step; with `on_bad_step: rollback`, save a step to roll back to."""
    state = evaluate(session, state, reporter)
    if session.config.optim.on_bad_step == "rollback" and session.last_step > 0:
        state = replace(state, rollback_step=state.step)
        saver.save(state)
    return state


def handle_bad_step(
    session: Session,
    state: RunState,
    batch: StepBatch,
    result: StepResult,
    reporter: Reporter,
    *,
    saver: Saver,
) -> RunState:
    """Apply `optim.on_bad_step` to a step whose update was skipped; return the state; collective.

    Raises:
        FloatingPointError: the action is `stop`; no checkpoint of the step is saved.
    """
    config, workers = session.config, session.process_group
    action = choose_action(config.optim, state)
    suspects = find_suspects(batch, result, session.plan.micro_batch_sequences, workers)
    if action == "rollback":
        assert state.rollback_step is not None, "set by evaluate_before_training"
        saver.finish()
        restored = roll_back(config.run_place, session.engine, workers, state.rollback_step)
        state = state_after_rollback(state, restored)
    reporter.log_bad_step(state, result, action, suspects)
    if action == "stop":
        raise FloatingPointError(stop_message(state, result))
    return state


def check_replicas(session: Session, state: RunState) -> None:
    """Compare the replicated tensors across workers, if a comparison is due.

    Raises:
        ReplicaError: a worker's replica differs.
    """
    interval = session.config.scale.compare_every_steps
    if interval is not None and is_due(state.step, interval, session.last_step):
        compare_replicas(state.step, session.engine.replicated_tensors(), session.process_group)


def evaluate(session: Session, state: RunState, reporter: Reporter) -> RunState:
    """Evaluate on the validation split, `eval.texts` and `eval.tasks`, as far as there are any.

    Returns:
        The state with the best step.
    """
    sources = (*session.evaluation_sources, *session.text_sources)
    if not sources and session.tasks is None:
        return state
    start = time.perf_counter()
    num_sequences = sum(source.num_evaluated for source in sources)
    # A forward pass takes a third of a training step's time.
    num_steps = math.ceil(num_sequences / session.plan.sequences_per_step / 3)
    what, usually = f"evaluating {num_sequences} sequences", f"as long as {num_steps} steps"
    if session.tasks is not None:
        what += f" and {session.tasks.num_questions} questions"
    with (
        session.process_group.progress.during("evaluating"),
        waiting(logger, what, usually=usually),
    ):
        values = evaluation_metrics(evaluate_sources(session, session.evaluation_sources))
        values |= evaluation_metrics(evaluate_sources(session, session.text_sources), "eval/text")
        if session.tasks is not None and are_tasks_due(session, state, values.get(EVAL_LOSS)):
            values |= session.tasks.evaluate()
    if not values:
        return state
    return reporter.log_evaluation(state, values, time.perf_counter() - start)


def are_tasks_due(session: Session, state: RunState, loss: float | None) -> bool:
    """Whether an evaluation includes `eval.tasks`: every n-th does, the first and the last.

    Args:
        session: session of the run.
        state: state before the evaluation.
        loss: evaluation loss, after which early stopping may end the run; None: there is none.
    """
    config = session.config.eval
    is_last = state.step == session.last_step or is_early_stopping_due(
        config, state.with_loss(loss)
    )
    interval = (config.every_steps or session.last_step) * config.tasks_every
    return is_last or state.step % interval == 0


def evaluate_sources(
    session: Session, sources: Sequence[EvaluationSource]
) -> list[EvaluationResult]:
    """Return the loss of each source, summed over all workers; collective."""
    if not sources:
        return []
    workers = session.process_group
    sums: list[float] = []
    for source in sources:
        loss_sum = num_targets = 0.0
        for batch in read_evaluation_batches(
            source,
            micro_batch_sequences=session.config.batch.micro_batch_sequences,
            rank=workers.rank,
            world_size=workers.world_size,
        ):
            workers.progress.enter_phase("evaluating")
            loss_sum += session.engine.loss_sum(batch)
            num_targets += int((batch.labels_BT != IGNORE_INDEX).sum())
        sums += [loss_sum, num_targets]
    totals = workers.all_reduce_sum(sums)
    return [
        EvaluationResult(source.name, loss_sum, round(num_targets), source.num_bytes)
        for source, loss_sum, num_targets in zip(sources, totals[::2], totals[1::2], strict=True)
    ]


def export_result(session: Session, last: RunState) -> None:
    """Write the result of the run, of its best or its last step; collective."""
    state = choose_result(session, last)
    mixture = summarize_mixture(session, state)
    write_result(
        session.config,
        session.store,
        session.engine,
        state,
        session.process_group,
        mixture=mixture,
        last=last,
    )


def summarize_mixture(session: Session, state: RunState) -> dict[str, dict[str, Any]]:
    """Return what the run has trained on, by source name."""
    return mixture_record(session.sources, state.source_sequences, state.source_targets)


def is_checkpoint_due(state: RunState, config: AnyTrainConfig, last_step: int) -> bool:
    """Whether to save after this step.

    True at the interval, after the last step, after a new best evaluation, and after a rollback, so
    that a restart resumes from the rolled-back weights.
    """
    is_best = config.checkpoint.keep_best and state.best_step == state.step
    is_rolled_back = config.optim.on_bad_step == "rollback" and state.num_bad_in_row > 0
    return is_best or is_rolled_back or is_due(state.step, config.checkpoint.every_steps, last_step)


def is_early_stopping_due(config: EvalConfig, state: RunState) -> bool:
    """Whether early stopping triggers: `patience` evaluations without a lower loss."""
    if config.patience is None or config.every_steps is None or state.best_step is None:
        return False
    return state.step - state.best_step >= config.patience * config.every_steps


def check_evaluation(session: Session, state: RunState) -> None:
    """Check the only evaluation of a run that trains nothing.

    Raises:
        FloatingPointError: its loss is not finite.
    """
    if session.evaluation_sources and state.best_loss is None:
        raise FloatingPointError(
            "the evaluation's loss is not finite: check the weights of model.path and of the "
            "adapter, or use engine.precision=bf16 or fp32"
        )


def choose_result(session: Session, state: RunState) -> RunState:
    """Load the best step's weights if `checkpoint.result` is `best`; return the result's state."""
    config, workers = session.config, session.process_group
    best, is_best_wanted = state.best_step, config.checkpoint.result == "best"
    if workers.is_rank_zero:
        log_choice(state, is_best_wanted=is_best_wanted)
    if not is_best_wanted or best is None or best in {0, state.step}:
        return state
    return restore_step(config.run_place, session.engine, workers, best)


def log_choice(state: RunState, *, is_best_wanted: bool) -> None:
    """Log which step's weights are the result, and which step has the lowest loss."""
    best, loss = state.best_step, state.best_loss
    if best is None:
        logger.info("the result is step %d, the last; nothing was evaluated", state.step)
    elif best == state.step:
        logger.info("the result is step %d, the last and best (eval/loss %.4f)", best, loss)
    elif best == 0:
        logger.warning(
            "no evaluation is below the one before the first step (eval/loss %.4f): the result is "
            "step %d, the last",
            loss,
            state.step,
        )
    elif is_best_wanted:
        logger.info(
            "the result is step %d, the best (eval/loss %.4f), not the last, step %d",
            best,
            loss,
            state.step,
        )
    else:
        logger.info(
            "the result is step %d, the last; step %d has the lowest eval/loss, %.4f, and is the "
            "result with checkpoint.result=best",
            state.step,
            best,
            loss,
        )


def is_due(step: int, every_steps: int | None, last_step: int) -> bool:
    """Whether `step` is the last one or a multiple of `every_steps` (None: only the last)."""
    return step == last_step or (every_steps is not None and step % every_steps == 0)
