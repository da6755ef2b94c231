"""The workers of a run: how many, what Ray reserves for them, and when one is replaced."""

from typing import Annotated, cast

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings


@settings
class StallDetectorConfig:
    """When a worker that does not get on is taken for stuck, and replaced."""

    min_seconds: Annotated[float, Field(gt=0)] = 120.0
    """No step that takes less is taken for stuck."""

    factor: Annotated[float, Field(gt=1)] = 10.0
    """A step is, that takes so many times as long as the slowest of the recent ones."""

    slow_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """So is anything else that takes longer: loading and the first step, an evaluation, saving,
    writing the result, and Ray's start of the workers."""


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

    watch: StallDetectorConfig | None = StallDetectorConfig()
    """Finds and replaces workers that are alive but do not get on; null: does not."""

    collective_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """A worker that waits longer for the others fails, and the workers are restarted."""

    compare_every_steps: Annotated[int, Field(ge=1)] | None = 100
    """Optimizer steps between comparisons of what all workers hold alike, which end a run whose
    workers differ: all weights under ddp and ZeRO 1 and 2; under fsdp and ZeRO 3 nothing is alike.
    Also after the last step. Where it divides `layout.every_steps`, no other weights are saved.
    Null: never."""

    network_interface: str | None = None
    """Interface for gloo and NCCL, such as eth0, where hostnames resolve to a loopback address;
    null: the libraries choose."""

    @property
    def elastic_range(self) -> WorkerRange | None:
        """The numbers of workers where there may be several; None: there is one."""
        return self.num_workers if isinstance(self.num_workers, WorkerRange) else None

    @property
    def min_workers(self) -> int:
        """Without which the run does not train."""
        return self.elastic_range.min if self.elastic_range else cast("int", self.num_workers)

    @property
    def max_workers(self) -> int:
        """That the run ever has."""
        return self.elastic_range.max if self.elastic_range else cast("int", self.num_workers)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        gpu = {"GPU": 1.0} if self.use_gpu else {}
        return {"CPU": float(self.cpus_per_worker), **gpu}
