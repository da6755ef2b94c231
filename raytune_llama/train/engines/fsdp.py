"""PyTorch's FSDP2 behind the engine protocol: every weight cut into a part a worker.

A decoder layer's weights are whole only while it computes, and those outside of the layers (the
embeddings, the last norm, the output projection, which the loss reads whole) from the beginning of
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
from raytune_llama.model.llama import DTYPES, Precision, SummedLoss, decoder_layers
from raytune_llama.train.engines.config import EngineConfig
from raytune_llama.train.engines.ddp import DataParallelEngine
from raytune_llama.train.engines.optimizer import OptimConfig
from raytune_llama.train.process_group import ProcessGroup, ensure_process_group


class FullyShardedEngine(DataParallelEngine):
    """A step of `DataParallelEngine` on parts: the optimizer sees only what this worker holds.

    Gradients are summed over the workers in float32 after each micro-batch, as FSDP does not keep
    whole gradients. All that is trained is sharded in float32, all else in the run's precision.
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
            # Sums of half-precision gradients lose digits with every worker and micro-batch.
            reduce_dtype=torch.float32,
            # Layers get what the model gives them: angles of rotary embeddings stay precise.
            cast_forward_inputs=False,
        )
        on_gpu = self._workers.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=on_gpu) if self._offload else OffloadPolicy()
        for each in [*decoder_layers(module.model), module]:
            fully_shard(each, mesh=self._mesh, mp_policy=policy, offload_policy=offload)
            sharded = cast("FSDPModule", each)
            # Ours is a sum over the whole step, FSDP's an average; gloo knows sums only.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        register_fsdp_forward_method(module, "loss_from_logits")

    def _master_of(self, weight: nn.Parameter) -> nn.Parameter:
        # The same memory: what the optimizer writes is what is gathered next.
        return nn.Parameter(_local(weight))

    def _collect_gradients(self) -> None:
        """Nothing: FSDP adds the micro-batches up where the masters look for them."""

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
        """Let go of weights that a pass without a backward pass has left whole."""
        for each in self.module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()

    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch; see `Engine`; collective."""
        loss = super().loss_sum(batch)
        self._reshard()
        return loss

    def replicated_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: every worker holds other parts; see `Engine`."""
        return iter(())

    def _full_tensor(self, part: Tensor, weight: nn.Parameter) -> Tensor:
        sharded = cast("DTensor", weight)
        whole = DTensor.from_local(
            part.to(self._workers.device),
            self._mesh,
            [Shard(0)],
            shape=sharded.shape,
            stride=sharded.stride(),
        )
        return whole.full_tensor().cpu()

    def _kept_ranges(self) -> list[tuple[int, int]]:
        firsts = [self._first_held(weight) for weight in self._weights]
        return [
            (first, first + master.numel())
            for first, master in zip(firsts, self._masters, strict=True)
        ]

    def _first_held(self, weight: nn.Parameter) -> int:
        # As FSDP cuts: pieces of so many rows, the last ones smaller or empty.
        num_rows = weight.shape[0]
        piece = math.ceil(num_rows / self._workers.world_size)
        return min(self._workers.rank * piece, num_rows) * (weight.numel() // num_rows)


def _local(tensor: Tensor) -> Tensor:
    """Return this worker's part of a sharded tensor, in the same memory."""
    return cast("DTensor", tensor).to_local().detach()
