"""Builds the training engine: load the base, select the trained parameters, place the weights."""

import logging

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from raytune_llama.data.batches.step_batches import BatchPlan
from raytune_llama.logs import waiting
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.config import LoraConfig
from raytune_llama.model.embeddings import train_embeddings
from raytune_llama.model.llama import SummedLoss, load_model
from raytune_llama.model.lora import attach_adapter, load_adapter
from raytune_llama.model.pissa import apply_principal_factors
from raytune_llama.model.vocab import new_ids
from raytune_llama.storage.directories import fetched
from raytune_llama.train.checkpoint.initial_adapter import initial_factors
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig
from raytune_llama.train.engines.ddp import DataParallelEngine
from raytune_llama.train.engines.fsdp import FullyShardedEngine
from raytune_llama.train.engines.protocol import TrainEngine
from raytune_llama.train.process_group import ProcessGroup
from raytune_llama.train.untrained_rows import modules_to_save

logger = logging.getLogger(__name__)


def build_engine(config: AnyTrainConfig, plan: BatchPlan, workers: ProcessGroup) -> TrainEngine:
    """Load the base, select the trained parameters, and only then place or shard the weights."""
    with waiting(logger, f"loading the model {config.model.path}", usually="2 to 10 s per GB"):
        model = load_model(
            config.model,
            config.engine.precision,
            workers.device,
            modules_to_save=modules_to_save(config),
        )
    if config.engine.gradient_checkpointing:
        # Reentrant checkpointing needs an input that requires grad; frozen embeddings give none.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = build_module(config, model, workers)
    if config.engine.strategy == "ddp":
        return DataParallelEngine(module, config.engine.precision, config.optim, workers)
    if config.engine.strategy == "fsdp":
        return FullyShardedEngine(module, config.engine, config.optim, workers)
    from raytune_llama.train.engines.deepspeed_zero import DeepSpeedEngine

    return DeepSpeedEngine(
        module,
        config.engine,
        config.optim,
        workers,
        micro_batch_sequences=plan.micro_batch_sequences,
        num_micro_batches=plan.num_micro_batches(workers.world_size),
    )


def build_module(
    config: AnyTrainConfig, model: PreTrainedModel, workers: ProcessGroup
) -> SummedLoss:
    """Select what a run trains of its base, or attach it, and add the loss; collective."""
    trained: nn.Module = model
    if config.lora is not None:
        trained = build_adapter(config, config.lora, model, workers)
    elif config.adapter is not None:
        trained = load_adapter(model, Adapter.open(fetched(config.adapter), field="adapter"))
    elif isinstance(config, PretrainConfig) and config.train == "embeddings":
        ids = new_ids(fetched(config.model.path), fetched(config.model.tokenizer_path))
        train_embeddings(model, config.embeddings, ids)
    return SummedLoss(trained, neftune_alpha=config.optim.neftune_alpha)


def build_adapter(
    config: AnyTrainConfig, lora: LoraConfig, model: PreTrainedModel, workers: ProcessGroup
) -> PeftModel:
    """Attach a new adapter, with the initial values of the run's first start; collective."""
    attached = attach_adapter(model, lora, seed=config.seed)
    if lora.init == "pissa":
        apply_principal_factors(attached, initial_factors(config.run_place, attached, workers))
    return attached
