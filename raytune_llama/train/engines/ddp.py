"""Training engine for plain data parallelism (`ddp`): every worker holds the full model."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.model.config import Precision
from raytune_llama.model.llama import DTYPES, SummedLoss
from raytune_llama.train.engines.config import OptimConfig
from raytune_llama.train.engines.optimizer import (
    build_optimizer,
    parameter_groups,
    set_learning_rate,
)
from raytune_llama.train.engines.protocol import (
    STATE_KEYS,
    ReadState,
    StateSlice,
    StepResult,
    evaluate_batch,
    even_ranges,
    keep_buffer_precision,
    module_tensors,
    nonfinite_indices,
    to_device,
    trained_parameters,
)
from raytune_llama.train.process_group import ProcessGroup

BUCKET_NUMEL = 16 * 2**20
"""Gradients are all-reduced in buckets of about this many elements (64 MiB)."""


class DataParallelEngine:
    """Every worker holds the full model; gradients are all-reduced in float32 once per step.

    Used instead of DeepSpeed's stage 0, which wraps its optimizer differently per precision and
    hides the float32 masters, and instead of DistributedDataParallel, which reduces in the
    weights' own precision.
    """

    def __init__(
        self, module: SummedLoss, precision: Precision, optim: OptimConfig, workers: ProcessGroup
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
        """Move the weights to the compute device and precision."""
        with keep_buffer_precision(self.module, self._workers.device):
            self.module.to(self._workers.device, DTYPES[precision])

    def _master_of(self, weight: nn.Parameter) -> nn.Parameter:
        """Return the float32 master of a weight, which the optimizer updates."""
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
        """Take one optimizer step; see `TrainEngine`."""
        losses: list[Tensor] = []
        for batch, seed in zip(micro_batches, seeds, strict=True):
            losses.append(self._add_gradients(batch, seed, num_targets))
            self._collect_gradients()
        self._sum_gradients()
        scale = self._scaler.get_scale()
        # One all-reduce for both: all workers decide on the same values.
        mine = sum(losses, torch.zeros((), device=self._workers.device)).item()
        loss_sum, squared = self._workers.all_reduce_sum([mine, self._squared_norm()])
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
        bad = () if was_applied else nonfinite_indices(losses)
        return StepResult(loss_sum, norm, was_applied, scale, bad)

    def _add_gradients(self, batch: MicroBatch, seed: int, num_targets: float) -> Tensor:
        """Add a micro-batch's gradients to the weights'; return its summed loss."""
        torch.manual_seed(seed)
        loss = self.module(*to_device(batch, self._workers.device))
        self._scaler.scale(loss / num_targets).backward()
        return loss.detach()

    def _collect_gradients(self) -> None:
        """Add half-precision gradients to the masters' in float32, after each micro-batch."""
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
        """Return this worker's summand of the squared global gradient norm."""
        return self._norm_held() ** 2 / self._workers.world_size

    def _norm_held(self) -> float:
        """Return the L2 norm of the gradients that this worker holds."""
        gradients = [master.grad for master in self._masters if master.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def _overflow_gradients(self) -> None:
        """Make an enabled loss scaler detect an overflow, whatever was not finite and where."""
        for master in self._masters if self._scaler.is_enabled() else ():
            assert master.grad is not None
            master.grad.fill_(math.inf)

    @torch.no_grad()
    def _write_weights(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight is not master:
                weight.copy_(master)

    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch; see `TrainEngine`."""
        return evaluate_batch(self.module, self.module, batch, self._workers.device).item()

    def row_losses(self, batch: MicroBatch) -> list[float]:
        """Return the summed loss of each row of a batch; see `TrainEngine`."""
        device = self._workers.device
        return evaluate_batch(self.module, self.module, batch, device, by_row=True).tolist()

    def trainable_state(self) -> Iterator[StateSlice]:
        """Yield the slices that this worker saves; see `TrainEngine`."""
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
        """Return the element range of each parameter that this worker saves."""
        sizes = [master.numel() for master in self._masters]
        return even_ranges(sizes, self._workers.rank, self._workers.world_size)

    def _first_held(self, weight: nn.Parameter) -> int:  # noqa: ARG002  # for subclasses
        """Return the index in the full parameter of this worker's first element."""
        return 0

    @torch.no_grad()
    def load_trainable_state(self, read: ReadState) -> None:
        """Set the state of every trained parameter; see `TrainEngine`."""
        for name, weight, master in zip(self._names, self._weights, self._masters, strict=True):
            start = self._first_held(weight)
            stop = start + master.numel()
            held = {part: read(part, name, start, stop).view_as(master) for part in STATE_KEYS}
            master.copy_(held.pop("weight"))
            self._optimizer.state[master] = {
                "step": torch.tensor(0.0, device=master.device),
                **{part: moment.to(master.device) for part, moment in held.items()},
            }
        self._write_weights()

    def replicated_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all parameters and buffers; see `TrainEngine`."""
        return module_tensors(self.module)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every full trained parameter; see `TrainEngine`."""
        for name, weight, master in zip(self._names, self._weights, self._masters, strict=True):
            yield name, self._full_tensor(master.detach(), weight)

    def _full_tensor(self, part: Tensor, weight: nn.Parameter) -> Tensor:  # noqa: ARG002  # for subclasses
        """Return the full tensor, given this worker's part, which is sharded as the weight is."""
        return part.cpu()

    def scalar_state(self) -> dict[str, float]:
        """Return the applied steps and the loss scaler's state; see `TrainEngine`."""
        state: dict[str, float] = {"num_applied": self._num_applied}
        if self._scaler.is_enabled():
            scaler = self._scaler.state_dict()
            state |= {"loss_scale": scaler["scale"], "num_good": scaler["_growth_tracker"]}
        return state

    def load_scalar_state(self, state: dict[str, float]) -> None:
        """Restore what `scalar_state` returned; see `TrainEngine`."""
        self._num_applied = int(state["num_applied"])
        for moments in self._optimizer.state.values():
            moments["step"].fill_(self._num_applied)
        if self._scaler.is_enabled():
            mine = {"scale": state["loss_scale"], "_growth_tracker": int(state["num_good"])}
            self._scaler.load_state_dict(self._scaler.state_dict() | mine)


def _all_reduce(gradients: list[Tensor]) -> None:
    """Sum tensors over the workers in place, in one all-reduce."""
    if len(gradients) == 1:
        dist.all_reduce(gradients[0])
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
