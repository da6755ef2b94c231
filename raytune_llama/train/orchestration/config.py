"""Settings of a run's workers: number, resources, restarts and stall detection."""

from typing import Annotated, Literal, cast

from pydantic import Field, model_validator

from raytune_llama.capacity import ACCELERATOR_PREFIX, WorkerNeeds
from raytune_llama.config.node_selection import NodeSelection, check_node_selection
from raytune_llama.config.settings import ConfigError, settings

_OWN_FIELDS = {
    "CPU": "use cpus_per_worker",
    "GPU": "use use_gpu and gpus_per_worker",
    "object_store_memory": "remove it, as training workers use no object store",
}
"""What to do about resources that other fields reserve, or that no worker needs."""


_MAX_GPUS = 16
"""GPUs of a node, at most."""


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
class ScaleConfig(NodeSelection):
    """Workers of a run, their resources and nodes, and how failures are handled."""

    num_workers: Annotated[int, Field(ge=1)] | WorkerRange = 1
    """Number of training processes, one per GPU with `use_gpu`. `{min: 1, max: 8}`: elastic; as
    many of these as the nodes can hold: the run continues with fewer when nodes are lost, and with
    more when they return. The number does not change what a step computes."""

    use_gpu: bool = False
    """Train on GPUs over NCCL; false: on CPUs over gloo."""

    gpus_per_worker: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """Share of a GPU reserved per worker, and of its memory that the worker may use: 1, or 0.5,
    0.333, 0.25, ... so that 2, 3, 4, ... small trials of a sweep share a GPU; below 1 for runs on
    one worker only."""

    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved per worker, and its number of threads."""

    resources_per_worker: dict[str, Annotated[float, Field(ge=0.0001)]] = Field(
        default_factory=dict
    )
    """Other resources reserved per worker: `memory` in bytes, and custom ones of the nodes, such as
    `{nvme: 1}` for nodes started with `ray start --resources='{"nvme": 4}'`."""

    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    """How workers are placed on nodes. `pack`: on as few nodes as possible; `spread`: on as many as
    possible; `strict_spread`: each on a node of its own, otherwise the run does not start."""

    wait_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds to wait for an autoscaling cluster to add nodes; 0: fail at once if too small. Nodes
    that are large enough, but used by others, are waited for without limit."""

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

    @model_validator(mode="after")
    def _check(self) -> "ScaleConfig":
        problems = check_node_selection(self, use_gpu=self.use_gpu)
        if self.gpus_per_worker < 1:
            problems += self._check_shared_gpu()
        for name in self.resources_per_worker:
            remedy = _OWN_FIELDS.get(name)
            if name.startswith(ACCELERATOR_PREFIX):
                remedy = "use accelerator_type"
            if remedy is not None:
                problems.append(f"resources_per_worker: got {name}; {remedy}")
        if self.elastic_range is not None:
            problems += self._check_elastic()
        if problems:
            raise ConfigError(problems)
        return self

    def _check_shared_gpu(self) -> list[str]:
        share = f"gpus_per_worker: got {self.gpus_per_worker:g}, but"
        per_gpu = int(1 / self.gpus_per_worker)
        if per_gpu == 1 or self.gpus_per_worker < _MAX_GPUS / (_MAX_GPUS * per_gpu + 1):
            # Ray adds up what is left of several GPUs: it would wait for a share that none has.
            return [
                f"{share} equal shares must fill a GPU; set it to {1 / per_gpu:.3g} or "
                f"{1 / (per_gpu + 1):.3g}"
            ]
        if not self.use_gpu:
            return [f"{share} use_gpu is false; set use_gpu=true, or gpus_per_worker=1"]
        if self.elastic_range is not None:
            return [
                f"{share} an elastic run needs whole GPUs; set gpus_per_worker=1, or num_workers=1"
            ]
        if self.max_workers > 1:
            return [
                f"{share} each of {self.max_workers} workers needs a GPU of its own, as NCCL does "
                "not connect workers that share one; set gpus_per_worker=1, or num_workers=1"
            ]
        return []

    def _check_elastic(self) -> list[str]:
        """Return settings that Ray ignores when it counts the workers of an elastic run."""
        problems = [
            f"resources_per_worker.{name}: got {amount:g}, but an elastic run needs whole amounts; "
            "use one, or a fixed num_workers"
            for name, amount in self.resources_per_worker.items()
            if amount % 1
        ]
        if self.label_selector:
            problems.append(
                "label_selector: set, but Ray counts the workers of an elastic run on all nodes, "
                "whatever their labels; use accelerator_type or resources_per_worker, or a fixed "
                "num_workers"
            )
        if self.placement == "strict_spread":
            problems.append(
                "placement: got strict_spread, but Ray counts several workers per node for an "
                "elastic run; use spread, or a fixed num_workers"
            )
        return problems

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
        return dict(self.worker_needs.resources)

    @property
    def worker_needs(self) -> WorkerNeeds:
        """What a node must have to hold a worker."""
        return WorkerNeeds.of(
            self,
            cpus=self.cpus_per_worker,
            gpus=self.gpus_per_worker if self.use_gpu else 0,
            others=self.resources_per_worker,
            is_alone=self.placement == "strict_spread",
        )
