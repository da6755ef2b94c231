"""Merge adapters into a base, a tensor at a time, and prove every tensor of the result.

    merge_adapters(MergeConfig(base="llama", adapters=("plus", "alpaca-plus"), target="merged"))

What becomes of a weight is in `plan.py`, the forms of the result in `export.py`, their proof in
`proof.py`.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from transformers import LlamaConfig

import raytune_llama
from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError, settings
from raytune_llama.merge.export import (
    ExportResult,
    VerifiedShard,
    export_gguf,
    export_huggingface,
    export_meta,
    export_shard,
)
from raytune_llama.merge.gguf_file import GgufType, gguf_dtype, plan_gguf
from raytune_llama.merge.logits import compare_logits, load_comparison_ids
from raytune_llama.merge.plan import MergePlan, check_recorded_base, plan_merge
from raytune_llama.model.lineage import CHAT_KEY, find_chat_template
from raytune_llama.model.meta.layout import build_meta_params, check_target, count_published_shards
from raytune_llama.model.meta.to_meta import plan_meta
from raytune_llama.model.tensors import TensorSpec
from raytune_llama.storage.files import OUTPUT_MANIFEST, publish_directory, write_json_atomic
from raytune_llama.tokenizer.loader import tokenizer_sha256

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD_MIB = 5120


@settings
class MergeConfig:
    """A base, and the adapters that become part of it."""

    base: str
    """Hugging Face model directory that the first adapter was trained on."""
    adapters: Annotated[tuple[str, ...], Field(min_length=1)]
    """Adapter directories, in the order in which they were trained."""
    target: str
    """Directory to make; it must not exist, or be empty."""
    output_format: Literal["huggingface", "pth", "gguf"] = "huggingface"
    """What is made: a Hugging Face model directory, Meta's .pth shards, or a file for llama.cpp."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """Type of the weights of huggingface and pth; `base`: each as the base has it."""
    gguf_type: GgufType | None = None
    """Type of the matrices of gguf: f16, q8_0 (8 bits and a step for 32 of them) or f32; null: f16.
    Norms are always float32."""
    max_shard_mib: Annotated[int, Field(ge=1)] = _SHARD_MIB
    """Largest safetensors file of huggingface, unless one tensor is larger."""
    num_shards: Annotated[int, Field(ge=1, le=64)] | None = None
    """Files of pth; null: as many as Meta published for models of this width, 1 for others."""
    num_workers: Annotated[int, Field(ge=1)] = 1
    """Safetensors files of huggingface that are made at a time, each by a task on Ray with one CPU,
    on nodes that all see base, adapters and target; 1: in this process, without Ray."""
    verify: Literal["tensors", "logits"] = "tensors"
    """What is compared before the result appears: each weight with a computation of its own, and
    with `logits` also the logits of huggingface with those of base and adapters under PEFT."""
    verify_text: str | None = None
    """Text file for `verify: logits`, of which the beginning is read; null: a few sentences."""

    @model_validator(mode="after")
    def _check(self) -> "MergeConfig":
        wanted = {
            "gguf_type": ("gguf", self.gguf_type is not None),
            "max_shard_mib": ("huggingface", self.max_shard_mib != _SHARD_MIB),
            "num_shards": ("pth", self.num_shards is not None),
            "num_workers": ("huggingface", self.num_workers > 1),
        }
        problems = [
            f"{name}: is for output_format {form} alone, got {self.output_format}; leave it out"
            for name, (form, is_set) in wanted.items()
            if is_set and self.output_format != form
        ]
        if self.output_format == "gguf" and self.dtype != "base":
            problems.append(f"dtype: got {self.dtype}, but gguf has gguf_type for it; leave it out")
        if self.verify == "logits" and self.output_format != "huggingface":
            problems.append(
                f"verify: logits are those of transformers, which reads no {self.output_format}; "
                "merge as huggingface with it first: the values are the same"
            )
        if self.verify_text is not None and self.verify != "logits":
            problems.append("verify_text: is for verify=logits alone; set that, or leave it out")
        if problems:
            raise ConfigError(problems)
        return self


def merge_adapters(config: MergeConfig) -> None:
    """Do what a config says.

    Raises:
        ValueError: Files are missing or damaged, an adapter does not fit or would change nothing,
            the form cannot hold the model, or the target is not empty; nothing is left behind.
        AssertionError: A proof has failed; nothing is left behind.
    """
    target = Path(config.target)
    check_target(target)
    plan = _open_plan(config)
    export = _prepare(config, plan)
    is_sampled = config.verify == "logits"
    samples = load_comparison_ids(plan.tokenizer_dir, config.verify_text) if is_sampled else None
    inputs = plan.hash_inputs()
    check_recorded_base(plan.adapters[0], inputs)
    with publish_directory(target) as folder:
        exported = export(folder)
        changed, tokenizer_dir = exported.num_changed, plan.tokenizer_dir
        if not changed:
            raise UserError("adapters: they change no weight at all: all updates are zero")
        if samples is not None:
            compare_logits(folder, plan, samples)
        chat = find_chat_template([plan.base_dir, *(adapter.path for adapter in plan.adapters)])
        manifest = {
            "format": 1,
            "kind": "model" if config.output_format == "huggingface" else config.output_format,
            "raytune_llama": raytune_llama.__version__,
            "merged": {"inputs": inputs, "changed": changed, "untied": plan.is_untied},
            "tokenizer_sha256": tokenizer_sha256(tokenizer_dir) if tokenizer_dir else None,
            CHAT_KEY: chat[1] if chat else None,
            **exported.hashes,
        }
        write_json_atomic(folder / OUTPUT_MANIFEST, manifest)
    logger.info("%d of %d weights changed, each proven: %s", changed, len(plan.recipes), target)


def _open_plan(config: MergeConfig) -> MergePlan:
    """Plan a merge, with the types that the form has."""

    def dtype_of(spec: TensorSpec) -> torch.dtype:
        if config.output_format == "gguf":
            return gguf_dtype(config.gguf_type or "f16", spec)
        return _DTYPES.get(config.dtype, spec.dtype)

    return plan_merge(Path(config.base), [Path(path) for path in config.adapters], dtype_of)


def _prepare(config: MergeConfig, plan: MergePlan) -> Callable[[Path], ExportResult]:
    """Return what writes the result, once it is clear that its form can hold it."""
    if config.output_format == "gguf":
        return partial(export_gguf, plan, plan_gguf(plan, config.gguf_type or "f16"))
    if config.output_format == "pth":
        if plan.settings.get("model_type") != "llama":
            kind = plan.settings.get("model_type")
            raise UserError(f"output_format: {config.base} is a {kind}, and pth holds LLaMAs alone")
        settings_ = LlamaConfig.from_dict(dict(plan.settings))
        num_shards = config.num_shards or count_published_shards(build_meta_params(settings_))
        form = plan_meta(plan.specs, settings_, num_shards, where=f"base: {config.base}")
        return partial(export_meta, plan, form, num_shards)
    run = partial(_run_shards, config, plan)
    return partial(export_huggingface, plan, config.dtype, config.max_shard_mib << 20, run)


def _run_shards(
    config: MergeConfig, plan: MergePlan, folder: Path, files: list[str]
) -> list[VerifiedShard]:
    """Make the files of a result here, or on Ray where there are several and workers for them."""
    if config.num_workers == 1 or len(files) == 1:
        if config.num_workers > 1:
            logger.warning(
                "num_workers: %d have one file to make, which is done here; a smaller "
                "max_shard_mib than %d gives each of them one",
                config.num_workers,
                config.max_shard_mib,
            )
        return [export_shard(plan, folder, config.max_shard_mib << 20, file) for file in files]
    from raytune_llama.merge.on_ray import run_on_ray

    # Workers stand in another folder.
    config = replace(
        config,
        base=str(Path(config.base).absolute()),
        adapters=tuple(str(Path(path).absolute()) for path in config.adapters),
    )
    make = partial(_make_shard, config, folder.absolute())
    return run_on_ray(make, files, num_workers=config.num_workers)


def _make_shard(config: MergeConfig, folder: Path, file: str) -> VerifiedShard:
    """Make one file, in a process that has no plan."""
    return export_shard(_open_plan(config), folder, config.max_shard_mib << 20, file)
