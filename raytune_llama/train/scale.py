"""What surrounds the steps: evaluation, the workers, and what is told."""

from typing import Annotated, cast

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
class WorkerRange:
    """The numbers of workers that an elastic run trains on, as nodes come and go."""

    min: Annotated[int, Field(ge=1)]
    """With fewer than these the run waits for nodes."""

    max: Annotated[int, Field(ge=1)]
    """More are never started."""

    grow_seconds: Annotated[float, Field(ge=0)] = 30.0
    """How long there has to be room for more workers before the run is saved, and goes on with
    them; so that a node that comes and goes costs nothing."""

    @model_validator(mode="after")
    def _check(self) -> "WorkerRange":
        if self.max < self.min:
            raise ConfigError([f"max: got {self.max}, wanted at least min, {self.min}"])
        return self


@settings
class ScaleConfig:
    """The workers, and what Ray is asked for."""

    num_workers: Annotated[int, Field(ge=1)] | WorkerRange = 1
    """Training processes, one a GPU where `use_gpu`. `{min: 1, max: 8}`: as many of these as the
    nodes hold; the run goes on with fewer when nodes are lost, and with more when they return. No
    number changes what a step computes."""

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

    compare_every_steps: Annotated[int, Field(ge=1)] | None = 100
    """Optimizer steps between comparisons of what all workers hold alike, which end a run whose
    workers differ: all weights under ddp and ZeRO 1 and 2; under fsdp and ZeRO 3 nothing is alike.
    Also after the last step. Where it divides `checkpoint.every_steps`, no other weights are saved.
    Null: never."""

    network_interface: str | None = None
    """Interface for gloo and NCCL, such as eth0, where hostnames resolve to a loopback address;
    null: the libraries choose."""

    @property
    def elastic(self) -> WorkerRange | None:
        """The numbers of workers where there may be several; None: there is one."""
        return self.num_workers if isinstance(self.num_workers, WorkerRange) else None

    @property
    def fewest_workers(self) -> int:
        """Without which the run does not train."""
        return self.elastic.min if self.elastic else cast("int", self.num_workers)

    @property
    def most_workers(self) -> int:
        """That the run ever has."""
        return self.elastic.max if self.elastic else cast("int", self.num_workers)

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

    spike_factor: Annotated[float, Field(gt=0)] | None = 8.0
    """A step whose loss is more than so many standard deviations above the median of the steps
    before it is a line of `loss_spikes.jsonl` in the run directory, with the samples that it read,
    and a warning; training is the same. The deviation is a robust one: 1.4826 times the median
    absolute deviation. Null: none."""

    spike_window_steps: Annotated[int, Field(ge=4)] = 128
    """Steps that say what loss is usual; none is judged before half of them are done."""

    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
