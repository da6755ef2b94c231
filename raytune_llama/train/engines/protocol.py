"""What moves the weights: one small protocol, and what the engines behind it share.

An engine owns the module, its optimizer and the exchange of gradients. All it does is defined on
sums over the whole step, so that results do not depend on how a step is cut into micro-batches
and workers.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.model.llama import SummedLoss


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; but for `bad_micro_batches` the same on every worker."""

    loss_sum: float
    """Summed loss of the step's targets, of all workers, in nats."""

    grad_norm: float
    """L2 norm of the step's whole gradient before clipping; not finite where that is not."""

    was_applied: bool
    """False where the loss or the gradient was not finite, so that no weight moved."""

    loss_scale: float
    """Factor that kept half-precision gradients in range; 1 without one."""

    bad_micro_batches: tuple[int, ...] = ()
    """Which of this worker's micro-batches had a loss that is not finite."""

    @property
    def is_bad(self) -> bool:
        """Whether numbers were not finite, and not because the loss scale was too large."""
        overflowed = math.isfinite(self.loss_sum) and self.loss_scale > 1.0
        return not self.was_applied and not overflowed


StateKey = Literal["weight", "exp_avg", "exp_avg_sq"]
"""What AdamW knows of every number that it changes."""

STATE_KEYS: tuple[StateKey, ...] = ("weight", "exp_avg", "exp_avg_sq")

ReadState = Callable[[StateKey, str, int, int], Tensor]
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


class TrainEngine(Protocol):
    """Moves the weights of a module that returns summed losses."""

    module: SummedLoss

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        seeds: Sequence[int],
        num_targets: float,
        learning_rate: float,
    ) -> StepResult:
        """Take one optimizer step on the mean loss of the step's targets; collective.

        Where the loss of any worker or the gradient is not finite, no worker moves a weight.

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

    def load_trainable_state(self, read: ReadState) -> None:
        """Set the state of every trained parameter; a worker reads what it holds; collective."""
        ...

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every trained parameter by name, whole, float32, on the CPU; collective."""
        ...

    def replicated_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what every worker holds, and is to hold alike, by name, in one order."""
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
def keep_buffer_precision(module: nn.Module, device: torch.device) -> Iterator[None]:
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


def nonfinite_indices(losses: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the numbers of the losses that are not finite."""
    return tuple(number for number, loss in enumerate(losses) if not loss.isfinite())


def module_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def to_device(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's ids, positions and labels on a device, in the order of `SummedLoss`."""
    tensors = (batch.ids_BT, batch.positions_BT, batch.labels_BT)
    ids, positions, labels = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return ids, positions, labels
