"""Training engine for PyTorch's FSDP2: every weight is sharded over the workers.

A decoder layer's weights are gathered only while it computes; those outside the layers (the
embeddings, the final norm, the output projection, which the loss reads in full) from the start of
the forward pass to the end of the backward pass.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from raytune_llama.data.batches.step_batches import MicroBatch
from raytune_llama.model.config import Precision
from raytune_llama.model.llama import DTYPES, SummedLoss, decoder_layers
from raytune_llama.train.engines.config import EngineConfig, OptimConfig
from raytune_llama.train.engines.ddp import DataParallelEngine
from raytune_llama.train.process_group import ProcessGroup, ensure_process_group


class FullyShardedEngine(DataParallelEngine):
    """`DataParallelEngine` on shards: the optimizer sees only what this worker holds.

    Gradients are reduced in float32 after each micro-batch, as FSDP does not keep full gradients.
    Trained parameters are sharded in float32, all others in the run's precision.
    """

    def __init__(
        self, module: SummedLoss, engine: EngineConfig, optim: OptimConfig, workers: ProcessGroup
    ) -> None:
        ensure_process_group(workers.device)
        self._offload = engine.offload_parameters
        group = dist.group.WORLD
        assert group is not None
        self._mesh = DeviceMesh.from_group(group, workers.device.type)
        super().__init__(module, engine.precision, optim, workers)

    def _place(self, precision: Precision) -> None:
        module, dtype = self.module, DTYPES[precision]
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            # Half-precision sums of gradients lose accuracy with every worker and micro-batch.
            reduce_dtype=torch.float32,
            # Layer inputs are not cast, so that rotary embedding angles stay precise.
            cast_forward_inputs=False,
        )
        on_gpu = self._workers.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if self._offload else OffloadPolicy()
        for each in [*decoder_layers(module.model), module]:
            fully_shard(each, mesh=self._mesh, mp_policy=policy, offload_policy=offload)
            sharded = cast("FSDPModule", each)
            # Our loss is a sum over the full step, while FSDP averages; gloo supports sums only.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(module, "loss_from_logits")

    def _master_of(self, weight: nn.Parameter) -> nn.Parameter:
        # Shares memory: the next all-gather reads what the optimizer writes.
        return nn.Parameter(_local(weight))

    def _collect_gradients(self) -> None:
        """Do nothing: FSDP accumulates gradients over micro-batches itself."""

    def _sum_gradients(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            gradient = weight.grad
            master.grad = torch.zeros_like(master) if gradient is None else _local(gradient)
            weight.grad = None

    def _squared_norm(self) -> float:
        return self._norm_held() ** 2

    @torch.no_grad()
    def _write_weights(self) -> None:
        self._reshard()
        for weight, master in zip(self._weights, self._masters, strict=True):
            held = _local(weight)
            if held.data_ptr() != master.data_ptr():
                held.copy_(master)

    def _reshard(self) -> None:
        """Free full weights that a forward pass without a backward pass leaves gathered."""
        for each in self.module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()

    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch; see `TrainEngine`; collective."""
        loss = super().loss_sum(batch)
        self._reshard()
        return loss

    def row_losses(self, batch: MicroBatch) -> list[float]:
        """Return the summed loss of each row of a batch; see `TrainEngine`; collective."""
        losses = super().row_losses(batch)
        self._reshard()
        return losses

    def replicated_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: each worker holds different shards; see `TrainEngine`."""
        return iter(())

    def _full_tensor(self, part: Tensor, weight: nn.Parameter) -> Tensor:
        sharded = cast("DTensor", weight)
        full = DTensor.from_local(
            part.to(self._workers.device),
            self._mesh,
            [Shard(0)],
            shape=sharded.shape,
            stride=sharded.stride(),
        )
        return full.full_tensor().cpu()

    def _kept_ranges(self) -> list[tuple[int, int]]:
        firsts = [self._first_held(weight) for weight in self._weights]
        return [
            (first, first + master.numel())
            for first, master in zip(firsts, self._masters, strict=True)
        ]

    def _first_held(self, weight: nn.Parameter) -> int:
        # As FSDP shards: an equal number of rows each, the last shards smaller or empty.
        num_rows = weight.shape[0]
        shard_rows = math.ceil(num_rows / self._workers.world_size)
        return min(self._workers.rank * shard_rows, num_rows) * (weight.numel() // num_rows)


def _local(tensor: Tensor) -> Tensor:
    """Return this worker's shard of a DTensor, in the same memory."""
    return cast("DTensor", tensor).to_local().detach()
