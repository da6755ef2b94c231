"""What every worker does, step by step. Reads top to bottom; start at `train`."""

import logging
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
from raytune_llama.model.loss import IGNORE_INDEX
from raytune_llama.train.checkpoint.layout import RunState
from raytune_llama.train.checkpoint.restore import restore, restore_step, roll_back
from raytune_llama.train.checkpoint.saver import Saver
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.engines.build import build_engine
from raytune_llama.train.engines.protocol import StepResult, TrainEngine
from raytune_llama.train.eval_config import EvalConfig
from raytune_llama.train.export import write_result
from raytune_llama.train.inputs import build_batch_plan, build_evaluation_sources, build_sources
from raytune_llama.train.monitoring.metrics import EvaluationResult, evaluation_metrics
from raytune_llama.train.monitoring.nonfinite import (
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What stays the same from the first step of a start to its last."""

    config: AnyTrainConfig
    store: TokenStore
    sources: tuple[TrainingSource, ...]
    evaluation_sources: tuple[EvaluationSource, ...]
    plan: BatchPlan
    engine: TrainEngine
    process_group: ProcessGroup

    @property
    def origins(self) -> Provenance:
        """Which text a step sees."""
        return Provenance(self.store, self.store.split("train"), self.sources, self.plan)

    @property
    def last_step(self) -> int:
        """After which the run ends, if it does not stall before."""
        return min(self.config.stop_step or self.plan.num_steps, self.plan.num_steps)


def train(
    config: AnyTrainConfig, workers: ProcessGroup, stop_requested: Callable[[], bool]
) -> RunResult:
    """Train from the newest checkpoint to the end of the run; the same call on every worker."""
    session = open_session(config, workers)
    run_self_tests(
        session.engine,
        config.engine.precision,
        workers,
        isolate_documents=config.batch.isolates_documents,
    )
    state = restore(config.run_place, session.engine, workers)

    with (
        Reporter(config, session.origins, session.engine.module, state, workers) as report,
        Saver(config.run_place, config.checkpoint, session.engine, workers, report) as saver,
    ):
        if state.step == 0:
            state = evaluate_before_training(session, state, report, saver)
        for batch in report.time_batches(read_batches(session, state.step)):
            if state.step == session.last_step or is_early_stopping_due(config.eval, state):
                break
            total, stop = reduce_step_totals(batch, stop_requested, workers)
            if stop:
                saver.save(state)
                return RunResult("stopped", state.step)
            result, rate = train_step(session, batch, total.num_targets)
            state = report.log_step(state, batch, result, total, rate)
            if result.is_bad:
                state = handle_bad_step(session, state, batch, result, report, saver=saver)
            check_replicas(session, state)
            if is_due(state.step, config.eval.every_steps, session.last_step):
                state = evaluate(session, state, report)
            if is_checkpoint_due(state, config, session.last_step):
                state = replace(state, rollback_step=state.step)
                saver.save(state)

    last, state = state, choose_result(session, state)
    mixture = summarize_mixture(session, state)
    write_result(config, session.store, session.engine, state, workers, mixture=mixture)
    return RunResult("finished", last.step)


def open_session(config: AnyTrainConfig, workers: ProcessGroup) -> Session:
    """Open the token store and build the engine."""
    store = open_store(config.data)
    sources, evaluated = build_sources(config, store), build_evaluation_sources(config, store)
    plan = build_batch_plan(config, sources)
    engine = build_engine(config, plan, workers)
    return Session(config, store, sources, evaluated, plan, engine, workers)


def read_batches(session: Session, start_step: int) -> Iterator[StepBatch]:
    """Stream this worker's share of each step from a step on."""
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
    """Return what the step takes over all workers, and whether any of them is asked to stop."""
    count = len(batch.source_sequences)
    mine = [*batch.source_sequences, *batch.source_targets, batch.num_tokens]
    numbers = workers.all_reduce_sum([*mine, float(stop_requested())])
    *counts, num_tokens = [round(number) for number in numbers[:-1]]
    total = StepTotal(tuple(counts[:count]), tuple(counts[count:]), num_tokens)
    return total, numbers[-1] > 0


def train_step(session: Session, batch: StepBatch, num_targets: int) -> tuple[StepResult, float]:
    """Take one optimizer step; return what it did, and its rate."""
    config, workers = session.config, session.process_group
    factor = learning_rate_factor(batch.step, session.plan.num_steps, config.schedule)
    rate = config.optim.learning_rate * factor
    seeds = [
        dropout_seed(config.seed, batch.step, number, workers.rank)
        for number in range(len(batch.micro_batches))
    ]
    return session.engine.train_step(batch.micro_batches, seeds, max(num_targets, 1), rate), rate


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Return the generator's seed for one forward pass, so that no generator state is saved."""
    digest = blake2b(f"{seed}/{step}/{micro_batch}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def evaluate_before_training(
    session: Session, state: RunState, report: Reporter, saver: Saver
) -> RunState:
    """Evaluate before the first step, and save where a bad step may go back; return the state."""
    state = evaluate(session, state, report)
    if session.config.optim.on_bad_step == "rollback":
        state = replace(state, rollback_step=state.step)
        saver.save(state)
    return state


def handle_bad_step(
    session: Session,
    state: RunState,
    batch: StepBatch,
    result: StepResult,
    report: Reporter,
    *,
    saver: Saver,
) -> RunState:
    """Do what the config says about a step that moved no weight; return the state; collective.

    Raises:
        FloatingPointError: the run is to stop; nothing of the step is saved.
    """
    config, workers = session.config, session.process_group
    answer = choose_action(config.optim, state)
    suspects = find_suspects(batch, result, session.plan.micro_batch_sequences, workers)
    if answer == "rollback":
        assert state.rollback_step is not None, "begin() has set it"
        saver.finish()
        before = roll_back(config.run_place, session.engine, workers, state.rollback_step)
        state = state_after_rollback(state, before)
    report.log_bad_step(state, result, answer, suspects)
    if answer == "stop":
        raise FloatingPointError(stop_message(state, result))
    return state


def check_replicas(session: Session, state: RunState) -> None:
    """Compare what all workers hold alike, where that is due.

    Raises:
        ReplicaError: a worker differs.
    """
    every = session.config.scale.compare_every_steps
    if every is not None and is_due(state.step, every, session.last_step):
        compare_replicas(state.step, session.engine.replicated_tensors(), session.process_group)


def evaluate(session: Session, state: RunState, report: Reporter) -> RunState:
    """Evaluate on the validation split, if it has any text; return the state with the best step."""
    if not session.evaluation_sources:
        return state
    start = time.perf_counter()
    with session.process_group.progress.during("evaluating"):
        values = evaluation_metrics(evaluate_sources(session, session.evaluation_sources))
    return report.log_evaluation(state, values, time.perf_counter() - start)


def evaluate_sources(
    session: Session, sources: Sequence[EvaluationSource]
) -> list[EvaluationResult]:
    """Return the summed loss of what is evaluated of each source, over all workers."""
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


def summarize_mixture(session: Session, state: RunState) -> dict[str, dict[str, Any]]:
    """Return what the run has seen of each source, by name."""
    return mixture_record(session.sources, state.source_sequences, state.source_targets)


def is_checkpoint_due(state: RunState, config: AnyTrainConfig, last_step: int) -> bool:
    """Whether a step is saved.

    At the interval, the last, where evaluation was never better, and where weights were rolled
    back: a run that dies next goes on from those too.
    """
    is_best = config.checkpoint.keep_best and state.best_step == state.step
    is_rolled_back = config.optim.on_bad_step == "rollback" and state.num_bad_in_row > 0
    return is_best or is_rolled_back or is_due(state.step, config.checkpoint.every_steps, last_step)


def is_early_stopping_due(config: EvalConfig, state: RunState) -> bool:
    """Whether the loss was no lower for so many evaluations that the run ends early."""
    if config.patience is None or config.every_steps is None or state.best_step is None:
        return False
    return state.step - state.best_step >= config.patience * config.every_steps


def choose_result(session: Session, state: RunState) -> RunState:
    """Load the best step's weights where they are to be the result; return their state."""
    config, workers = session.config, session.process_group
    best = state.best_step
    if config.checkpoint.result == "last" or best is None or best == state.step:
        return state
    if best == 0:
        logger.warning("no step was better than none: the result is that of the last one")
        return state
    return restore_step(config.run_place, session.engine, workers, best)


def is_due(step: int, every_steps: int | None, last_step: int) -> bool:
    """Whether something done every so many steps, and after the last, is due after a step."""
    return step == last_step or (every_steps is not None and step % every_steps == 0)
