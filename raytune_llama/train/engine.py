"""What moves the weights: one small protocol, and plain data parallelism (`ddp`) behind it.

An engine owns the module, its optimizer and the exchange of gradients. All it does is defined on
sums over the whole step, so that results do not depend on how a step is cut into micro-batches
and workers.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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


@dataclass(frozen=True)
class ParameterState:
    """All that AdamW knows of one parameter: whole tensors, float32, on the CPU."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


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

    def trainable_state(self) -> Iterator[tuple[str, ParameterState]]:
        """Yield the state of every trained parameter by name, in one order; collective."""
        ...

    def load_trainable_state(self, read: Callable[[str], ParameterState]) -> None:
        """Set the state of every trained parameter; collective."""
        ...

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
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


def not_finite(losses: Sequence[Tensor]) -> tuple[int, ...]:
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
        losses: list[Tensor] = []
        for batch, seed in zip(micro_batches, seeds, strict=True):
            torch.manual_seed(seed)
            loss = self.module(*to_device(batch, self._workers.device))
            self._scaler.scale(loss / num_targets).backward()
            self._collect_gradients()
            losses.append(loss.detach())
        self._sum_gradients()
        scale = self._scaler.get_scale()
        # One message: all workers decide on the same numbers.
        mine = sum(losses, torch.zeros((), device=self._workers.device)).item()
        loss_sum, squared = self._workers.sum([mine, self._squared_norm()])
        norm = math.sqrt(squared) / scale
        was_applied = math.isfinite(loss_sum) and math.isfinite(norm)
        if not was_applied:
            self._overflow_gradients()
        self._scaler.unscale_(self._optimizer)
        if was_applied:
            nn.utils.clip_grads_with_norm_(self._masters, self._max_grad_norm, torch.tensor(norm))
            set_learning_rate(self._optimizer.param_groups, learning_rate)
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._num_applied += was_applied
        self._write_weights()
        bad = () if was_applied else not_finite(losses)
        return StepResult(loss_sum, norm, was_applied, scale, bad)

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

    def _squared_norm(self) -> float:
        """Return what adds up over the workers to the square of the norm of the gradients."""
        return self._norm_held() ** 2 / self._workers.world_size

    def _norm_held(self) -> float:
        """Return the norm of the gradients that this worker holds."""
        gradients = [master.grad for master in self._masters if master.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def _overflow_gradients(self) -> None:
        """Let the scaler find an overflow, if there is one, whatever was not finite and where."""
        for master in self._masters if self._scaler.is_enabled() else ():
            assert master.grad is not None
            master.grad.fill_(math.inf)

    @torch.no_grad()
    def _write_weights(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is not master:
                weight.copy_(master)

    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch; see `Engine`."""
        return evaluate_batch(self.module, self.module, batch, self._workers.device)

    def trainable_state(self) -> Iterator[tuple[str, ParameterState]]:
        """Yield the state of every trained parameter; see `Engine`."""
        for name, weight, master in zip(self._names, self._weights, self._masters, strict=True):
            moments = self._optimizer.state.get(master) or {}
            parts = [master.detach()]
            parts += [
                moments[key] if moments else torch.zeros_like(master)
                for key in ("exp_avg", "exp_avg_sq")
            ]
            yield name, ParameterState(*(self._whole(part, weight) for part in parts))

    def _whole(self, part: Tensor, weight: nn.Parameter) -> Tensor:  # noqa: ARG002  # for others
        """Return all of a tensor of which this worker holds what it holds of a weight; a copy."""
        return part.cpu()

    def _part(self, whole: Tensor, weight: nn.Parameter) -> Tensor:  # noqa: ARG002  # for others
        """Return what this worker holds of a whole tensor."""
        return whole

    @torch.no_grad()
    def load_trainable_state(self, read: Callable[[str], ParameterState]) -> None:
        """Set the state of every trained parameter; see `Engine`."""
        for name, weight, master in zip(self._names, self._weights, self._masters, strict=True):
            state = read(name)
            master.copy_(self._part(state.weight, weight))
            self._optimizer.state[master] = {
                "step": torch.tensor(0.0, device=master.device),
                "exp_avg": self._part(state.exp_avg, weight).to(master.device, copy=True),
                "exp_avg_sq": self._part(state.exp_avg_sq, weight).to(master.device, copy=True),
            }
        self._write_weights()

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights; see `Engine`."""
        return module_tensors(self.module)

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
