"""What moves the weights: one small protocol, and plain data parallelism (`ddp`) behind it.

An engine owns the module, its optimizer and the exchange of gradients. All it does is defined on
sums over the whole step, so that results do not depend on how a step is cut into micro-batches
and workers.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytune_llama.data.batches import MicroBatch
from raytune_llama.model.llama import DTYPES, Precision, SummedLoss
from raytune_llama.train.optimizer import (
    OptimConfig,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from raytune_llama.train.workers import Workers

logger = logging.getLogger(__name__)

BUCKET_NUMEL = 16 * 2**20
"""Gradients are exchanged in buckets of this many numbers (64 MiB)."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, as this worker saw it."""

    loss_sum: float
    """Summed loss of this worker's targets, in nats."""

    grad_norm: float
    """L2 norm of the step's whole gradient before clipping; inf where it overflowed."""

    was_applied: bool
    """False where half-precision gradients overflowed, so that no weight moved."""

    loss_scale: float
    """Factor that kept half-precision gradients in range; 1 without one."""


Part = Literal["weight", "exp_avg", "exp_avg_sq"]
"""What AdamW knows of every number that it changes."""

PARTS: tuple[Part, ...] = ("weight", "exp_avg", "exp_avg_sq")

ReadPart = Callable[[Part, str, int, int], Tensor]
"""Returns numbers [start, stop) of a part of a parameter: flat, float32, on the CPU, a copy."""


@dataclass(frozen=True)
class StateSlice:
    """A stretch of one parameter, in the flat order of the whole tensor; float32, on any device."""

    name: str
    """Of the parameter."""

    start: int
    """Number of the stretch's first element in the whole."""

    weight: Tensor
    """Flat."""

    exp_avg: Tensor
    """AdamW's mean of gradients, as long."""

    exp_avg_sq: Tensor
    """AdamW's mean of squared gradients, as long."""

    @property
    def stop(self) -> int:
        """Number of the first element behind the stretch."""
        return self.start + self.weight.numel()


class Engine(Protocol):
    """Moves the weights of a module that returns summed losses."""

    module: SummedLoss

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        seeds: Sequence[int],
        num_targets: float,
        learning_rate: float,
    ) -> StepResult:
        """Take one optimizer step on the mean loss of the step's targets.

        Args:
            micro_batches: this worker's; every worker passes the same number.
            seeds: of the dropout of each micro-batch.
            num_targets: target tokens of the step over all workers.
            learning_rate: of this step; some groups of parameters have a multiple of it.
        """
        ...

    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch in nats, dropout off; collective."""
        ...

    def trainable_state(self) -> Iterator[StateSlice]:
        """Yield what this worker saves; the workers' slices are each trained parameter once.

        They share the engine's memory, and change with the next step. Nothing is exchanged.
        """
        ...

    def load_trainable_state(self, read: ReadPart) -> None:
        """Set the state of every trained parameter; a worker reads what it holds; collective."""
        ...

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every trained parameter by name, whole, float32, on the CPU; collective."""
        ...

    def scalar_state(self) -> dict[str, float]:
        """Return the rest of what a checkpoint needs.

        `num_applied` steps; with a loss scaler also `loss_scale` and `num_good`, the steps since
        it last changed.
        """
        ...

    def load_scalar_state(self, state: dict[str, float]) -> None:
        """Set what `scalar_state` returned."""
        ...


def trained_parameters(module: SummedLoss) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that are trained, by their name in the wrapped model."""
    return [(name, p) for name, p in module.model.named_parameters() if p.requires_grad]


def trained_shapes(module: SummedLoss) -> dict[str, list[int]]:
    """Return the shapes of the whole parameters that are trained, by name."""
    # ZeRO 3 leaves the whole shape in an attribute.
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in trained_parameters(module)
    }


def even_ranges(sizes: Sequence[int], rank: int, world_size: int) -> list[tuple[int, int]]:
    """Lay tensors end to end, cut the row into equal stretches, one a worker.

    Returns:
        Of each tensor the numbers [start, stop) that are in this worker's stretch.
    """
    total = sum(sizes)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    ranges: list[tuple[int, int]] = []
    position = 0
    for size in sizes:
        start, stop = (min(max(edge - position, 0), size) for edge in (first, last))
        ranges.append((start, stop))
        position += size
    return ranges


@contextlib.contextmanager
def precise_buffers(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep buffers in their own precision while a block casts a module's weights.

    Cast to bfloat16, the frequencies of rotary embeddings are off by up to 0.4 %, which turns
    tokens at position 1,000 by radians; models compute them in float32 in any precision.
    """
    kept = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
        if buffer.is_floating_point()
    ]
    yield
    for owner, name, buffer in kept:
        setattr(owner, name, buffer.to(device))


def evaluate_batch(
    call: Callable[..., Tensor], module: nn.Module, batch: MicroBatch, device: torch.device
) -> float:
    """Return the summed loss of a batch without dropout and without a graph."""
    module.eval()
    with torch.no_grad():
        loss = call(*to_device(batch, device))
    module.train()
    return loss.item()


def to_device(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's ids, positions and labels on a device, in the order of `SummedLoss`."""
    tensors = (batch.ids_BT, batch.positions_BT, batch.labels_BT)
    ids, positions, labels = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return ids, positions, labels


class DataParallelEngine:
    """Every worker holds the whole model; gradients are summed in float32 once a step.

    Chosen over DeepSpeed's stage 0, which wraps its optimizer differently for each precision and
    keeps the float32 masters to itself, and over DistributedDataParallel, which reduces in the
    weights' own precision.
    """

    def __init__(
        self, module: SummedLoss, precision: Precision, optim: OptimConfig, workers: Workers
    ) -> None:
        self.module = module
        self._workers = workers
        self._place(precision)
        self.module.train()
        self._max_grad_norm = optim.max_grad_norm or float("inf")
        named = trained_parameters(module)
        self._names = [name for name, _ in named]
        self._weights = [weight for _, weight in named]
        self._masters = [self._master_of(weight) for weight in self._weights]
        masters = list(zip(self._names, self._masters, strict=True))
        self._optimizer = build_optimizer(parameter_groups(module.model, masters, optim), optim)
        self._scaler = torch.amp.GradScaler(
            workers.device.type, enabled=DTYPES[precision] == torch.float16
        )
        self._num_applied = 0

    def _place(self, precision: Precision) -> None:
        """Bring the weights to where they are computed with."""
        with precise_buffers(self.module, self._workers.device):
            self.module.to(self._workers.device, DTYPES[precision])

    def _master_of(self, weight: nn.Parameter) -> nn.Parameter:
        """Return what the optimizer changes: float32, on this worker."""
        if weight.dtype == torch.float32:
            return weight
        return nn.Parameter(weight.detach().float())

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        seeds: Sequence[int],
        num_targets: float,
        learning_rate: float,
    ) -> StepResult:
        """Take one optimizer step; see `Engine`."""
        loss_sum = torch.zeros((), device=self._workers.device)
        for batch, seed in zip(micro_batches, seeds, strict=True):
            torch.manual_seed(seed)
            loss = self.module(*to_device(batch, self._workers.device))
            self._scaler.scale(loss / num_targets).backward()
            self._collect_gradients()
            loss_sum += loss.detach()
        self._sum_gradients()
        scale = self._scaler.get_scale()
        self._scaler.unscale_(self._optimizer)
        norm = self._clip_gradients()
        set_learning_rate(self._optimizer.param_groups, learning_rate)
        was_applied = not self._scaler.is_enabled() or norm < float("inf")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._num_applied += was_applied
        self._write_weights()
        return StepResult(
            loss_sum.item(), norm if was_applied else float("inf"), was_applied, scale
        )

    def _collect_gradients(self) -> None:
        """Add half-precision gradients to the masters' in float32, micro-batch by micro-batch."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is master or weight.grad is None:
                continue
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    def _sum_gradients(self) -> None:
        for master in self._masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        if self._workers.world_size == 1:
            return
        bucket: list[Tensor] = []
        for master in self._masters:
            assert master.grad is not None
            bucket.append(master.grad)
            if sum(gradient.numel() for gradient in bucket) >= BUCKET_NUMEL:
                _all_reduce(bucket)
                bucket = []
        if bucket:
            _all_reduce(bucket)

    def _clip_gradients(self) -> float:
        """Scale the step's gradients down to the largest norm allowed; return theirs before."""
        return float(nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm))

    @torch.no_grad()
    def _write_weights(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is not master:
                weight.copy_(master)

    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch; see `Engine`."""
        return evaluate_batch(self.module, self.module, batch, self._workers.device)

    def trainable_state(self) -> Iterator[StateSlice]:
        """Yield what this worker saves; see `Engine`."""
        kept = self._kept_ranges()
        for name, weight, master, (start, stop) in zip(
            self._names, self._weights, self._masters, kept, strict=True
        ):
            if start == stop:
                continue
            moments = self._optimizer.state.get(master) or {}
            parts = [
                moments[part] if moments else torch.zeros_like(master)
                for part in ("exp_avg", "exp_avg_sq")
            ]
            first = self._first_held(weight)
            mine = [
                part.reshape(-1)[start - first : stop - first] for part in (master.detach(), *parts)
            ]
            yield StateSlice(name, start, *mine)

    def _kept_ranges(self) -> list[tuple[int, int]]:
        """Return the numbers of each parameter that this worker saves."""
        sizes = [master.numel() for master in self._masters]
        return even_ranges(sizes, self._workers.rank, self._workers.world_size)

    def _first_held(self, weight: nn.Parameter) -> int:  # noqa: ARG002  # for others
        """Return where in the whole parameter begins what this worker holds of it."""
        return 0

    @torch.no_grad()
    def load_trainable_state(self, read: ReadPart) -> None:
        """Set the state of every trained parameter; see `Engine`."""
        for name, weight, master in zip(self._names, self._weights, self._masters, strict=True):
            start = self._first_held(weight)
            stop = start + master.numel()
            held = {part: read(part, name, start, stop).view_as(master) for part in PARTS}
            master.copy_(held.pop("weight"))
            self._optimizer.state[master] = {
                "step": torch.tensor(0.0, device=master.device),
                **{part: moment.to(master.device) for part, moment in held.items()},
            }
        self._write_weights()

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every trained parameter; see `Engine`."""
        for name, weight, master in zip(self._names, self._weights, self._masters, strict=True):
            yield name, self._whole(master.detach(), weight)

    def _whole(self, part: Tensor, weight: nn.Parameter) -> Tensor:  # noqa: ARG002  # for others
        """Return all of a tensor of which this worker holds what it holds of a weight."""
        return part.cpu()

    def scalar_state(self) -> dict[str, float]:
        """Return the applied steps and the loss scaler; see `Engine`."""
        state: dict[str, float] = {"num_applied": self._num_applied}
        if self._scaler.is_enabled():
            scaler = self._scaler.state_dict()
            state |= {"loss_scale": scaler["scale"], "num_good": scaler["_growth_tracker"]}
        return state

    def load_scalar_state(self, state: dict[str, float]) -> None:
        """Set what `scalar_state` returned; see `Engine`."""
        self._num_applied = int(state["num_applied"])
        for moments in self._optimizer.state.values():
            moments["step"].fill_(self._num_applied)
        if self._scaler.is_enabled():
            mine = {"scale": state["loss_scale"], "_growth_tracker": int(state["num_good"])}
            self._scaler.load_state_dict(self._scaler.state_dict() | mine)


def _all_reduce(gradients: list[Tensor]) -> None:
    """Sum tensors over the workers in place, as one message."""
    if len(gradients) == 1:
        dist.all_reduce(gradients[0])
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
