"""Handling of bad steps: steps with a non-finite loss or gradient.

A bad step updates no weight under any engine. Its cause is the text, the model or a device, not
the loss scale: if half-precision gradients overflow while the loss is finite, the scaler lowers a
scale above 1, and the step is only counted as skipped.
"""

from dataclasses import replace

from raytune_llama.data.batches.step_batches import StepBatch
from raytune_llama.train.checkpoint.layout import RunState
from raytune_llama.train.engines.config import BadStepAction, OptimConfig
from raytune_llama.train.engines.protocol import StepResult
from raytune_llama.train.process_group import ProcessGroup


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


def state_after_rollback(state: RunState, before: RunState) -> RunState:
    """Return the state of a run that continues after a bad step with a checkpoint's weights.

    Args:
        state: state after the bad step.
        before: state of the checkpoint.
    """
    return replace(
        state,
        num_undone_steps=state.num_undone_steps + state.step - 1 - before.step,
        # Earlier than intended if that checkpoint could not be written.
        rollback_step=before.step,
        # A better step since then is undone with its weights.
        best_step=before.best_step,
        best_loss=before.best_loss,
    )
