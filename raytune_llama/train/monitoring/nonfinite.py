"""What a run does about a step whose loss or gradient is not finite.

Such a step moves no weight under any engine. What it met is the text's, the model's or a device's
fault, and not the loss scale's: a scale above 1 that was too large for half precision, while the
loss was finite, is lowered by its scaler, and such a step is only counted as skipped.
"""

from dataclasses import replace

from raytune_llama.data.batches.step_batches import StepBatch
from raytune_llama.train.checkpoint.layout import RunState
from raytune_llama.train.engines.optimizer import BadStepAction, OptimConfig
from raytune_llama.train.engines.protocol import StepResult
from raytune_llama.train.process_group import ProcessGroup


def choose_action(optim: OptimConfig, state: RunState) -> BadStepAction:
    """Return what is done about a bad step, by the state after it."""
    return "stop" if state.num_bad_in_row > optim.max_bad_steps else optim.on_bad_step


def find_suspects(
    batch: StepBatch, result: StepResult, micro_batch_sequences: int, workers: ProcessGroup
) -> set[int]:
    """Return the positions, of all workers, in micro-batches whose loss is not finite; collective.

    There are none where only the gradient was not finite.
    """
    starts = [number * micro_batch_sequences for number in result.bad_micro_batches]
    mine = [p for start in starts for p in batch.positions[start : start + micro_batch_sequences]]
    return {position for each in workers.all_gather(mine) for position in each}


def stop_message(state: RunState, result: StepResult) -> str:
    """Return what is said where a bad step ends the run."""
    return (
        f"step {state.step}: the summed loss is {result.loss_sum}, the gradient norm "
        f"{result.grad_norm} (bad steps in a row: {state.num_bad_in_row}); the run stops at its "
        "newest checkpoint. What the step read is in bad_steps.jsonl: mend that text, lower "
        "optim.learning_rate, use engine.precision=bf16 or fp32, or start a run with "
        "optim.on_bad_step=skip or rollback"
    )


def state_after_rollback(state: RunState, before: RunState) -> RunState:
    """Return the state of a run that goes on behind a bad step with the weights of a checkpoint.

    Args:
        state: after the bad step.
        before: of the checkpoint.
    """
    return replace(
        state,
        num_undone_steps=state.num_undone_steps + state.step - 1 - before.step,
        # An earlier one than was meant, where that could not be written.
        rollback_step=before.step,
        # A better one since then is gone with its weights.
        best_step=before.best_step,
        best_loss=before.best_loss,
    )
