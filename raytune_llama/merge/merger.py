"""Merge adapters into a base, one tensor at a time, and verify every tensor of the result.

    merge_adapters(MergeConfig(base="llama", adapters=("plus", "alpaca-plus"), target="merged"))

How each weight is merged is in `plan.py`, the output formats in `export.py`, the verification in
`proof.py`.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig

import raytune_llama
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, override, to_dict
from raytune_llama.merge.config import MergeConfig
from raytune_llama.merge.export import (
    ExportResult,
    VerifiedShard,
    export_gguf,
    export_huggingface,
    export_meta,
    export_shard,
)
from raytune_llama.merge.gguf_file import gguf_dtype, plan_gguf
from raytune_llama.merge.logits import compare_logits, load_comparison_ids
from raytune_llama.merge.plan import MergePlan, check_adapters, plan_merge
from raytune_llama.model.adapter_lineage import LINEAGE_KEY, describe_merge
from raytune_llama.model.lineage import (
    CHAT_KEY,
    TEXT_KEY,
    TOKENIZER_KEY,
    TRACKERS_KEY,
    find_chat_template,
    find_text_start,
    find_trackers,
)
from raytune_llama.model.meta.layout import build_meta_params, check_target, count_published_shards
from raytune_llama.model.meta.to_meta import plan_meta, plan_tokenizer
from raytune_llama.model.tensors import TensorSpec
from raytune_llama.storage.directories import fetch_directory, fetched, pin_directory
from raytune_llama.storage.files import OUTPUT_MANIFEST, sync, write_json_atomic
from raytune_llama.storage.place import Place, check_place, check_writable
from raytune_llama.storage.transfers import is_published, publish_place
from raytune_llama.tokenizer.loader import hash_tokenizer

logger = logging.getLogger(__name__)

_MAX_THREADS = 8
"""Weights that are merged at once in one process; more would wait for the disk."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def merge_adapters(config: MergeConfig) -> None:
    """Merge adapters into a base and write the verified result to the target.

    Raises:
        ValueError: Files are missing or damaged, an adapter does not fit or would change nothing,
            the format cannot hold the model, or the target is not empty; nothing is written.
        AssertionError: Verification failed; nothing is written.
    """
    target = Place.parse(config.target, "target")
    _check_target(target)
    config = _pin(config)
    plan = _open_plan(config)
    check_adapters(plan)
    export = _prepare(config, plan)
    is_sampled = config.verify == "logits"
    lineage = [plan.base_dir, *(adapter.path for adapter in plan.adapters)]
    samples = (
        load_comparison_ids(plan.tokenizer_dir, config.verify_text, lineage) if is_sampled else None
    )
    inputs = plan.hash_inputs()
    with publish_place(target, last=OUTPUT_MANIFEST, entry="config.json") as folder:
        exported = export(folder)
        changed, tokenizer_dir = exported.num_changed, plan.tokenizer_dir
        if not changed:
            raise UserError("adapters: they change no weight: all updates are zero")
        if samples is not None:
            compare_logits(folder, plan, samples)
        chat = find_chat_template(lineage)
        manifest = {
            "format": 1,
            "kind": "model" if config.output_format == "huggingface" else config.output_format,
            "raytune_llama": raytune_llama.__version__,
            "merged": {"inputs": inputs, "changed": changed, "untied": plan.is_untied},
            TOKENIZER_KEY: hash_tokenizer(tokenizer_dir) if tokenizer_dir else None,
            LINEAGE_KEY: describe_merge(plan.base_dir, plan.adapters),
            CHAT_KEY: chat[1] if chat else None,
            TEXT_KEY: find_text_start(lineage),
            TRACKERS_KEY: find_trackers(lineage),
            "config": to_dict(config),
            **exported.hashes,
        }
        write_json_atomic(folder / OUTPUT_MANIFEST, manifest)
    logger.info("%d of %d weights changed, all verified: %s", changed, len(plan.recipes), target)


def _pin(config: MergeConfig) -> MergeConfig:
    """Return a config whose paths mean the same on every node; fetch its inputs to this one.

    Raises:
        ConfigError: They can't be fetched.
    """
    paths = {"base": config.base}
    paths |= {f"adapters.{number}": path for number, path in enumerate(config.adapters)}
    problems: list[str] = []
    pinned: dict[str, str] = {}
    for field, path in paths.items():
        try:
            pinned[field] = pin_directory(path, field)
            fetch_directory(pinned[field], field)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return override(config, pinned)


def _check_target(target: Place) -> None:
    """Refuse a target that exists.

    Raises:
        ValueError: It is a directory with files, or a bucket can't be reached.
    """
    if target.is_local:
        check_target(target.path)
        return
    problem = check_place(target, "target") or check_writable(target, "target")
    if problem is not None:
        raise UserError(problem)
    if is_published(target, OUTPUT_MANIFEST):
        raise UserError(f"target: {target} exists; delete it or choose another path")
    if left := target.files(recursive=True):
        raise UserError(
            f"target: {target} has {len(left)} files but no {OUTPUT_MANIFEST}, as an interrupted "
            "upload leaves them; delete them or choose another path"
        )


def _open_plan(config: MergeConfig) -> MergePlan:
    """Plan a merge, with the weight types of the output format."""

    def dtype_of(spec: TensorSpec) -> torch.dtype:
        if config.output_format == "gguf":
            return gguf_dtype(config.gguf_type or "f16", spec)
        return _DTYPES.get(config.dtype, spec.dtype)

    return plan_merge(fetched(config.base), [fetched(path) for path in config.adapters], dtype_of)


def _prepare(config: MergeConfig, plan: MergePlan) -> Callable[[Path], ExportResult]:
    """Return the function that writes the result, after checking that the format can hold it."""
    if config.output_format == "gguf":
        return partial(export_gguf, plan, plan_gguf(plan, config.gguf_type or "f16"))
    if config.output_format == "pth":
        if plan.settings.get("model_type") != "llama":
            kind = plan.settings.get("model_type")
            raise UserError(f"output_format: {config.base} is a {kind}, but pth holds only LLaMAs")
        settings_ = LlamaConfig.from_dict(dict(plan.settings))
        num_shards = config.num_shards or count_published_shards(build_meta_params(settings_))
        tokenizer = plan_tokenizer(plan.tokenizer_dir, settings_) if plan.tokenizer_dir else None
        form = plan_meta(
            plan.specs,
            settings_,
            num_shards,
            where=f"base: {config.base}",
            is_llama3=None if tokenizer is None else tokenizer.is_llama3,
        )
        return partial(export_meta, plan, form, tokenizer, num_shards)
    run = partial(_run_shards, config, plan)
    return partial(export_huggingface, plan, config.dtype, config.max_shard_mib << 20, run)


def _run_shards(
    config: MergeConfig, plan: MergePlan, folder: Path, files: list[str]
) -> list[VerifiedShard]:
    """Write the files of a result here, or on Ray if there are several files and workers."""
    if config.num_workers == 1 or len(files) == 1:
        if config.num_workers > 1:
            logger.warning(
                "num_workers is %d, but there is only one file, which is written without Ray; set "
                "max_shard_mib below %d to parallelize",
                config.num_workers,
                config.max_shard_mib,
            )
        return _run_here(config, plan, folder, files)
    from raytune_llama.merge.on_ray import run_on_ray

    make = partial(_make_shard, config, folder.absolute())
    return run_on_ray(make, files, num_workers=config.num_workers)


def _run_here(
    config: MergeConfig, plan: MergePlan, folder: Path, files: list[str]
) -> list[VerifiedShard]:
    """Write the files one after another; each is synced while the next ones are written."""
    num_threads = min(os.cpu_count() or 1, _MAX_THREADS)
    shards: list[VerifiedShard] = []
    with ThreadPoolExecutor(1) as syncing:
        for file in files:
            size = config.max_shard_mib << 20
            shards.append(export_shard(plan, folder, size, file, num_threads=num_threads))
            # Publishing the folder syncs its files again, and reports errors.
            syncing.submit(sync, folder / file)
    return shards


def _make_shard(config: MergeConfig, folder: Path, file: str) -> VerifiedShard:
    """Write and sync one file, in a process without a plan."""
    shard = export_shard(_open_plan(config), folder, config.max_shard_mib << 20, file)
    sync(folder / file)
    return shard
