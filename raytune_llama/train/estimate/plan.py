"""What a run will take, found without weights or Ray: `print(render_plan(build_plan(config)))`."""

import math
import textwrap
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import peft
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from raytune_llama.config.settings import identity, rename_fields
from raytune_llama.data.batches.step_batches import num_micro_batches
from raytune_llama.data.build.preparation import DataInputs, describe_inputs
from raytune_llama.data.build.text_corpus import document_ends
from raytune_llama.data.config import AnyDataConfig
from raytune_llama.data.store.lengths import LengthTable
from raytune_llama.data.store.manifest import (
    MANIFEST_NAME,
    StoreError,
    check_fingerprint,
    token_dtype,
)
from raytune_llama.data.store.token_store import TokenStore, open_store
from raytune_llama.model.embeddings import train_embeddings
from raytune_llama.model.llama import DTYPES, build_empty_model, has_weights
from raytune_llama.model.lora import attach_adapter
from raytune_llama.model.pissa import INITIAL_ADAPTER, add_initial_adapter
from raytune_llama.model.vocab import VocabularyFit, new_ids
from raytune_llama.storage.directories import fetched
from raytune_llama.storage.place import Place, is_submitted_job
from raytune_llama.tokenizer.loader import encode_text
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig
from raytune_llama.train.control_rows import find_unseen_tokens
from raytune_llama.train.estimate.lengths import measure_lengths, render_lengths
from raytune_llama.train.estimate.memory import (
    ParameterCounts,
    WorkerMemory,
    count_parameters,
    plan_memory,
)
from raytune_llama.train.estimate.trace import META_DEVICE
from raytune_llama.train.fetched_inputs import fetch_inputs
from raytune_llama.train.identity import check_run, keep_recorded_bos
from raytune_llama.train.inputs import (
    build_batch_plan,
    build_sources,
    find_horizon_warnings,
    text_store_config,
)
from raytune_llama.train.preflight import Inputs, open_inputs, resolve_places
from raytune_llama.train.texts import FIELD_NAMES

STORE_BYTES_PER_DOCUMENT = 28
"""Bytes per document in a token store in addition to its ids."""

_NOTES = """\
gathered: weights in full while used; buffers: to reduce and apply gradients; loss: logit chunks.
* as configured. Not all parts exist at the same time, so the peak is less than their sum.
Not counted: Python and its libraries, and what an allocator or a driver keeps in addition."""


class StepPlan(NamedTuple):
    """Steps of a run, and epochs per source; None if they need a token store to exist."""

    num_steps: int | None
    step_tokens: int
    epochs: dict[str, float] | None


class WorkersPlan(NamedTuple):
    """A step of each worker and its memory by layout; filler sequences have no targets."""

    num_workers: int
    num_micro_batches: int
    filler_sequences: int
    memory: tuple[WorkerMemory, ...]


class DiskPlan(NamedTuple):
    """Bytes that a run that trains writes; there is one more checkpoint while it is written."""

    checkpoint: int
    num_checkpoints: int
    result: int
    store: int | None
    store_exists: bool


class RunPlan(NamedTuple):
    """What a run will take; an elastic run with its fewest and with its most workers."""

    config: AnyTrainConfig
    has_weights: bool
    vocabulary: VocabularyFit
    counts: ParameterCounts
    workers: tuple[WorkersPlan, ...]
    steps: StepPlan
    disk: DiskPlan
    lengths: LengthTable
    warnings: tuple[str, ...]


def build_plan(config: AnyTrainConfig) -> RunPlan:
    """Plan a run; nothing is written.

    Raises:
        ConfigError: everything that would keep the run from starting, except missing weights.
    """
    written = config
    config = resolve_places(config, in_job=is_submitted_job())
    fetch_inputs(config, weights=False)
    config = keep_recorded_bos(config, config.run_place)
    inputs = open_inputs(config)
    check_run(config, {"config": identity(config)})
    path = fetched(config.model.path)
    fit = inputs.vocabulary
    model = build_model(config, build_empty_model(path, num_rows=max(fit.num_rows, fit.num_ids)))
    place = Place.parse(config.data.store_dir, "data.store_dir")
    store = open_store(config.data) if (place / MANIFEST_NAME).exists() else None
    counts = count_parameters(model)
    steps, warnings = plan_steps(config, store)
    if store is not None:
        warnings += find_unseen_tokens(config, inputs.data.tokenizer, fit, store)
        warnings += _find_stale_store(config.encoded_data, inputs.data, store)
    warnings += _find_stale_texts(config, inputs)
    numbers = {config.scale.min_workers, config.scale.max_workers}
    return RunPlan(
        config=written,
        has_weights=has_weights(path),
        vocabulary=fit,
        counts=counts,
        workers=tuple(plan_workers(config, model, number) for number in sorted(numbers)),
        steps=steps,
        disk=DiskPlan(
            checkpoint=counts.checkpoint_bytes,
            num_checkpoints=config.checkpoint.keep_last + config.checkpoint.keep_best,
            result=_result_bytes(config, model),
            store=_store_bytes(config, inputs.data, store),
            store_exists=store is not None,
        ),
        lengths=measure_lengths(inputs.data, store),
        warnings=(*inputs.warnings, *warnings),
    )


def _find_stale_store(config: AnyDataConfig, data: DataInputs, store: TokenStore) -> list[str]:
    """Return the error with which the run would refuse a store that was built from other inputs."""
    try:
        recorded = store.manifest.fingerprint
        wanted = describe_inputs(config, data, like=recorded)
        check_fingerprint(store.place, store.manifest.inputs, wanted)
    except StoreError as error:
        return [f"the run would be refused: {error}"]
    return []


def _find_stale_texts(config: AnyTrainConfig, inputs: Inputs) -> list[str]:
    """Return the error with which the run would refuse the existing token store of `eval.texts`."""
    wanted = text_store_config(config)
    if wanted is None or inputs.texts is None:
        return []
    if not (Place.parse(wanted.store_dir, "eval.store_dir") / MANIFEST_NAME).exists():
        return []
    found = _find_stale_store(wanted, inputs.texts, open_store(wanted))
    return [rename_fields(text, FIELD_NAMES) for text in found]


def build_model(config: AnyTrainConfig, skeleton: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """Attach the run's adapter to a model without weights, or freeze what is not trained."""
    with META_DEVICE:
        if isinstance(config, PretrainConfig) and config.train == "embeddings":
            ids = new_ids(fetched(config.model.path), fetched(config.model.tokenizer_path))
            train_embeddings(skeleton, config.embeddings, ids)
        if config.lora is not None:
            attached = attach_adapter(skeleton, config.lora, seed=config.seed)
            if config.lora.init == "pissa":
                add_initial_adapter(attached)
            return attached
        if config.adapter is not None:
            settings = peft.PeftConfig.from_pretrained(str(fetched(config.adapter)))
            settings.inference_mode = False
            attached = peft.get_peft_model(skeleton, settings)
            assert isinstance(attached, PeftModel)
            return attached
    return skeleton


def plan_workers(config: AnyTrainConfig, model: nn.Module, num_workers: int) -> WorkersPlan:
    """Plan a step and a worker's memory with a given number of workers."""
    total, rows = config.batch.sequences_per_step, config.batch.micro_batch_sequences
    count = num_micro_batches(total, rows, num_workers)
    filler = count * rows * num_workers - total
    return WorkersPlan(num_workers, count, filler, plan_memory(config, model, num_workers))


def plan_steps(config: AnyTrainConfig, store: TokenStore | None) -> tuple[StepPlan, list[str]]:
    """Count steps and tokens, and the epochs that an existing token store allows.

    Returns:
        The steps, and warnings about them, as far as they are known.
    """
    step_tokens = config.batch.sequences_per_step * config.batch.sequence_tokens
    if store is None:
        known = config.max_steps or 0
        steps = StepPlan(config.max_steps, step_tokens, None)
        return steps, find_horizon_warnings(config, known, None)
    sources = build_sources(config, store)
    plan = build_batch_plan(config, sources)
    epochs = {
        source.name: share * plan.total_positions / source.sequences.num_sequences
        for source, share in zip(sources, plan.order.shares, strict=True)
    }
    steps = StepPlan(plan.num_steps, step_tokens, epochs)
    return steps, find_horizon_warnings(config, plan.num_steps, sum(plan.order.source_sequences))


def _result_bytes(config: AnyTrainConfig, model: PreTrainedModel | PeftModel) -> int:
    counts = count_parameters(model)
    if isinstance(config, PretrainConfig) and config.train == "embeddings":
        # A copy of the base in its own precision. `model` has new rows in addition to the table.
        new_rows = counts.trained if config.embeddings.new_rows_only else 0
        dtype = getattr(model.config, "dtype", None) or torch.float32
        return (counts.unique - new_rows) * dtype.itemsize
    if config.train == "full":
        return counts.unique * DTYPES[config.engine.precision].itemsize
    # An adapter is in float32, with a tied table under each of its names, and with the factors that
    # PiSSA started from.
    named = model.named_parameters(remove_duplicate=False)
    written = [p for n, p in named if p.requires_grad or f".{INITIAL_ADAPTER}." in n]
    return 4 * sum(parameter.numel() for parameter in written)


def _store_bytes(config: AnyTrainConfig, data: DataInputs, store: TokenStore | None) -> int | None:
    """Return a store's size, estimated from a sample as if the sources were nothing but text."""
    if store is not None:
        splits = store.manifest.splits.values()
        return sum(shard.file_bytes for split in splits for shard in split.shards)
    if not isinstance(config, PretrainConfig):
        return None
    options = [each.options for each in data.corpus.files]
    if any(each.compression != "none" or each.is_table for each in options):
        return None
    # A quarter of the sample is enough, and is encoded within seconds.
    texts = [text for text in data.corpus.sample_texts() if text.strip()][::4]
    num_ids = sum(len(ids) for ids in encode_text(data.tokenizer, texts))
    ends = document_ends(config.data, data.tokenizer)
    num_ids += len(texts) * sum(id_ is not None for id_ in ends)
    id_bytes = 2 if token_dtype(max(data.tokenizer.get_vocab().values()) + 1) == "uint16" else 4
    sampled_bytes = sum(len(text.encode()) for text in texts)
    share = sum(each.status.num_bytes for each in data.corpus.files) / max(1, sampled_bytes)
    return math.ceil(share * (num_ids * id_bytes + len(texts) * STORE_BYTES_PER_DOCUMENT))


def render_plan(plan: RunPlan) -> str:
    """Return a plan as text for a terminal, at most 100 columns wide."""
    lines = [f"{name:<13}{text}" for name, text in _facts(plan)]
    tables = [line for workers in plan.workers for line in ("", *_memory_table(plan, workers))]
    warnings = [line for text in plan.warnings for line in _wrapped("warning", text)]
    lengths = render_lengths(plan.config, plan.lengths)
    return "\n".join([*lines, "", *lengths, *tables, _NOTES, *warnings])


def _wrapped(label: str, text: str) -> list[str]:
    first = f"{label:<13}"
    indent = " " * len(first)
    return textwrap.wrap(
        text,
        width=100,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _facts(plan: RunPlan) -> Iterator[tuple[str, str]]:
    config, counts, steps, disk = plan.config, plan.counts, plan.steps, plan.disk
    batch, fit = config.batch, plan.vocabulary
    rows = max(fit.num_rows, fit.num_ids)
    yield "model", f"{config.model.path}{'' if plan.has_weights else ', no weights there yet'}"
    yield "vocabulary", f"{fit.num_ids:,} ids, {rows:,} rows, {rows - fit.num_rows:,} of them new"
    yield "parameters", f"{counts.unique:,}"
    yield "  trained", f"{counts.trained:,} ({counts.trained / counts.unique:.4%})"
    if counts.resident != counts.unique:
        frozen = counts.resident - counts.unique
        yield "  in memory", f"{counts.resident:,}, with {frozen:,} of saved modules' originals"
    number = "unknown number" if steps.num_steps is None else f"{steps.num_steps:,}"
    yield (
        "steps",
        "none: max_steps=0 evaluates and ends"
        if steps.num_steps == 0
        else f"{number} of {batch.sequences_per_step:,} sequences",
    )
    total = steps.step_tokens * (steps.num_steps or 0)
    in_all = f", {total:,} in all" if total else ""
    yield (
        "tokens",
        f"{steps.step_tokens:,} per step, {batch.sequence_tokens:,} per sequence{in_all}",
    )
    for each in plan.workers:
        share = f"{each.num_micro_batches} x {batch.micro_batch_sequences} sequences per step"
        yield "workers", f"{each.num_workers}, each {share}, {each.filler_sequences} filler in all"
    if steps.epochs is None:
        yield "epochs", "unknown until the token store is built"
    for name, epochs in (steps.epochs or {}).items():
        yield "epochs", f"{epochs:.4g} of {name}"
    if steps.num_steps != 0:
        yield from _written_facts(plan)
    if disk.store is None:
        yield "token store", "unknown: estimated only for uncompressed text and JSON"
    else:
        how = ", there" if disk.store_exists else ", estimated from a sample of the sources"
        yield "token store", f"{_gib(disk.store)} GiB{how}"


def _written_facts(plan: RunPlan) -> Iterator[tuple[str, str]]:
    config, disk = plan.config, plan.disk
    checkpoint, most = _gib(disk.checkpoint), _gib((disk.num_checkpoints + 1) * disk.checkpoint)
    kept = f"{disk.num_checkpoints} kept and one while it is written: {most} GiB"
    yield "checkpoints", f"{checkpoint} GiB each, {kept}"
    if config.checkpoint.background:
        yield "  copied", f"{checkpoint} GiB of the nodes' memory together, to be written"
    yield "result", f"{config.result_name}, {_gib(disk.result)} GiB"


def _memory_table(plan: RunPlan, workers: WorkersPlan) -> Iterator[str]:
    engine, scale, kind = plan.config.engine, plan.config.scale, plan.config.model.quantization
    who = f"1 of {workers.num_workers} workers" if scale.elastic_range else "a worker"
    base = f", {kind} base" if kind else ""
    title = f"GiB of {who} on a {'GPU' if scale.use_gpu else 'CPU'}, {engine.precision}{base}"
    layouts = [memory.layout for memory in workers.memory]
    yield _row(title, [f"{each}{'*' if each == engine.layout else ''}" for each in layouts])
    for field in WorkerMemory._fields[1:]:
        sizes = [getattr(memory, field) for memory in workers.memory]
        if any(sizes):
            yield _row(field, map(_gib, sizes))


def _row(label: str, cells: Iterable[str]) -> str:
    return f"{label:<36}" + "".join(f"{cell:>10}" for cell in cells)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f}"
