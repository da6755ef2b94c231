"""The group of workers that train together, as one worker sees it."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from raytune_llama.storage.lease import Fence
from raytune_llama.train.progress import Progress

T = TypeVar("T")


def ensure_process_group(device: torch.device) -> None:
    """Make a process group of this process alone where there is none."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


@dataclass(frozen=True)
class ProcessGroup:
    """This worker's place in the group, and the small collectives that the loop needs."""

    rank: int
    """This worker's number, from 0."""

    world_size: int
    """Number of workers."""

    device: torch.device
    """Where this worker computes."""

    restarts: int = 0
    """How often workers have been started before, under the run's driver."""

    fence: Fence | None = None
    """What allows to publish in the run directory; None where nobody else could."""

    progress: Progress = field(default_factory=Progress, compare=False, repr=False)
    """What this worker is doing."""

    @classmethod
    def single_process(cls, device: torch.device | None = None) -> Self:
        """Return a group of one, without a process group."""
        return cls(rank=0, world_size=1, device=device or torch.device("cpu"))

    @classmethod
    def from_torch(cls, device: torch.device) -> Self:
        """Return this process's place in the initialised torch process group."""
        return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers up over the workers, in double precision; every worker gets the sums."""
        if self.world_size == 1:
            return list(values)
        # NCCL reduces on the GPU only, and every CUDA device has doubles.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_reduce_in_place(self, total: Tensor) -> Tensor:
        """Add a tensor up over the workers where it lies, without waiting for it; return it."""
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def all_gather_rows(self, row_N: Tensor) -> list[list[int]]:
        """Return a tensor of integers of all workers, by rank."""
        if self.world_size == 1:
            return [row_N.tolist()]
        rows = [torch.empty_like(row_N) for _ in range(self.world_size)]
        dist.all_gather(rows, row_N)
        return [row.tolist() for row in rows]

    def broadcast(self, value: T) -> T:
        """Return the first worker's value on every worker; small objects only."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """Return every worker's value, by rank, on every worker; small objects only."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        on_gpu = self.device.type == "cuda"
        # The values travel over the current device, whichever that is.
        with torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext():
            dist.all_gather_object(values, value)
        return cast("list[T]", values)

    def barrier(self) -> None:
        """Wait until every worker is here."""
        self.all_reduce_sum([0.0])
