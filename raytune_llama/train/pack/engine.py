"""The training engine of one slot of a pack."""

from collections.abc import Mapping

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from raytune_llama.config.errors import UserError
from raytune_llama.data.batches.step_batches import BatchPlan, MicroBatch
from raytune_llama.model.llama import SummedLoss, causal_lm
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.engines.build import build_module
from raytune_llama.train.engines.ddp import DataParallelEngine
from raytune_llama.train.engines.protocol import to_device
from raytune_llama.train.pack.shared_model import Part, Scale, SharedModel, SlotRandom
from raytune_llama.train.pack.slot import HandIn, Slot
from raytune_llama.train.process_group import ProcessGroup


class SlotEngine(DataParallelEngine):
    """Data parallelism whose forward and backward passes run together with the other slots'.

    Optimizer, clipping, loss scaler, and the reduction over the workers are the slot's own.
    """

    def __init__(
        self, module: SummedLoss, config: AnyTrainConfig, workers: ProcessGroup, slot: Slot
    ) -> None:
        super().__init__(module, config.engine.precision, config.optim, workers)
        self._slot = slot
        self._layers = adapted_layers(module)

    def _add_gradients(self, batch: MicroBatch, seed: int, num_targets: float) -> Tensor:
        def scale(loss: Tensor) -> Tensor:
            return self._scaler.scale(loss / num_targets)

        return self._exchange(batch, seed, scale)

    def loss_sum(self, batch: MicroBatch) -> float:
        """Return the summed loss of a batch; see `TrainEngine`."""
        self.module.eval()
        loss = self._exchange(batch, 0, None)
        self.module.train()
        return loss.item()

    def _exchange(self, batch: MicroBatch, seed: int, scale: Scale | None) -> Tensor:
        device = self._workers.device
        random = SlotRandom(seed, device)
        part = Part(self.module, self._layers, *to_device(batch, device), random)
        progress = self._workers.progress
        mine, progress.thread_id = progress.thread_id, None
        try:
            return self._slot.exchange(HandIn(part, scale))
        finally:
            progress.thread_id = mine


def build_slot_engine(
    config: AnyTrainConfig,
    plan: BatchPlan,
    workers: ProcessGroup,
    *,
    shared: SharedModel,
    slot: Slot,
) -> SlotEngine:
    """Build the engine of a slot; its `plan` is not needed. Collective."""
    del plan
    module = build_module(config, shared.new_copy(), workers)
    return SlotEngine(module, config, workers, slot)


def adapted_layers(module: SummedLoss) -> Mapping[str, LoraLinear]:
    """Return the layers that an adapter adapts, by their names in the base model.

    Raises:
        UserError: the adapter does more than to add B A x to the output of linear layers; the
            checks before the run refuse what they can see in the config.
    """
    found: dict[str, LoraLinear] = {}
    num_trained = 0
    for name, layer in causal_lm(module.model).named_modules():
        if type(layer) is LoraLinear and not layer.lora_variant:
            found[name] = layer
            factors = (layer.lora_A, layer.lora_B)
            num_trained += sum(p.numel() for each in factors for p in each.parameters())
    tables = _tables(module)
    num_trained += sum(table.numel() for table in tables if table.requires_grad)
    wanted = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    if num_trained != wanted:
        raise UserError(
            f"lora: {wanted - num_trained} trained weights are neither A and B of linear layers "
            "nor embedding tables, and cannot be packed; set pack to null"
        )
    return found


def _tables(module: SummedLoss) -> set[torch.nn.Parameter]:
    lm = causal_lm(module.model)
    layers = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return {p for layer in layers if layer is not None for p in layer.parameters()}
