"""Settings of what a run logs besides `metrics.jsonl`."""

from typing import Annotated

from pydantic import Field

from raytune_llama.config.settings import settings


@settings
class LoggingConfig:
    """What a run logs; every step is in metrics.jsonl in any case."""

    every_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between progress log lines."""

    spike_factor: Annotated[float, Field(gt=0)] | None = 8.0
    """Threshold of a loss spike, in standard deviations above the median of the steps before it.
    A spike is logged as a warning and as a line of `loss_spikes.jsonl` in the run directory, with
    the samples that the step read; training is not affected. The deviation is a robust one: 1.4826
    times the median absolute deviation. Null: no spike detection."""

    spike_window_steps: Annotated[int, Field(ge=4)] = 128
    """Number of past steps to compare a loss with; detection starts when half of them are done."""

    tensorboard: bool = True
    """Write TensorBoard event files next to metrics.jsonl."""
