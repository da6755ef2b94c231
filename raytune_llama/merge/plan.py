"""What a merge will make: a recipe for each weight, and its values, one tensor at a time.

    plan = plan_merge(base_dir, adapter_dirs, dtype_of)     # headers only; refuses what can't fit
    for name in plan.specs:
        tensor = plan.read(name)

Arithmetic is float32, with one cast at the end; a weight is changed some rows at a time, so that
memory is bounded by the largest tensor as it is stored, twice.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raytune_llama.config.errors import UserError
from raytune_llama.merge.adapter import Adapter
from raytune_llama.merge.names import BaseWeightNames, find_weight_names
from raytune_llama.model.lineage import check_tokenizer_chain
from raytune_llama.model.rope import read_model_settings
from raytune_llama.model.tensors import ShardedWeights, TensorSpec, open_weights
from raytune_llama.model.vocab import has_tokenizer
from raytune_llama.storage.files import read_json, read_manifest, sha256_file
from raytune_llama.tokenizer.loader import load_tokenizer

logger = logging.getLogger(__name__)


_PADDED = 8  # what tables are padded to a multiple of, at least
_SLICE_NUMEL = 2**20


@dataclass(frozen=True)
class WeightRecipe:
    """What becomes of one weight."""

    source: Adapter | None
    """The last adapter that replaces it; None: the base has it."""
    source_name: str
    """Its name there."""
    updates: tuple[Adapter, ...]
    """Low-rank updates that are added to it, in order."""
    spec: TensorSpec
    """What is written."""


@dataclass(frozen=True)
class MergePlan:
    """A base and adapters that fit each other; the merged weights, read one at a time."""

    base_dir: Path
    """Where the base is."""
    base: ShardedWeights
    """Its weights."""
    names: BaseWeightNames
    """Its embedding tables."""
    adapters: tuple[Adapter, ...]
    """In the order of their training."""
    recipes: Mapping[str, WeightRecipe]
    """By the names of the merged weights, in the order of the base's files."""
    tokenizer_dir: Path | None
    """The directory with the tokenizer of the result; None: there is none."""
    settings: Mapping[str, Any]
    """The config.json of the result, but for the type of its weights."""
    is_untied: bool
    """Whether one table of the base becomes two."""
    model_settings: Mapping[str, Any]
    """What the adapters were trained with that the base's config.json has otherwise."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """See `Weights.specs`."""
        return {name: recipe.spec for name, recipe in self.recipes.items()}

    def read(self, name: str) -> Tensor:
        """Compute a merged weight in the type of its recipe.

        Raises:
            ValueError: A value is beyond what float16 holds.
        """
        recipe = self.recipes[name]
        if not recipe.updates:
            return _cast(name, self.read_source(name), recipe.spec.dtype)
        merged = torch.empty(recipe.spec.shape, dtype=recipe.spec.dtype)
        for rows, part in self.iterate_row_slices(name):
            merged[rows] = _cast(name, part, recipe.spec.dtype)
        return merged

    def iterate_row_slices(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Compute a merged weight some rows at a time, float32."""
        source, updates = self.read_source(name), self.recipes[name].updates
        for rows in row_slices(source):
            part = source[rows].float()
            for adapter in updates:
                part = adapter.apply_update(name, part, rows)
            yield rows, part

    def read_source(self, name: str) -> Tensor:
        """Read what low-rank updates of a weight are added to."""
        recipe = self.recipes[name]
        if recipe.source is None:
            return self.base.read(recipe.source_name)
        return recipe.source.read_replaced(recipe.source_name)

    def hash_inputs(self) -> dict[str, dict[str, str]]:
        """Hash the files of base and adapters: SHA256 by file name, by what they belong to."""
        folders = {
            "base": self.base.files,
            **{
                f"adapter {number}": sorted(adapter.path.glob("adapter_*"))
                for number, adapter in enumerate(self.adapters)
            },
        }
        with ThreadPoolExecutor(max_workers=8) as pool:
            return {
                name: dict(
                    zip((file.name for file in files), pool.map(sha256_file, files), strict=True)
                )
                for name, files in folders.items()
            }


def plan_merge(
    base_dir: Path, adapter_dirs: list[Path], dtype_of: Callable[[TensorSpec], torch.dtype]
) -> MergePlan:
    """Find out what becomes of each weight; of the weights' files only headers are read.

    Args:
        base_dir: A Hugging Face model directory.
        adapter_dirs: Directories written by PEFT, in the order of their training.
        dtype_of: The type in which a weight of the base is written.

    Raises:
        ValueError: Files are missing or damaged, or an adapter or tokenizer does not fit.
    """
    base = open_weights(base_dir, what="base")
    names = find_weight_names(base_dir, base)
    adapters = [Adapter.open(path, names.prefix) for path in adapter_dirs]
    settings = dict(read_json(base_dir / "config.json"))
    tied = _is_tied(settings) and names.head not in base.specs
    recipes = {
        name: _recipe(name, base, names, adapters, dtype_of, tied=tied)
        for name in _names(base, names, adapters, tied=tied)
    }
    problems = check_tokenizer_chain([base_dir, *adapter_dirs])
    if problems:
        raise UserError("\n".join(problems))
    tokenizer_dir = _find_tokenizer(base_dir, adapters)
    num_before = base.specs[names.embedding].shape[0]
    _check_rows(recipes, names, num_before, tokenizer_dir, is_adapters=tokenizer_dir != base_dir)
    untied = tied and names.head in recipes
    settings["vocab_size"] = recipes[names.embedding].spec.shape[0]
    if untied:
        settings["tie_word_embeddings"] = False
    changed = _model_settings(adapter_dirs)
    settings |= changed
    return MergePlan(
        base_dir, base, names, tuple(adapters), recipes, tokenizer_dir, settings, untied, changed
    )


def _model_settings(adapter_dirs: list[Path]) -> dict[str, Any]:
    """Return what all adapters were trained with beside the base's settings."""
    found: dict[str, Any] = {}
    for path in adapter_dirs:
        # One that was trained on the merge of those before it had them from its base.
        values = read_model_settings(path)
        differing = [field for field in values if found.get(field, values[field]) != values[field]]
        if differing:
            raise UserError(
                f"adapters: {path} was trained with {differing[0]} {values[differing[0]]}, and an "
                f"adapter before it with {found[differing[0]]}; merge adapters of one kind"
            )
        found |= values
    if found:
        logger.info("config.json gets what the adapters were trained with: %s", found)
    return found


def _is_tied(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json ties the tables; one that does not say has its family's default."""
    stated = settings.get("tie_word_embeddings")
    if stated is None and settings.get("model_type") in CONFIG_MAPPING:
        stated = CONFIG_MAPPING[settings["model_type"]]().tie_word_embeddings
    return bool(stated)


def row_slices(weight: Tensor) -> Iterator[slice]:
    """Yield the rows of a weight that are computed at a time, some million numbers."""
    num_rows = max(1, _SLICE_NUMEL // max(1, weight[0].numel() if len(weight) else 1))
    return (
        slice(start, min(start + num_rows, len(weight)))
        for start in range(0, len(weight), num_rows)
    )


def _cast(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    cast = values.to(dtype)
    if dtype == torch.float16 and values.dtype != dtype and not bool(cast.isfinite().all()):
        largest = float(values.abs().max())
        raise UserError(
            f"dtype: {name} has values up to {largest:.4g}, and float16 ends at 65,504; write it "
            "as bfloat16 or float32"
        )
    return cast


def _names(
    base: ShardedWeights, base_names: BaseWeightNames, adapters: list[Adapter], *, tied: bool
) -> list[str]:
    """Return the weights of the result; an adapter may untie what the base has as one table."""
    names = list(base.specs)
    for adapter in adapters:
        unknown = sorted(adapter.weight_names - set(names) - ({base_names.head} if tied else set()))
        if unknown:
            raise UserError(
                f"adapters: {adapter.path} changes {len(unknown)} weights that the base has not, "
                f"the first is {unknown[0]}; name the base that it was trained on"
            )
    if tied and _is_untied(adapters, base_names):
        if base_names.prefix:
            raise UserError(
                f"base: the adapters untie its tables, and its files lack {base_names.prefix!r} "
                "in their names, beside which a head is not read; load it in transformers and "
                "save it again"
            )
        names.append(base_names.head)
        logger.warning("the adapters have an output projection of their own: it is untied")
    return names


def _is_untied(adapters: list[Adapter], base_names: BaseWeightNames) -> bool:
    """Whether input and output table differ after the adapters, of which the base has one."""
    tables = (base_names.embedding, base_names.head)
    for adapter in adapters:
        both = [adapter.replaced.get(name) for name in tables]
        if all(both):
            if not torch.equal(*(adapter.read_replaced(name) for name in tables)):
                return True
        elif any(both) and not adapter.settings.get("ensure_weight_tying"):
            return True  # PEFT trained a copy of the one, and left the other as it was
        if any(name in adapter.low_rank for name in tables):
            return True
    return False


def _recipe(
    name: str,
    base: ShardedWeights,
    base_names: BaseWeightNames,
    adapters: list[Adapter],
    dtype_of: Callable[[TensorSpec], torch.dtype],
    *,
    tied: bool,
) -> WeightRecipe:
    is_tied_head = tied and name == base_names.head
    spec = base.specs[base_names.embedding if is_tied_head else name]
    first, source, shape = 0, None, spec.shape
    for number, adapter in enumerate(adapters):
        if name not in adapter.replaced:
            continue
        first, source, before = number, adapter, shape
        shape = adapter.spec(name).shape
        if len(shape) != len(before) or shape[1:] != before[1:]:
            raise UserError(
                f"adapters: {name} is {list(shape)} in {adapter.path} and {list(before)} in what "
                "it is merged into; name the base that it was trained on"
            )
        if shape[0] < before[0]:
            raise UserError(
                f"adapters: {name} has {shape[0]} rows in {adapter.path}, fewer than the "
                f"{before[0]} before; adapters are given in the order of their training"
            )
    updates = tuple(adapter for adapter in adapters[first:] if name in adapter.low_rank)
    source_name = base_names.embedding if is_tied_head and source is None else name
    for adapter in updates:
        if adapter.shape(name) != shape:
            raise UserError(
                f"adapters: {adapter.path} updates {name} as {list(adapter.shape(name))}, and it "
                f"is {list(shape)}; name the base that it was trained on"
            )
    dtype = dtype_of(TensorSpec(spec.dtype, shape))
    return WeightRecipe(source, source_name, updates, TensorSpec(dtype, shape))


def _find_tokenizer(base_dir: Path, adapters: list[Adapter]) -> Path | None:
    """Return the directory with the tokenizer of the result: that of the last adapter with one."""
    for path in [*(adapter.path for adapter in reversed(adapters)), base_dir]:
        if has_tokenizer(path):
            return path
    logger.warning("neither the adapters nor the base have a tokenizer: none is written")
    return None


def _check_rows(
    recipes: Mapping[str, WeightRecipe],
    base_names: BaseWeightNames,
    num_before: int,
    tokenizer_dir: Path | None,
    *,
    is_adapters: bool,
) -> None:
    """Refuse tables of different sizes, and a tokenizer that is not that of the merged rows.

    Rows without a token are legal where they pad a table; an odd number of them stands for tokens
    that the tokenizer beside the adapter should have.
    """
    embedding, head = base_names.embedding, base_names.head
    rows = {name: recipes[name].spec.shape[0] for name in (embedding, head) if name in recipes}
    if len(set(rows.values())) > 1:
        raise UserError(
            f"adapters: {embedding} would have {rows[embedding]} rows and {head} {rows[head]}; "
            "the base has to be the one that was grown for the adapter"
        )
    if tokenizer_dir is None:
        return
    num_ids = max(load_tokenizer(tokenizer_dir).get_vocab().values()) + 1
    if num_ids > rows[embedding]:
        raise UserError(
            f"adapters: the tokenizer of {tokenizer_dir} has {num_ids} ids, and the merged model "
            f"{rows[embedding]} rows; is it the tokenizer of another model?"
        )
    if num_ids > num_before or rows[embedding] == num_before:
        return
    if not is_adapters or rows[embedding] % _PADDED == 0:
        num_surplus = rows[embedding] - num_before
        logger.warning("the adapters add %d rows that no token of theirs names", num_surplus)
    else:
        raise UserError(
            f"adapters: they have {rows[embedding]} rows and the base {num_before}, and the "
            f"tokenizer of {tokenizer_dir} has {num_ids} ids, none of them new; put the tokenizer "
            "into the adapter's directory that it was trained with"
        )


def check_recorded_base(adapter: Adapter, inputs: Mapping[str, Mapping[str, str]]) -> None:
    """Compare the base with the one that our own adapters name.

    Args:
        adapter: The first one.
        inputs: What `MergePlan.hash_inputs` returns.

    Raises:
        ValueError: It was trained on another base.
    """
    trained_on = read_manifest(adapter.path).get("base") or {}
    differing = [
        name for name, digest in inputs["base"].items() if trained_on.get(name, digest) != digest
    ]
    if differing:
        raise UserError(
            f"base: {differing[0]} is not the file that {adapter.path} was trained on (SHA256 "
            f"{inputs['base'][differing[0]][:16]}, wanted {trained_on[differing[0]][:16]}); name "
            "that base"
        )
