"""What a run logs beside `metrics.jsonl`."""

from typing import Annotated

from pydantic import Field

from raytune_llama.config.settings import settings


@settings
class LoggingConfig:
    """What a run tells while it runs; every step is in metrics.jsonl in any case."""

    every_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between progress lines."""

    spike_factor: Annotated[float, Field(gt=0)] | None = 8.0
    """A step whose loss is more than so many standard deviations above the median of the steps
    before it is a line of `loss_spikes.jsonl` in the run directory, with the samples that it read,
    and a warning; training is the same. The deviation is a robust one: 1.4826 times the median
    absolute deviation. Null: none."""

    spike_window_steps: Annotated[int, Field(ge=4)] = 128
    """Steps that say what loss is usual; none is judged before half of them are done."""

    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
