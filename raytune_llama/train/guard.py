"""What a run does about a step whose loss or gradient is not finite.

Such a step moves no weight under any engine. What it met is the text's, the model's or a device's
fault, and not the loss scale's: a scale above 1 that was too large for half precision, while the
loss was finite, is lowered by its scaler, and such a step is only counted as skipped.
"""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config import ConfigError, settings
from raytune_llama.data.batches import StepBatch
from raytune_llama.train.checkpoint import RunState
from raytune_llama.train.engine import StepResult
from raytune_llama.train.workers import Workers

Answer = Literal["stop", "skip", "rollback"]
"""What is done about a bad step."""

DEFAULT_MAX_BAD_STEPS = 10


@settings
class GuardConfig:
    """Steps whose loss or gradient is not finite; they move no weight in any case."""

    on_bad_step: Answer = "stop"
    """`stop`: the run ends at its newest checkpoint. `skip`: it goes on with the next step.
    `rollback`: it goes on with the next step from the weights and moments of the newest checkpoint
    (not one of SIGTERM's), which takes back the steps since; what they read is not read again. Each
    bad step is a line of `bad_steps.jsonl` in the run directory, with the samples that it read."""

    max_bad_steps: Annotated[int, Field(ge=1)] = DEFAULT_MAX_BAD_STEPS
    """More bad steps than this in a row stop a run that skips or rolls back."""

    @model_validator(mode="after")
    def _check(self) -> "GuardConfig":
        if self.on_bad_step == "stop" and self.max_bad_steps != DEFAULT_MAX_BAD_STEPS:
            raise ConfigError(
                [
                    f"max_bad_steps: got {self.max_bad_steps}, but on_bad_step is stop, which "
                    "allows none; remove it, or set on_bad_step=skip or rollback"
                ]
            )
        return self

    def answer(self, num_in_row: int) -> Answer:
        """Return what is done about a bad step.

        Args:
            num_in_row: bad steps without a good one between them, this one included.
        """
        return "stop" if num_in_row > self.max_bad_steps else self.on_bad_step


def find_suspects(
    batch: StepBatch, result: StepResult, micro_batch_sequences: int, workers: Workers
) -> set[int]:
    """Return the positions, of all workers, in micro-batches whose loss is not finite; collective.

    There are none where only the gradient was not finite.
    """
    starts = [number * micro_batch_sequences for number in result.bad_micro_batches]
    mine = [p for start in starts for p in batch.positions[start : start + micro_batch_sequences]]
    return {position for each in workers.gather(mine) for position in each}


def stop_message(state: RunState, result: StepResult) -> str:
    """Return what is said where a bad step ends the run."""
    return (
        f"step {state.step}: the summed loss is {result.loss_sum}, the gradient norm "
        f"{result.grad_norm} (bad steps in a row: {state.num_bad_in_row}); the run stops at its "
        "newest checkpoint. What the step read is in bad_steps.jsonl: mend that text, lower "
        "optim.learning_rate, use engine.precision=bf16 or fp32, or start a run with "
        "guard.on_bad_step=skip or rollback"
    )


def rolled_back(state: RunState, before: RunState) -> RunState:
    """Return the state of a run that goes on behind a bad step with the weights of a checkpoint.

    Args:
        state: after the bad step.
        before: of the checkpoint.
    """
    return replace(
        state,
        num_undone_steps=state.num_undone_steps + state.step - 1 - before.step,
        # A better one since then is gone with its weights.
        best_step=before.best_step,
        best_loss=before.best_loss,
    )
