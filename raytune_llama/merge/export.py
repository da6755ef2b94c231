"""Output formats of a merged model: Hugging Face's safetensors, Meta's .pth shards, one GGUF file.

Each function writes to an existing folder, reads the files back and verifies them.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from raytune_llama.config.errors import UserError
from raytune_llama.merge.gguf_file import GgufModelSpec, GgufWeights, write_gguf
from raytune_llama.merge.plan import MergePlan, row_slices
from raytune_llama.merge.proof import verify_rows, verify_weights
from raytune_llama.model.directory import write_token_settings
from raytune_llama.model.meta.from_meta import open_meta
from raytune_llama.model.meta.to_meta import MetaModelSpec, write_meta, write_tokenizer_model
from raytune_llama.model.meta.tokenizer_files import MetaTokenizer
from raytune_llama.model.tensors import (
    ShardFile,
    bytes_of,
    plan_files,
    write_index,
)
from raytune_llama.model.vocab import EMBEDDING, HEAD
from raytune_llama.storage.files import write_json_atomic
from raytune_llama.storage.hashes import Hasher, hash_file
from raytune_llama.tokenizer.loader import load_tokenizer, write_tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ExportResult:
    """Summary of the written and verified files."""

    num_changed: int
    """Number of weights that differ from the base's."""
    hashes: Mapping[str, Any]
    """Hash by tensor or by file, for the manifest."""


@dataclass(frozen=True)
class VerifiedShard:
    """One written and verified safetensors file."""

    num_changed: int
    """Number of weights in the file that differ from the base's."""
    hashes: Mapping[str, str]
    """Hash by tensor."""


def export_shard(
    plan: MergePlan, folder: Path, max_shard_bytes: int, file: str, *, num_threads: int = 1
) -> VerifiedShard:
    """Write one safetensors file of a merged model and verify it.

    Args:
        plan: The merged model.
        folder: Directory to write to.
        max_shard_bytes: Maximum size of a file, unless one tensor is larger.
        file: Name of the file.
        num_threads: Number of weights that are merged at once.

    Raises:
        ValueError: `folder` is not visible on this node, or a value exceeds float16's range.
        AssertionError: A written weight differs from its expected value.
    """
    if not folder.is_dir():
        raise UserError(
            f"target: {folder.parent} is not visible on every node; with num_workers above 1 it "
            "must be on storage that all nodes share, given as an absolute path"
        )
    names = plan_files(plan.specs, max_shard_bytes)[file]
    with ShardFile(folder / file, {name: plan.specs[name] for name in names}) as shard:
        verified = run_in_threads(partial(_merge_weight, plan, shard), names, num_threads)
    hashes = {name: digest for name, (digest, _) in zip(names, verified, strict=True)}
    return VerifiedShard(sum(differs for _, differs in verified), hashes)


def _merge_weight(plan: MergePlan, shard: ShardFile, name: str) -> tuple[str, bool]:
    """Write a weight by rows, read each back, and verify it.

    Returns:
        The hash of what was read back, and whether it differs from the base.
    """
    hasher, differs = Hasher(), False
    for rows in row_slices(plan.specs[name].shape):
        source = plan.read_source_rows(name, rows)
        shard.write_rows(name, rows.start, plan.merge_rows(name, rows, source))
        stored = shard.read_rows(name, rows)
        hasher.update(bytes_of(stored))
        differs |= verify_rows(plan, name, rows, stored=stored, source=source)
    return hasher.finish(), differs


def run_in_threads(function: Callable[[str], T], names: list[str], num_threads: int) -> list[T]:
    """Call a function for each name in threads of one core each; return the results in order."""
    if num_threads == 1:
        return [function(name) for name in names]
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(function, names))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def export_huggingface(
    plan: MergePlan,
    dtype: str,
    max_shard_bytes: int,
    run: Callable[[Path, list[str]], list[VerifiedShard]],
    folder: Path,
) -> ExportResult:
    """Write a model directory that plain transformers loads.

    Args:
        plan: The merged model.
        dtype: Type to name in config.json; `base`: as in the base's config.json.
        max_shard_bytes: Maximum size of a safetensors file, unless one tensor is larger.
        run: Calls `export_shard` for each file of a list, in this process or elsewhere.
        folder: Directory to write to.

    Raises:
        AssertionError: A written weight differs from its expected value.
    """
    files = plan_files(plan.specs, max_shard_bytes)
    shards = run(folder, list(files))
    write_index(folder, plan.specs, files)
    settings = dict(plan.settings)
    if dtype != "base":
        settings.pop("torch_dtype", None)
        settings["dtype"] = dtype
    write_json_atomic(folder / "config.json", settings)
    generation = plan.base_dir / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    if plan.tokenizer_dir is not None:
        write_tokenizer(plan.tokenizer_dir, folder)
        write_token_settings(folder, load_tokenizer(plan.tokenizer_dir), plan.stop_ids)
    hashes = {name: digest for shard in shards for name, digest in shard.hashes.items()}
    return ExportResult(sum(shard.num_changed for shard in shards), {"tensors": hashes})


def export_meta(
    plan: MergePlan,
    form: MetaModelSpec,
    tokenizer: MetaTokenizer | None,
    num_shards: int,
    folder: Path,
) -> ExportResult:
    """Write `consolidated.*.pth`, `params.json` and `tokenizer.model`.

    Raises:
        AssertionError: A written weight differs from its expected value.
    """
    write_meta(folder, plan, form, num_shards=num_shards)
    written = open_meta(folder)
    num_changed = verify_weights(
        written, plan, [name for name in plan.specs if name in written.specs]
    )
    if HEAD not in plan.specs and not torch.equal(written.read(HEAD), written.read(EMBEDDING)):
        raise AssertionError(f"{HEAD} differs from {EMBEDDING}, to which it is tied")
    if plan.tokenizer_dir is not None:
        write_tokenizer_model(tokenizer, plan.tokenizer_dir, folder)
    return ExportResult(num_changed, _hash_files(folder))


def export_gguf(plan: MergePlan, form: GgufModelSpec, folder: Path) -> ExportResult:
    """Write `model-TYPE.gguf`.

    Raises:
        ValueError: A value exceeds float16's range.
        AssertionError: A written weight differs from its expected value.
    """
    path = folder / f"model-{form.gguf_type}.gguf"
    write_gguf(path, plan, form)
    written = GgufWeights(path, form)
    num_changed = verify_weights(written, plan, written.specs, blocks=form.blocks)
    return ExportResult(num_changed, _hash_files(folder))


def _hash_files(folder: Path) -> dict[str, dict[str, str]]:
    return {"files": {path.name: hash_file(path) for path in sorted(folder.iterdir())}}
