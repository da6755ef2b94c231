"""Handling of bad steps: steps with a non-finite loss or gradient.

A bad step updates no weight under any engine. Its cause is the text, the model or a device, not
the loss scale: if half-precision gradients overflow while the loss is finite, the scaler lowers a
scale above 1, and the step is only counted as skipped.
"""

import logging
from dataclasses import replace

from raytune_llama.data.batches.step_batches import StepBatch
from raytune_llama.train.checkpoint.layout import RunState
from raytune_llama.train.engines.config import BadStepAction, OptimConfig
from raytune_llama.train.engines.protocol import StepResult
from raytune_llama.train.process_group import ProcessGroup

logger = logging.getLogger(__name__)


def choose_action(optim: OptimConfig, state: RunState) -> BadStepAction:
    """Return the action to take on a bad step, given the state after it."""
    return "stop" if state.num_bad_in_row > optim.max_bad_steps else optim.on_bad_step


def find_suspects(
    batch: StepBatch, result: StepResult, micro_batch_sequences: int, workers: ProcessGroup
) -> set[int]:
    """Return all workers' sample positions in micro-batches with a non-finite loss; collective.

    Empty if only the gradient was not finite.
    """
    starts = [index * micro_batch_sequences for index in result.bad_micro_batches]
    mine = [p for start in starts for p in batch.positions[start : start + micro_batch_sequences]]
    return {position for each in workers.all_gather(mine) for position in each}


def stop_message(state: RunState, result: StepResult) -> str:
    """Return the error message for a bad step that ends the run."""
    return (
        f"step {state.step}: non-finite loss or gradient (summed loss {result.loss_sum}, gradient "
        f"norm {result.grad_norm}, bad steps in a row: {state.num_bad_in_row}); the run stops at "
        "its newest checkpoint. The samples of the step are in bad_steps.jsonl: fix that text, "
        "lower optim.learning_rate, use engine.precision=bf16 or fp32, or start a new run with "
        "optim.on_bad_step=skip or rollback"
    )


def check_updates(state: RunState, workers: ProcessGroup) -> None:
    """Check that a run that has ended has updated its weights; warn if some steps did not.

    Raises:
        FloatingPointError: no update is left, so that the result would be what the run began with.
    """
    counts = (
        f"{state.num_bad_steps} had a non-finite loss or gradient, {state.num_skipped_steps} "
        f"overflowed in half precision, {state.num_undone_steps} were undone by rollbacks"
    )
    if state.num_kept_steps <= 0:
        raise FloatingPointError(
            f"none of the {state.step} steps has updated the weights ({counts}): nothing was "
            "trained and no result is written. The samples of bad steps are in bad_steps.jsonl: "
            "fix the text or the model, lower optim.learning_rate, use engine.precision=bf16 or "
            "fp32, or take more steps, and start a new run"
        )
    if state.num_kept_steps < state.step and workers.is_rank_zero:
        logger.warning(
            "%d of %d steps have not updated the weights: %s",
            state.step - state.num_kept_steps,
            state.step,
            counts,
        )


def state_after_rollback(state: RunState, before: RunState) -> RunState:
    """Return the state of a run that continues after a bad step with a checkpoint's weights.

    Args:
        state: state after the bad step.
        before: state of the checkpoint.
    """
    return replace(
        state,
        # The weights have the updates that they had then.
        num_undone_steps=state.num_undone_steps + state.num_kept_steps - before.num_kept_steps,
        # Earlier than intended if that checkpoint could not be written.
        rollback_step=before.step,
        # A better step since then is undone with its weights.
        best_step=before.best_step,
        best_loss=before.best_loss,
    )
