"""Settings of evaluation and early stopping."""

from typing import Annotated

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings


@settings
class EvalConfig:
    """Evaluation on the token store's validation documents, before, during and after training."""

    every_steps: Annotated[int, Field(ge=1)] | None = 100
    """Optimizer steps between evaluations; null: before the first and after the last only."""

    patience: Annotated[int, Field(ge=1)] | None = None
    """Evaluations in a row without a lower loss that stop the run early; null: never."""

    max_sequences: Annotated[int, Field(ge=1)] | None = 256
    """Sequences per evaluation, in proportion to the sources' sizes, evenly spaced; null: all."""

    @model_validator(mode="after")
    def _check(self) -> "EvalConfig":
        if self.patience is not None and self.every_steps is None:
            raise ConfigError(
                [f"patience: got {self.patience}, but every_steps is null; set both, or neither"]
            )
        return self
