"""Settings of a run's workers: number, resources, restarts and stall detection."""

from typing import Annotated, cast

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings


@settings
class StallDetectorConfig:
    """When a worker without progress counts as hung, and is killed and restarted."""

    min_seconds: Annotated[float, Field(gt=0)] = 120.0
    """Minimum timeout of a training step, in seconds."""

    factor: Annotated[float, Field(gt=1)] = 10.0
    """Timeout of a training step, as a multiple of the slowest recent step."""

    slow_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """Timeout in seconds of everything else: loading and the first step, evaluation, saving,
    exporting the result, and Ray's start of the workers."""


@settings
class WorkerRange:
    """Limits on the number of workers of an elastic run, as nodes come and go."""

    min: Annotated[int, Field(ge=1)]
    """Minimum number of workers; with room for fewer, the run waits for nodes."""

    max: Annotated[int, Field(ge=1)]
    """Maximum number of workers."""

    grow_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that room for more workers must last before the run saves and resumes with them, so
    that a node that comes and goes costs nothing."""

    @model_validator(mode="after")
    def _check(self) -> "WorkerRange":
        if self.max < self.min:
            raise ConfigError([f"max: got {self.max}, wanted at least min, {self.min}"])
        return self


@settings
class ScaleConfig:
    """Workers of a run, their resources, and how failures are handled."""

    num_workers: Annotated[int, Field(ge=1)] | WorkerRange = 1
    """Number of training processes, one per GPU with `use_gpu`. `{min: 1, max: 8}`: elastic; as
    many of these as the nodes can hold: the run continues with fewer when nodes are lost, and with
    more when they return. The number does not change what a step computes."""

    use_gpu: bool = False
    """Train on GPUs over NCCL; false: on CPUs over gloo."""

    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved per worker, and its number of threads."""

    wait_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds to wait for an autoscaling cluster to add nodes; 0: fail at once if too small."""

    max_failures: Annotated[int, Field(ge=1)] = 3
    """Failures in a row without a new checkpoint at which the run gives up; 1: at the first. While
    there is progress, workers are restarted without limit."""

    watch: StallDetectorConfig | None = StallDetectorConfig()
    """Detection of hung workers, which are killed and restarted; null: off."""

    collective_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Timeout of a collective in seconds, after which the workers fail and are restarted."""

    compare_every_steps: Annotated[int, Field(ge=1)] | None = 100
    """Optimizer steps between comparisons of the replicated tensors across workers, which abort a
    run whose replicas differ: all weights under ddp and ZeRO 1 and 2; none under fsdp and ZeRO 3.
    Also after the last step. If it divides `checkpoint.every_steps`, only compared weights are
    saved. Null: never."""

    network_interface: str | None = None
    """Network interface for gloo and NCCL, such as eth0, needed if hostnames resolve to a loopback
    address; null: the libraries choose."""

    @property
    def elastic_range(self) -> WorkerRange | None:
        """Limits of an elastic run; None if the number of workers is fixed."""
        return self.num_workers if isinstance(self.num_workers, WorkerRange) else None

    @property
    def min_workers(self) -> int:
        """Minimum number of workers that the run trains on."""
        return self.elastic_range.min if self.elastic_range else cast("int", self.num_workers)

    @property
    def max_workers(self) -> int:
        """Maximum number of workers that the run trains on."""
        return self.elastic_range.max if self.elastic_range else cast("int", self.num_workers)

    @property
    def worker_resources(self) -> dict[str, float]:
        """Resources that Ray reserves per worker."""
        gpu = {"GPU": 1.0} if self.use_gpu else {}
        return {"CPU": float(self.cpus_per_worker), **gpu}
