"""The learning rate as a pure function of the optimizer step."""

import math
from typing import Annotated, Literal

from pydantic import Field

from raytune_llama.config.settings import settings


@settings
class ScheduleConfig:
    """How the learning rate rises and falls over a run."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up; cosine and linear fall towards zero, which the step after the last
    would have."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the run's steps over which the rate rises linearly, rounded up to whole steps."""


def learning_rate_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Return the factor on the peak learning rate for one step.

    Args:
        step: the step that is about to be taken, from 0.
        num_steps: steps of the whole run.
        config: the shape.
    """
    # Less a rounding error: 7 % of 100 steps are 7 and not 8.
    num_warmup = math.ceil(config.warmup_ratio * num_steps - 1e-9)
    if step < num_warmup:
        # The first step already moves: a rate of zero would waste it.
        return (step + 1) / num_warmup
    if config.kind == "constant":
        return 1.0
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 1.0 - progress if config.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
