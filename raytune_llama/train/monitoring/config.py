"""Settings of what a run logs besides `metrics.jsonl`."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings


@settings
class MlflowConfig:
    """An MLflow server that a run is logged to; needs the extra `mlflow`.

    Credentials come from the environment of the driver, as MLflow reads them:
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.
    """

    uri: Annotated[str, Field(pattern=r"^https?://[^/\s]+")]
    """Address of the tracking server, such as http://mlflow.internal:5000. Only the driver connects
    to it."""

    experiment: Annotated[str, Field(min_length=1)] = "raytune_llama"
    """Name of the experiment; created if it does not exist."""

    run_name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the run, of a sweep that of its parent run; null: the name of its directory."""

    @model_validator(mode="after")
    def _check(self) -> "MlflowConfig":
        if "@" in urlsplit(self.uri).netloc:
            raise ConfigError(
                [
                    "uri: contains a user name or password, which would be written to run.yaml; "
                    "remove it, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in "
                    "the environment of the driver"
                ]
            )
        return self


@settings
class WandbConfig:
    """A project of Weights & Biases that a run is logged to; needs the extra `wandb`.

    The key comes from WANDB_API_KEY in the environment of the driver or from `wandb login`, the
    address of a server of your own from WANDB_BASE_URL.
    """

    project: Annotated[str, Field(min_length=1)] = "raytune_llama"
    """Project; created if it does not exist."""

    entity: Annotated[str, Field(min_length=1)] | None = None
    """Team or user that owns the project; null: the default of the key."""

    mode: Literal["online", "offline"] = "online"
    """Offline: write to `wandb` in the run directory, which must be local; `wandb sync` uploads
    it."""

    run_name: Annotated[str, Field(min_length=1)] | None = None
    """Name of the run, of a sweep that of its group; null: the name of its directory."""


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

    mlflow: MlflowConfig | None = None
    """MLflow server to log to as well; null: none."""

    wandb: WandbConfig | None = None
    """Project of Weights & Biases to log to as well; null: none."""
