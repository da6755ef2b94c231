"""When checkpoints are saved, and which are kept."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings


@settings
class CheckpointConfig:
    """When checkpoints are saved, and which are kept."""

    every_steps: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps between checkpoints. Another one is saved at the end, and when the run is
    stopped by Ctrl-C, a closed terminal or SIGTERM."""

    keep_last: Annotated[int, Field(ge=1)] = 2
    """Number of newest checkpoints to keep."""

    background: bool = True
    """Write checkpoints from a copy of the state in host memory while training continues. False:
    training waits until they are written, without a copy."""

    max_failed_saves: Annotated[int, Field(ge=1)] = 3
    """Number of consecutive failed saves (a full disk, say) that ends the run; until then the next
    due step tries again. The last checkpoint of the run must be written."""

    keep_best: bool = True
    """Also save and keep the step with the lowest `eval/loss`."""

    result: Literal["last", "best"] = "last"
    """Weights to export as the result of the run: those of its last step or of the best one. The
    log, the job's last line and the result's manifest name the best step and its loss."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.result == "best" and not self.keep_best:
            raise ConfigError(
                ["result: got best, but keep_best is false; set keep_best=true, or result=last"]
            )
        return self
