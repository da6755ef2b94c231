"""The learning rate as a pure function of the optimizer step."""

import math
from typing import Annotated, Literal

from pydantic import Field

from raytune_llama.config.settings import settings


@settings
class ScheduleConfig:
    """Learning rate schedule: linear warm-up, then decay."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up; cosine and linear decay toward zero, which would be reached one step
    after the last."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the run's steps with linear warm-up, rounded up to a number of steps."""


def count_warmup_steps(num_steps: int, config: ScheduleConfig) -> int:
    """Return the number of warm-up steps of a full run of `num_steps`."""
    # Minus a rounding error: 7 % of 100 steps is 7, not 8.
    return math.ceil(config.warmup_ratio * num_steps - 1e-9)


def learning_rate_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Return the factor on the peak learning rate at a step.

    Args:
        step: the step that is about to be taken, from 0.
        num_steps: steps of the full run.
        config: schedule settings.
    """
    num_warmup = count_warmup_steps(num_steps, config)
    if step < num_warmup:
        # Not step / num_warmup: a rate of zero would waste the first step.
        return (step + 1) / num_warmup
    if config.kind == "constant":
        return 1.0
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 1.0 - progress if config.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
