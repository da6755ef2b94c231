"""What every worker does, step by step. Reads top to bottom; start at `train`."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from raytune_llama.data.batches import (
    BatchPlan,
    StepBatch,
    evaluation_bytes,
    num_evaluation_sequences,
    read_evaluation,
    read_steps,
)
from raytune_llama.data.encode import open_store
from raytune_llama.data.store import TokenSplit, TokenStore
from raytune_llama.model.llama import SummedLoss, load_model
from raytune_llama.model.lora import attach_adapter, load_adapter
from raytune_llama.model.loss import IGNORE
from raytune_llama.train.checkpoint import (
    RunState,
    delete_old_checkpoints,
    restore,
    save_checkpoint,
)
from raytune_llama.train.config import PretrainConfig
from raytune_llama.train.engine import DataParallelEngine, Engine, StepResult
from raytune_llama.train.export import write_result
from raytune_llama.train.metrics import EVAL_BITS_PER_BYTE, EVAL_LOSS, EVAL_PERPLEXITY
from raytune_llama.train.proofs import prove
from raytune_llama.train.report import Report
from raytune_llama.train.schedule import rate_factor
from raytune_llama.train.workers import Workers


@dataclass(frozen=True)
class Outcome:
    """How a worker's run of the loop ended."""

    status: Literal["finished", "stopped"]
    """Stopped: on request, after saving; the same command goes on."""

    step: int
    """Optimizer steps done."""


@dataclass(frozen=True)
class Session:
    """What stays the same from the first step of a start to its last."""

    config: PretrainConfig
    store: TokenStore
    plan: BatchPlan
    engine: Engine
    workers: Workers


def train(config: PretrainConfig, workers: Workers, stop_requested: Callable[[], bool]) -> Outcome:
    """Train from the newest checkpoint to the end of the run; the same call on every worker."""
    session = open_session(config, workers)
    prove(session.engine, config.engine.precision, workers, config.batch.isolate_documents)
    state = restore(config.run_place, session.engine, workers)

    with Report(config, session.plan, session.engine.module, state, workers) as report:
        if state.step == 0:
            state = evaluate(session, state, report)
        for batch in report.timed(read_batches(session, state.step)):
            num_targets, stop = workers.sum([count_targets(batch), float(stop_requested())])
            if stop:
                save(session, state, report)
                return Outcome("stopped", state.step)
            result, rate = take_step(session, batch, num_targets)
            state = report.step(state, batch, result, num_targets, rate)
            if is_due(state.step, config.eval.every_steps, session.plan.num_steps):
                state = evaluate(session, state, report)
            if wants_checkpoint(state, config, session.plan.num_steps):
                save(session, state, report)

    write_result(config, session.store, session.engine, state, workers)
    return Outcome("finished", state.step)


def open_session(config: PretrainConfig, workers: Workers) -> Session:
    """Open the token store and build the engine."""
    store = open_store(config.data)
    plan = plan_run(config, store)
    return Session(config, store, plan, build_engine(config, plan, workers), workers)


def plan_run(config: PretrainConfig, store: TokenStore) -> BatchPlan:
    """Return the order of the whole run, which depends on no worker."""
    return BatchPlan.for_split(
        store.split("train"),
        sequence_tokens=config.batch.sequence_tokens,
        sequences_per_step=config.batch.sequences_per_step,
        micro_batch_sequences=config.batch.micro_batch_sequences,
        isolate_documents=config.batch.isolate_documents,
        seed=config.seed,
        max_steps=config.max_steps,
        num_epochs=config.num_epochs,
    )


def build_engine(config: PretrainConfig, plan: BatchPlan, workers: Workers) -> Engine:
    """Load the base, attach the adapter, and only then place or partition the weights."""
    model = load_model(config.model, config.engine.precision, workers.device)
    if config.engine.gradient_checkpointing:
        # The reentrant kind needs an input that wants a gradient: frozen embeddings give none.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora is not None:
        module = SummedLoss(attach_adapter(model, config.lora, seed=config.seed))
    elif config.adapter is not None:
        module = SummedLoss(load_adapter(model, Path(config.adapter)))
    else:
        module = SummedLoss(model)
    if config.engine.zero_stage == 0:
        return DataParallelEngine(module, config.engine.precision, config.optim, workers)
    from raytune_llama.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        module,
        config.engine,
        config.optim,
        workers,
        micro_batch_sequences=plan.micro_batch_sequences,
        num_micro_batches=plan.num_micro_batches(workers.world_size),
    )


def read_batches(session: Session, start_step: int) -> Iterator[StepBatch]:
    """Stream this worker's share of each step from a step on."""
    return read_steps(
        session.store.split("train"),
        session.store.fingerprint,
        session.plan,
        rank=session.workers.rank,
        world_size=session.workers.world_size,
        start_step=start_step,
    )


def count_targets(batch: StepBatch) -> float:
    """Return the target tokens in this worker's share of a step."""
    return float(sum(int((part.labels_BT != IGNORE).sum()) for part in batch.micro_batches))


def take_step(session: Session, batch: StepBatch, num_targets: float) -> tuple[StepResult, float]:
    """Take one optimizer step; return what it did, the loss summed over workers, and its rate.

    Raises:
        FloatingPointError: the loss of the step is not finite; nothing of it is saved.
    """
    config, workers = session.config, session.workers
    factor = rate_factor(batch.step, session.plan.num_steps, config.schedule)
    rate = config.optim.learning_rate * factor
    seeds = [
        dropout_seed(config.seed, batch.step, number, workers.rank)
        for number in range(len(batch.micro_batches))
    ]
    result = session.engine.train_step(batch.micro_batches, seeds, max(num_targets, 1.0), rate)
    (loss_sum,) = workers.sum([result.loss_sum])
    if not math.isfinite(loss_sum):
        raise FloatingPointError(
            f"step {batch.step + 1}: the loss is {loss_sum}; the run stops at its newest "
            "checkpoint. Lower optim.learning_rate, or use engine.precision=bf16 or fp32"
        )
    return replace(result, loss_sum=loss_sum), rate


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Return the generator's seed for one forward pass, so that no generator state is saved."""
    digest = blake2b(f"{seed}/{step}/{micro_batch}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def evaluate(session: Session, state: RunState, report: Report) -> RunState:
    """Evaluate on the validation split, if it has any text; return the state with the best step."""
    split = session.store.split("validation")
    num_tokens = session.config.batch.sequence_tokens
    limit = session.config.eval.max_sequences
    if num_evaluation_sequences(split, num_tokens, limit) == 0:
        return state
    start = time.perf_counter()
    loss_sum, num_targets = sum_evaluation(session, split)
    values = {
        EVAL_LOSS: loss_sum / num_targets,
        EVAL_PERPLEXITY: math.exp(min(loss_sum / num_targets, 700.0)),
        EVAL_BITS_PER_BYTE: loss_sum / math.log(2) / evaluation_bytes(split, num_tokens, limit),
    }
    return report.evaluation(state, values, time.perf_counter() - start)


def sum_evaluation(session: Session, split: TokenSplit) -> list[float]:
    """Return the summed loss of the evaluated sequences, in nats, and their target tokens."""
    config, workers = session.config, session.workers
    loss_sum = num_targets = 0.0
    for batch in read_evaluation(
        split,
        sequence_tokens=config.batch.sequence_tokens,
        micro_batch_sequences=config.batch.micro_batch_sequences,
        isolate_documents=config.batch.isolate_documents,
        rank=workers.rank,
        world_size=workers.world_size,
        max_sequences=config.eval.max_sequences,
    ):
        loss_sum += session.engine.loss_sum(batch)
        num_targets += int((batch.labels_BT != IGNORE).sum())
    return workers.sum([loss_sum, num_targets])


def save(session: Session, state: RunState, report: Report) -> None:
    """Write a checkpoint and delete those that are not kept any more."""
    run_dir = session.config.run_place
    with report.saving(state.step):
        save_checkpoint(run_dir, state, session.engine, session.workers)
        delete_old_checkpoints(run_dir, session.config.checkpoint, state, session.workers)


def wants_checkpoint(state: RunState, config: PretrainConfig, num_steps: int) -> bool:
    """Whether a step is saved: at the interval, the last, and where evaluation was never better."""
    is_best = config.checkpoint.keep_best and state.best_step == state.step
    return is_best or is_due(state.step, config.checkpoint.every_steps, num_steps)


def is_due(step: int, every_steps: int | None, num_steps: int) -> bool:
    """Whether something done every so many steps, and after the last, is due after a step."""
    return step == num_steps or (every_steps is not None and step % every_steps == 0)
