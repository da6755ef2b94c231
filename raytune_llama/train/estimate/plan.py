"""What a run will take, found without weights, without Ray and without a token store.

    plan = build_plan(config)

Counts and memory come from the run's own model on PyTorch's meta device: its config.json, the
adapter and the engine settings. `memory.py` says where each number of a worker's memory is from.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import peft
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from raytune_llama.config.settings import ConfigError, identity
from raytune_llama.data.batches.step_batches import num_micro_batches
from raytune_llama.data.build.preparation import DataInputs
from raytune_llama.data.store.manifest import MANIFEST_NAME, token_dtype
from raytune_llama.data.store.token_store import TokenStore, open_store
from raytune_llama.model.embeddings import train_embeddings
from raytune_llama.model.llama import DTYPES, SummedLoss, build_empty_model, has_weights
from raytune_llama.model.lora import attach_adapter
from raytune_llama.model.pissa import INITIAL_ADAPTER, add_initial_adapter
from raytune_llama.model.quantization import quantized_bytes, quantized_linears
from raytune_llama.model.vocab import (
    VocabularyFit,
    check_vocabulary,
    new_ids,
    num_embedding_rows,
)
from raytune_llama.storage.place import Place
from raytune_llama.tokenizer.loader import encode_text
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig
from raytune_llama.train.engines.config import STRATEGIES, ShardingLayout
from raytune_llama.train.engines.deepspeed_zero import deepspeed_config
from raytune_llama.train.estimate.memory import (
    ParameterCounts,
    WorkerMemory,
    count_parameters,
    estimate_memory,
)
from raytune_llama.train.estimate.schemes import QuantizedWeights, WorkerSettings
from raytune_llama.train.estimate.trace import META_DEVICE, trace_micro_batch
from raytune_llama.train.inputs import build_batch_plan, build_sources
from raytune_llama.train.orchestration.nodes import is_submitted_job
from raytune_llama.train.preflight import check_identity, open_inputs, resolve_places
from raytune_llama.train.untrained_rows import modules_to_save

CHECKPOINT_BYTES_PER_PARAMETER = 3 * 4
"""Of each trained number: weight and AdamW's two moments, in float32."""

STORE_BYTES_PER_DOCUMENT = 28
"""Of each document in a token store beside its ids: where they end, the bytes of its text, its
source and its place there."""

_SAMPLE_CHARS = 2**20


@dataclass(frozen=True)
class StepPlan:
    """The steps of a run."""

    num_steps: int | None
    """Optimizer steps; None where epochs decide them and there is no token store yet."""

    step_tokens: int
    """Tokens of a full step over all workers, padding included."""

    epochs: dict[str, float] | None
    """Of each source; None without a token store."""


@dataclass(frozen=True)
class WorkersPlan:
    """What a run takes with one number of workers."""

    num_workers: int
    """Processes that train."""

    num_micro_batches: int
    """Forward passes of each worker in a step."""

    filler_sequences: int
    """Sequences of a step without targets, where the workers' shares do not come out even."""

    memory: tuple[WorkerMemory, ...]
    """Of a worker, by layout, as configured else."""

    memory_toggled: tuple[WorkerMemory, ...]
    """The same with `protocol.gradient_checkpointing` the other way."""


@dataclass(frozen=True)
class DiskPlan:
    """Bytes that a run writes."""

    checkpoint: int
    """Of one checkpoint."""

    num_checkpoints: int
    """That are kept; one more is there while it is written."""

    result: int
    """Of the adapter or the model."""

    store: int | None
    """Of the token store; None where it cannot be estimated."""

    store_exists: bool
    """Whether it is there, so that its size is no estimate."""


@dataclass(frozen=True)
class RunPlan:
    """What a run will take."""

    config: AnyTrainConfig
    """Of the run, as it was written."""

    has_weights: bool
    """Whether the model's directory holds weights."""

    vocabulary: VocabularyFit
    """The tokenizer and the model's rows."""

    counts: ParameterCounts
    """Of the model with its adapter, its vocabulary grown."""

    workers: tuple[WorkersPlan, ...]
    """With the number of workers; with the fewest and the most of an elastic run."""

    steps: StepPlan
    """Steps and epochs."""

    disk: DiskPlan
    """Disk."""


def build_plan(config: AnyTrainConfig) -> RunPlan:
    """Plan a run; nothing is written.

    Raises:
        ConfigError: everything that would keep the run from starting, missing weights excepted.
    """
    written = config
    config = resolve_places(config, in_job=is_submitted_job())
    inputs = open_inputs(config)
    check_identity(config.run_place, {"config": identity(config)})
    path = Path(config.model.path)
    num_rows = num_embedding_rows(inputs.skeleton)
    fit = check_vocabulary(num_rows, path, Path(config.model.tokenizer_path))
    model = build_model(config, build_empty_model(path, num_rows=max(fit.num_rows, fit.num_ids)))
    store = _existing_store(config)
    scale = config.scale
    return RunPlan(
        config=written,
        has_weights=has_weights(path),
        vocabulary=fit,
        counts=count_parameters(model),
        workers=tuple(
            plan_workers(config, model, number)
            for number in sorted({scale.min_workers, scale.max_workers})
        ),
        steps=plan_steps(config, store),
        disk=plan_disk(config, model, inputs.data, store),
    )


def build_model(config: AnyTrainConfig, skeleton: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """Give a model without weights the adapter that the run trains, or freeze what it does not."""
    with META_DEVICE:
        if isinstance(config, PretrainConfig) and config.train == "embeddings":
            ids = new_ids(Path(config.model.path), Path(config.model.tokenizer_path))
            train_embeddings(skeleton, config.embeddings, ids)
        if config.lora is not None:
            attached = attach_adapter(skeleton, config.lora, seed=config.seed)
            if config.lora.init == "pissa":
                add_initial_adapter(attached)
            return attached
        if config.adapter is not None:
            settings = peft.PeftConfig.from_pretrained(config.adapter)
            settings.inference_mode = False
            attached = peft.get_peft_model(skeleton, settings)
            assert isinstance(attached, PeftModel)
            return attached
    return skeleton


def plan_workers(
    config: AnyTrainConfig, model: PreTrainedModel | PeftModel, num_workers: int
) -> WorkersPlan:
    """Plan a step and a worker's memory with a number of workers."""
    batch, toggled = config.batch, not config.engine.gradient_checkpointing
    count = num_micro_batches(batch.sequences_per_step, batch.micro_batch_sequences, num_workers)
    rows = count * batch.micro_batch_sequences * num_workers
    return WorkersPlan(
        num_workers=num_workers,
        num_micro_batches=count,
        filler_sequences=rows - batch.sequences_per_step,
        memory=plan_memory(config, model, num_workers),
        memory_toggled=plan_memory(config, model, num_workers, gradient_checkpointing=toggled),
    )


def plan_memory(
    config: AnyTrainConfig,
    model: PreTrainedModel | PeftModel,
    num_workers: int,
    *,
    gradient_checkpointing: bool | None = None,
) -> tuple[WorkerMemory, ...]:
    """Estimate a worker's memory for each layout that the run's device and settings allow.

    Args:
        config: of the run.
        model: on the meta device, with its adapter; it is cast to the run's precision.
        num_workers: that train.
        gradient_checkpointing: instead of the engine's setting.
    """
    engine, batch, scale = config.engine, config.batch, config.scale
    count = num_micro_batches(batch.sequences_per_step, batch.micro_batch_sequences, num_workers)
    try:
        json = deepspeed_config(
            engine,
            config.optim,
            micro_batch_sequences=batch.micro_batch_sequences,
            num_micro_batches=count,
        )
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    trace = trace_micro_batch(
        SummedLoss(model, neftune_alpha=config.optim.neftune_alpha).to(DTYPES[engine.precision]),
        micro_batch_sequences=batch.micro_batch_sequences,
        sequence_tokens=batch.sequence_tokens,
        isolate_documents=batch.isolates_documents,
        gradient_checkpointing=engine.gradient_checkpointing
        if gradient_checkpointing is None
        else gradient_checkpointing,
        on_gpu=scale.use_gpu,
    )
    settings = WorkerSettings(
        precision=engine.precision,
        optim=config.optim,
        num_workers=num_workers,
        on_gpu=scale.use_gpu,
        num_micro_batches=count,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
        zero=json["zero_optimization"],
        quantized=_measure_quantized(config),
    )
    return tuple(
        estimate_memory(model, trace, settings, layout) for layout in _possible_layouts(config)
    )


def _possible_layouts(config: AnyTrainConfig) -> tuple[ShardingLayout, ...]:
    is_quantized = config.model.quantization is not None
    is_fp16_on_cpus = config.engine.precision == "fp16" and not config.scale.use_gpu
    possible = {
        layout
        for traits in STRATEGIES.values()
        if (traits.takes_quantized or not is_quantized)
        and (traits.has_fp16_on_cpus or not is_fp16_on_cpus)
        for layout in traits.layouts
    }
    return tuple(layout for layout in get_args(ShardingLayout) if layout in possible)


def _measure_quantized(config: AnyTrainConfig) -> QuantizedWeights | None:
    kind = config.model.quantization
    if kind is None:
        return None
    skeleton = build_empty_model(Path(config.model.path))
    layers = quantized_linears(skeleton, modules_to_save(config))
    shapes = [layer.weight.shape for _, layer in layers]
    return QuantizedWeights(
        numel=sum(shape.numel() for shape in shapes),
        storage_bytes=sum(quantized_bytes(kind, shape) for shape in shapes),
        largest=max(shape.numel() for shape in shapes),
    )


def plan_steps(config: AnyTrainConfig, store: TokenStore | None) -> StepPlan:
    """Count steps and tokens; epochs and, where they decide, steps need the token store."""
    batch = config.batch
    num_steps, epochs = config.max_steps, None
    if store is not None:
        sources = build_sources(config, store)
        plan = build_batch_plan(config, sources)
        num_steps = plan.num_steps
        epochs = {
            source.name: share * plan.total_positions / source.sequences.num_sequences
            for source, share in zip(sources, plan.order.shares, strict=True)
        }
    return StepPlan(
        num_steps=num_steps,
        step_tokens=batch.sequences_per_step * batch.sequence_tokens,
        epochs=epochs,
    )


def plan_disk(
    config: AnyTrainConfig,
    model: PreTrainedModel | PeftModel,
    data: DataInputs,
    store: TokenStore | None,
) -> DiskPlan:
    """Estimate what the run writes.

    An adapter is written in float32, a tied table under each of its names; a model in the run's
    precision.
    """
    counts = count_parameters(model)
    if isinstance(config, PretrainConfig) and config.train == "embeddings":
        # The base's files with other tables, in its own precision; new rows stand beside the table.
        rows = counts.trained if config.embeddings.new_rows_only else 0
        dtype = getattr(model.config, "dtype", None) or torch.float32
        result = (counts.unique - rows) * dtype.itemsize
    elif config.train == "full":
        result = counts.unique * DTYPES[config.engine.precision].itemsize
    else:
        named = model.named_parameters(remove_duplicate=False)
        # What PiSSA started from is part of its result.
        result = 4 * sum(
            p.numel() for n, p in named if p.requires_grad or f".{INITIAL_ADAPTER}." in n
        )
    checkpoint = config.checkpoint
    return DiskPlan(
        checkpoint=CHECKPOINT_BYTES_PER_PARAMETER * counts.trained,
        num_checkpoints=checkpoint.keep_last + checkpoint.keep_best,
        result=result,
        store=_estimate_store(config, data) if store is None else _store_bytes(store),
        store_exists=store is not None,
    )


def _existing_store(config: AnyTrainConfig) -> TokenStore | None:
    place = Place.parse(config.data.store_dir, "data.store_dir")
    return open_store(config.data) if (place / MANIFEST_NAME).exists() else None


def _store_bytes(store: TokenStore) -> int:
    splits = store.manifest.splits.values()
    return sum(shard.file_bytes for split in splits for shard in split.shards)


def _estimate_store(config: AnyTrainConfig, data: DataInputs) -> int | None:
    """Estimate a store from the sources' bytes, with the tokens of a sample of the corpus.

    As if all bytes were text. Compressed and Parquet files do not show how much they hold, and
    files of conversations are much besides them.
    """
    if not isinstance(config, PretrainConfig):
        return None
    files = data.corpus.files
    if any(f.options.compression != "none" or f.options.format == "parquet" for f in files):
        return None
    tokenizer = data.tokenizer
    texts = list(_first(data.corpus.sample_texts(), _SAMPLE_CHARS))
    sampled = sum(len(text.encode()) for text in texts)
    ends = config.data.bos + config.data.eos
    tokens = sum(len(ids) + ends for ids in encode_text(tokenizer, texts))
    number = 2 if token_dtype(max(tokenizer.get_vocab().values()) + 1) == "uint16" else 4
    share = sum(file.status.num_bytes for file in files) / max(1, sampled)
    return math.ceil(share * (tokens * number + len(texts) * STORE_BYTES_PER_DOCUMENT))


def _first(texts: list[str], num_chars: int) -> Iterator[str]:
    for text in texts:
        if num_chars <= 0 or not text.strip():
            continue
        yield text
        num_chars -= len(text)
