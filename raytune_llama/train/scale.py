"""What surrounds the steps: evaluation, the workers, and what is told."""

from typing import Annotated

from pydantic import Field, model_validator

from raytune_llama.config import ConfigError, settings
from raytune_llama.train.watch import WatchConfig


@settings
class EvalConfig:
    """Evaluation on the token store's validation documents, before, during and after training."""

    every_steps: Annotated[int, Field(ge=1)] | None = 100
    """Optimizer steps between evaluations; null: before the first and after the last only."""

    patience: Annotated[int, Field(ge=1)] | None = None
    """The run ends after so many evaluations in a row without a lower loss; null: never early."""

    max_sequences: Annotated[int, Field(ge=1)] | None = 256
    """Sequences evaluated: of each source its share, at even distances; null: all."""

    @model_validator(mode="after")
    def _check(self) -> "EvalConfig":
        if self.patience is not None and self.every_steps is None:
            raise ConfigError(
                [f"patience: got {self.patience}, but every_steps is null; set both, or neither"]
            )
        return self


@settings
class ScaleConfig:
    """The workers, and what Ray is asked for."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    """Training processes, one a GPU where `use_gpu`."""

    use_gpu: bool = False
    """Train on GPUs over NCCL; false: on CPUs over gloo."""

    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved for a worker, and its number of threads."""

    wait_seconds: Annotated[float, Field(ge=0)] = 0.0
    """How long an autoscaling cluster may take to bring the nodes; 0: refuse at once what the
    cluster does not have."""

    max_failures: Annotated[int, Field(ge=1)] = 3
    """Failures in a row at which the run gives up, without a new checkpoint in between; with
    progress, workers are restarted without limit. 1: at the first."""

    watch: WatchConfig | None = WatchConfig()
    """Finds and replaces workers that are alive but do not get on; null: does not."""

    collective_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """A worker that waits longer for the others fails, and the workers are restarted."""

    network_interface: str | None = None
    """Interface for gloo and NCCL, such as eth0, where hostnames resolve to a loopback address;
    null: the libraries choose."""

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        gpu = {"GPU": 1.0} if self.use_gpu else {}
        return {"CPU": float(self.cpus_per_worker), **gpu}


@settings
class LoggingConfig:
    """What a run tells while it runs; every step is in metrics.jsonl in any case."""

    every_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between progress lines."""

    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
