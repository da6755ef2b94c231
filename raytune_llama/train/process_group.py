"""One worker's view of the process group, and its collectives."""

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
    """Initialize a single-process group if torch has no process group yet."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


@dataclass(frozen=True)
class ProcessGroup:
    """This worker's rank and device, and the collectives that the loop needs."""

    rank: int
    """Rank of this worker, from 0."""

    world_size: int
    """Number of workers."""

    device: torch.device
    """Device that this worker computes on."""

    restarts: int = 0
    """How often this driver has restarted the workers."""

    fence: Fence | None = None
    """Proof of the lease, checked before publishing in the run directory; None: no other writer."""

    progress: Progress = field(default_factory=Progress, compare=False, repr=False)
    """Progress of this worker, which heartbeats report."""

    @classmethod
    def single_process(cls, device: torch.device | None = None) -> Self:
        """Return a group of one worker, without a torch process group."""
        return cls(rank=0, world_size=1, device=device or torch.device("cpu"))

    @classmethod
    def from_torch(cls, device: torch.device) -> Self:
        """Return this process's view of the initialized torch process group."""
        return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which writes what is written once per run."""
        return self.rank == 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Return the elementwise sums over all workers, in float64; collective."""
        if self.world_size == 1:
            return list(values)
        # NCCL reduces on the GPU only, and every CUDA device has float64.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_reduce_in_place(self, total: Tensor) -> Tensor:
        """All-reduce a tensor in place by sum, without synchronizing with the host; return it."""
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def all_gather_rows(self, row_N: Tensor) -> list[list[int]]:
        """Return every worker's integer tensor of N elements as a list, by rank; collective."""
        if self.world_size == 1:
            return [row_N.tolist()]
        rows = [torch.empty_like(row_N) for _ in range(self.world_size)]
        dist.all_gather(rows, row_N)
        return [row.tolist() for row in rows]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every worker; small objects only; collective."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """Return every worker's value, by rank; small objects only; collective."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        on_gpu = self.device.type == "cuda"
        # NCCL sends the values over the current CUDA device.
        with torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext():
            dist.all_gather_object(values, value)
        return cast("list[T]", values)

    def barrier(self) -> None:
        """Block until every worker has reached this call."""
        self.all_reduce_sum([0.0])
