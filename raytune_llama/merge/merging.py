"""Merge adapters into a base, a tensor at a time, and prove every tensor of the result.

    merge_adapters(MergeConfig(base="llama", adapters=("plus", "alpaca-plus"), target="merged"))

Arithmetic is float32, with one cast at the end; a weight is changed some rows at a time, so that
memory is bounded by the largest tensor as it is stored, twice. What was written is then read back:
changed weights are compared with a float64 computation of their own, replaced and untouched ones
with their sources, bit for bit.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

import raytune_llama
from raytune_llama.config import settings
from raytune_llama.files import publish_directory, read_json, sha256_file, write_json_atomic
from raytune_llama.merge.adapter import Adapter
from raytune_llama.model.meta import check_target
from raytune_llama.model.tensors import ShardedWeights, TensorSpec, WeightsWriter, open_weights
from raytune_llama.model.tokenizer import load_tokenizer, tokenizer_sha256, write_tokenizer
from raytune_llama.model.vocab import has_tokenizer

logger = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MANIFEST = "manifest.json"

_ROWS = 1024
_SLACK = 1e-5
"""Float32's own rounding, relative to the sum of the terms' sizes."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@settings
class MergeConfig:
    """A base, and the adapters that become part of it."""

    base: str
    """Hugging Face model directory that the first adapter was trained on."""
    adapters: Annotated[tuple[str, ...], Field(min_length=1)]
    """Adapter directories, in the order in which they were trained."""
    target: str
    """Model directory to make; it must not exist, or be empty."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """Type of the weights that are written; `base`: each as the base has it."""
    max_shard_mib: Annotated[int, Field(ge=1)] = 5120
    """Largest safetensors file, unless one tensor is larger."""


@dataclass(frozen=True)
class Recipe:
    """What becomes of one weight."""

    source: Adapter | None
    """The last adapter that replaces it; None: the base has it."""
    source_name: str
    """Its name there."""
    updates: tuple[Adapter, ...]
    """Low-rank updates that are added to it, in order."""
    spec: TensorSpec
    """What is written."""


def merge_adapters(config: MergeConfig) -> None:
    """Do what a config says.

    Raises:
        ValueError: Files are missing or damaged, an adapter does not fit or would change nothing,
            or the target is not empty; nothing is left behind.
    """
    target, base_dir = Path(config.target), Path(config.base)
    check_target(target)
    base = open_weights(base_dir, what="base")
    adapters = [Adapter.open(Path(path)) for path in config.adapters]
    settings_ = read_json(base_dir / "config.json")
    tied = bool(settings_.get("tie_word_embeddings")) and HEAD not in base.specs
    names = _names(base, adapters, tied=tied)
    recipes = {name: _recipe(name, base, adapters, config.dtype, tied=tied) for name in names}
    tokenizer_dir = _find_tokenizer(base_dir, adapters)
    _check_rows(recipes, tokenizer_dir)
    inputs = _hash_inputs(base, adapters)
    _check_base(adapters[0], inputs)
    specs = {name: recipe.spec for name, recipe in recipes.items()}
    with publish_directory(target) as folder:
        with WeightsWriter(folder, specs, max_shard_bytes=config.max_shard_mib << 20) as writer:
            hashes = {
                name: writer.write(name, _merged(name, recipe, base))
                for name, recipe in recipes.items()
            }
        changed = _prove(folder, recipes, base)
        if not changed:
            raise ValueError("adapters: they change no weight at all: all updates are zero")
        untied = tied and HEAD in recipes
        rows = recipes[EMBEDDING].spec.shape[0]
        _write_settings(base_dir, folder, settings_, config.dtype, rows=rows, untied=untied)
        if tokenizer_dir is not None:
            write_tokenizer(tokenizer_dir, folder)
        manifest = {
            "format": 1,
            "kind": "model",
            "raytune_llama": raytune_llama.__version__,
            "merged": {"inputs": inputs, "changed": changed, "untied": untied},
            "tokenizer_sha256": tokenizer_sha256(tokenizer_dir) if tokenizer_dir else None,
            "tensors": hashes,
        }
        write_json_atomic(folder / MANIFEST, manifest)
    logger.info("%d of %d weights changed, each proven: %s", changed, len(recipes), target)


def _names(base: ShardedWeights, adapters: list[Adapter], *, tied: bool) -> list[str]:
    """Return the weights of the result; an adapter may untie what the base has as one table."""
    names = list(base.specs)
    for adapter in adapters:
        unknown = sorted(adapter.names - set(names) - ({HEAD} if tied else set()))
        if unknown:
            raise ValueError(
                f"adapters: {adapter.path} changes {len(unknown)} weights that the base has not, "
                f"the first is {unknown[0]}; name the base that it was trained on"
            )
    if tied and _is_untied(adapters):
        names.append(HEAD)
        logger.warning("the adapters have an output projection of their own: it is untied")
    return names


def _is_untied(adapters: list[Adapter]) -> bool:
    """Whether input and output table differ after the adapters, of which the base has one."""
    for adapter in adapters:
        both = [adapter.replaced.get(name) for name in (EMBEDDING, HEAD)]
        if all(both):
            if not torch.equal(adapter.read_replaced(EMBEDDING), adapter.read_replaced(HEAD)):
                return True
        elif any(both) and not adapter.settings.get("ensure_weight_tying"):
            return True  # PEFT trained a copy of the one, and left the other as it was
        if HEAD in adapter.low_rank or EMBEDDING in adapter.low_rank:
            return True
    return False


def _recipe(
    name: str, base: ShardedWeights, adapters: list[Adapter], dtype: str, *, tied: bool
) -> Recipe:
    spec = base.specs[EMBEDDING if tied and name == HEAD else name]
    first, source, shape = 0, None, spec.shape
    for number, adapter in enumerate(adapters):
        if name not in adapter.replaced:
            continue
        first, source, before = number, adapter, shape
        shape = adapter.spec(name).shape
        if len(shape) != len(before) or shape[1:] != before[1:]:
            raise ValueError(
                f"adapters: {name} is {list(shape)} in {adapter.path} and {list(before)} in what "
                "it is merged into; name the base that it was trained on"
            )
        if shape[0] < before[0]:
            raise ValueError(
                f"adapters: {name} has {shape[0]} rows in {adapter.path}, fewer than the "
                f"{before[0]} before; adapters are given in the order of their training"
            )
    updates = tuple(adapter for adapter in adapters[first:] if name in adapter.low_rank)
    source_name = EMBEDDING if tied and name == HEAD and source is None else name
    for adapter in updates:
        if adapter.shape(name) != shape:
            raise ValueError(
                f"adapters: {adapter.path} updates {name} as {list(adapter.shape(name))}, and it "
                f"is {list(shape)}; name the base that it was trained on"
            )
    return Recipe(source, source_name, updates, TensorSpec(_DTYPES.get(dtype, spec.dtype), shape))


def _find_tokenizer(base_dir: Path, adapters: list[Adapter]) -> Path | None:
    """Return the directory with the tokenizer of the result: that of the last adapter with one."""
    for path in [*(adapter.path for adapter in reversed(adapters)), base_dir]:
        if has_tokenizer(path):
            return path
    logger.warning("neither the adapters nor the base have a tokenizer: none is written")
    return None


def _check_rows(recipes: Mapping[str, Recipe], tokenizer_dir: Path | None) -> None:
    """Refuse tables of different sizes, and a tokenizer with ids that have no row."""
    rows = {name: recipes[name].spec.shape[0] for name in (EMBEDDING, HEAD) if name in recipes}
    if len(set(rows.values())) > 1:
        raise ValueError(
            f"adapters: {EMBEDDING} would have {rows[EMBEDDING]} rows and {HEAD} {rows[HEAD]}; "
            "the base has to be the one that was grown for the adapter"
        )
    if tokenizer_dir is None:
        return
    num_ids = max(load_tokenizer(tokenizer_dir).get_vocab().values()) + 1
    if num_ids > rows[EMBEDDING]:
        raise ValueError(
            f"adapters: the tokenizer of {tokenizer_dir} has {num_ids} ids, and the merged model "
            f"{rows[EMBEDDING]} rows; is it the tokenizer of another model?"
        )


def _hash_inputs(base: ShardedWeights, adapters: list[Adapter]) -> dict[str, dict[str, str]]:
    folders = {
        "base": base.files,
        **{
            f"adapter {number}": sorted(adapter.path.glob("adapter_*"))
            for number, adapter in enumerate(adapters)
        },
    }
    with ThreadPoolExecutor(max_workers=8) as pool:
        return {
            name: dict(
                zip((file.name for file in files), pool.map(sha256_file, files), strict=True)
            )
            for name, files in folders.items()
        }


def _check_base(adapter: Adapter, inputs: Mapping[str, Mapping[str, str]]) -> None:
    """Compare the base with the one that our own adapters name."""
    path = adapter.path / MANIFEST
    trained_on = (read_json(path) if path.is_file() else {}).get("base") or {}
    differing = [
        name for name, digest in inputs["base"].items() if trained_on.get(name, digest) != digest
    ]
    if differing:
        raise ValueError(
            f"base: {differing[0]} is not the file that {adapter.path} was trained on (SHA256 "
            f"{inputs['base'][differing[0]][:16]}, wanted {trained_on[differing[0]][:16]}); name "
            "that base"
        )


def _rows(num_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, num_rows)) for start in range(0, num_rows, _ROWS))


def _read_source(recipe: Recipe, base: ShardedWeights) -> Tensor:
    if recipe.source is None:
        return base.read(recipe.source_name)
    return recipe.source.read_replaced(recipe.source_name)


def _merged(name: str, recipe: Recipe, base: ShardedWeights) -> Tensor:
    source = _read_source(recipe, base)
    if not recipe.updates:
        return source.to(recipe.spec.dtype)
    merged = torch.empty(recipe.spec.shape, dtype=recipe.spec.dtype)
    for rows in _rows(len(source)):
        part = source[rows].float()
        for adapter in recipe.updates:
            part = adapter.change(name, part, rows)
        merged[rows] = part.to(recipe.spec.dtype)
    return merged


def _prove(folder: Path, recipes: Mapping[str, Recipe], base: ShardedWeights) -> int:
    """Compare what was written with its sources; return how many weights differ from the base."""
    written = open_weights(folder)
    changed = 0
    for name, recipe in recipes.items():
        stored = written.read(name)
        source = _read_source(recipe, base)
        if not recipe.updates:
            if not torch.equal(stored, source.to(recipe.spec.dtype)):
                raise AssertionError(f"{name} was not written as it is in its source")
            changed += _differs_from_base(name, recipe, base, stored)
            continue
        differs = False
        for rows in _rows(len(source)):
            exact = source[rows].double()
            size = exact.abs()
            for adapter in recipe.updates:
                size = size + adapter.terms(name, rows)
                added = exact + adapter.delta(name, rows, torch.float64)
                exact = adapter.rescaled(name, added, rows)
                size *= _lengths(exact) / _lengths(added)  # DoRA scales errors too
            differs |= not torch.equal(stored[rows], source[rows].to(recipe.spec.dtype))
            _compare(name, stored[rows], exact, size)
        changed += differs
    return changed


def _differs_from_base(name: str, recipe: Recipe, base: ShardedWeights, stored: Tensor) -> bool:
    if recipe.source is None or name not in base.specs:
        return recipe.source is not None
    before = base.read(name)
    return before.shape != stored.shape or not torch.equal(before.to(stored.dtype), stored)


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-300)


def _compare(name: str, stored: Tensor, exact: Tensor, size: Tensor) -> None:
    """Check that stored values are the exact ones, but for one rounding and float32's own."""
    info = torch.finfo(stored.dtype)
    allowed = exact.abs() * info.eps / 2 + info.smallest_normal + size * _SLACK
    error = (stored.double() - exact).abs()
    if not bool((error <= allowed).all()):
        worst = float((error - allowed).max())
        raise AssertionError(f"{name} is off by {worst:.3g} more than rounding explains")


def _write_settings(
    base_dir: Path, folder: Path, settings_: dict[str, Any], dtype: str, *, rows: int, untied: bool
) -> None:
    values = dict(settings_) | {"vocab_size": rows}
    if untied:
        values["tie_word_embeddings"] = False
    if dtype != "base":
        values.pop("torch_dtype", None)
        values["dtype"] = dtype
    write_json_atomic(folder / "config.json", values)
    if (base_dir / "generation_config.json").is_file():
        shutil.copyfile(base_dir / "generation_config.json", folder / "generation_config.json")
