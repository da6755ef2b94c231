"""The protocol of training engines, and what its implementations share.

An engine owns the module, its optimizer and the gradient communication. All it does is defined on
sums over the full step, so results do not depend on how a step is split into micro-batches and
workers.
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
    """Result of one optimizer step; the same on every worker except for `bad_micro_batches`."""

    loss_sum: float
    """Summed loss over the step's targets on all workers, in nats."""

    grad_norm: float
    """L2 norm of the step's full gradient before clipping; not finite if the gradient is not."""

    was_applied: bool
    """Whether weights were updated; false if the loss or the gradient was not finite."""

    loss_scale: float
    """Loss scale that kept half-precision gradients in range; 1 without a loss scaler."""

    bad_micro_batches: tuple[int, ...] = ()
    """Indices of this worker's micro-batches whose loss was not finite."""

    @property
    def is_bad(self) -> bool:
        """Whether the loss or gradient was not finite, other than by too large a loss scale."""
        overflowed = math.isfinite(self.loss_sum) and self.loss_scale > 1.0
        return not self.was_applied and not overflowed


StateKey = Literal["weight", "exp_avg", "exp_avg_sq"]
"""Key of a tensor that AdamW keeps per parameter: the weight itself or a moment."""

STATE_KEYS: tuple[StateKey, ...] = ("weight", "exp_avg", "exp_avg_sq")

ReadState = Callable[[StateKey, str, int, int], Tensor]
"""Given (key, parameter name, start, stop), returns these elements: a flat float32 CPU copy."""


@dataclass(frozen=True)
class StateSlice:
    """A range of one flattened parameter, with its moments; float32, on any device."""

    name: str
    """Name of the parameter."""

    start: int
    """Index of the slice's first element in the flattened parameter."""

    weight: Tensor
    """Weights of the slice, flat."""

    exp_avg: Tensor
    """AdamW's running mean of gradients, of the same shape."""

    exp_avg_sq: Tensor
    """AdamW's running mean of squared gradients, of the same shape."""

    @property
    def stop(self) -> int:
        """Index of the first element after the slice."""
        return self.start + self.weight.numel()


class TrainEngine(Protocol):
    """Trains a module that returns summed losses."""

    module: SummedLoss

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        seeds: Sequence[int],
        num_targets: float,
        learning_rate: float,
    ) -> StepResult:
        """Take one optimizer step on the mean loss of the step's targets; collective.

        If any worker's loss or the gradient is not finite, no worker updates a weight.

        Args:
            micro_batches: this worker's micro-batches; every worker passes the same number.
            seeds: dropout seed of each micro-batch.
            num_targets: target tokens of the step over all workers.
            learning_rate: scheduled rate of this step; some parameter groups use a multiple.
        """
        ...

    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch in nats, with dropout off; collective."""
        ...

    def row_losses(self, batch: MicroBatch) -> list[float]:
        """Return the summed loss of each row of a batch, like `loss_sum`; collective."""
        ...

    def trainable_state(self) -> Iterator[StateSlice]:
        """Yield the slices this worker saves; all workers' slices cover each parameter once.

        They share the engine's memory and change with the next step. Not collective.
        """
        ...

    def load_trainable_state(self, read: ReadState) -> None:
        """Set the state of every trained parameter, reading what this worker holds; collective."""
        ...

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every trained parameter by name, in full, float32, on the CPU; collective."""
        ...

    def replicated_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that must be equal on all workers, by name, in the same order."""
        ...

    def scalar_state(self) -> dict[str, float]:
        """Return the rest of the state that a checkpoint needs.

        `num_applied`: steps applied; with a loss scaler also `loss_scale` and `num_good`, the
        number of steps since the scale last changed.
        """
        ...

    def load_scalar_state(self, state: dict[str, float]) -> None:
        """Restore what `scalar_state` returned."""
        ...


def trained_parameters(module: SummedLoss) -> list[tuple[str, nn.Parameter]]:
    """Return the trained parameters with their names in the wrapped model."""
    return [(name, p) for name, p in module.model.named_parameters() if p.requires_grad]


def trained_shapes(module: SummedLoss) -> dict[str, list[int]]:
    """Return the full shapes of the trained parameters, by name."""
    # ZeRO 3 keeps the full shape in an attribute.
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in trained_parameters(module)
    }


def even_ranges(sizes: Sequence[int], rank: int, world_size: int) -> list[tuple[int, int]]:
    """Concatenate flattened tensors and split the result evenly, one range per worker.

    Args:
        sizes: number of elements of each tensor.
        rank: rank of this worker.
        world_size: number of workers.

    Returns:
        The element range [start, stop) of each tensor that falls into this worker's range.
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
    """Keep buffers in their own precision while the block casts a module's weights.

    Cast to bfloat16, rotary embedding frequencies are off by up to 0.4 %, which rotates tokens at
    position 1,000 by radians; models compute them in float32 in any precision.
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
    call: Callable[..., Tensor],
    module: nn.Module,
    batch: MicroBatch,
    device: torch.device,
    *,
    by_row: bool = False,
) -> Tensor:
    """Return the summed loss of a batch, or of each row, in nats, without dropout and autograd."""
    module.eval()
    with torch.no_grad():
        loss = call(*to_device(batch, device), by_row=by_row)
    module.train()
    return loss


def nonfinite_indices(losses: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the indices of the losses that are not finite."""
    return tuple(index for index, loss in enumerate(losses) if not loss.isfinite())


def module_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def to_device(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch's ids, positions and labels on a device, in the order of `SummedLoss`."""
    tensors = (batch.ids_BT, batch.positions_BT, batch.labels_BT)
    ids, positions, labels = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return ids, positions, labels
