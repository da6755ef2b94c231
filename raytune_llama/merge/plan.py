"""Plan a merge: a recipe per weight, and the merged values, one tensor at a time.

    plan = plan_merge(base_dir, adapter_dirs, dtype_of)     # headers only; rejects what can't fit
    for name in plan.specs:
        tensor = plan.read(name)

Arithmetic is float32, with one cast at the end; a weight is merged some rows at a time.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raytune_llama.chat.templates.choice import find_stop_ids
from raytune_llama.config.errors import UserError
from raytune_llama.model.adapter import Adapter
from raytune_llama.model.adapter_config import ADAPTER_CONFIG_FILE
from raytune_llama.model.adapter_lineage import check_chain, hash_files
from raytune_llama.model.embeddings import embedding_layers
from raytune_llama.model.lineage import check_tokenizer_chain, find_chat_template
from raytune_llama.model.llama import build_empty_model, check_not_quantized
from raytune_llama.model.lora import check_adapter_fits
from raytune_llama.model.rope import read_model_settings
from raytune_llama.model.tensors import ShardedWeights, TensorSpec, open_weights
from raytune_llama.model.vocab import EMBEDDING, HEAD, has_tokenizer
from raytune_llama.storage.files import read_json
from raytune_llama.tokenizer.loader import load_tokenizer

logger = logging.getLogger(__name__)


_PADDED = 8  # tables are padded to a multiple of at least this
_SLICE_NUMEL = 2**18  # 1 MiB in float32: its passes stay in a core's cache


@dataclass(frozen=True)
class BaseWeightNames:
    """Names of a base's weights."""

    embedding: str
    """Name of the input embedding in the base's files."""
    head: str
    """Name of the output projection; a tied one may be absent from the files."""
    prefix: str
    """Prefix of the adapters' names that the names in the files lack; usually empty."""


def find_weight_names(base_dir: Path, base: ShardedWeights) -> BaseWeightNames:
    """Find the names of a base's embedding tables.

    Args:
        base_dir: Directory of the base; its config.json is read unless the names are a LLaMA's.
        base: Weights of the base.

    Raises:
        ValueError: The directory is not a causal LM that transformers knows, or its files have no
            input embedding.
    """
    if EMBEDDING in base.specs:
        return BaseWeightNames(EMBEDDING, HEAD, "")
    try:
        model = build_empty_model(base_dir)
    except (ValueError, OSError) as error:
        raise UserError(f"base: {base_dir} cannot be read as a causal LM: {error}") from error
    names = {id(layer): f"{name}.weight" for name, layer in embedding_layers(model).items()}
    embedding = names[id(model.get_input_embeddings())]
    head = names.get(id(model.get_output_embeddings()), HEAD)
    prefix = f"{model.base_model_prefix}."
    if embedding in base.specs:
        return BaseWeightNames(embedding, head, "")
    if embedding.removeprefix(prefix) in base.specs:
        return BaseWeightNames(embedding.removeprefix(prefix), head, prefix)
    raise UserError(
        f"base: the files of {base_dir} have no {embedding}, the input embedding of a "
        f"{type(model).__name__}; load it in transformers and save it again"
    )


@dataclass(frozen=True)
class WeightRecipe:
    """How one merged weight is computed."""

    source: Adapter | None
    """Last adapter that replaces the weight; None: it comes from the base."""
    source_name: str
    """Name of the weight in its source."""
    updates: tuple[Adapter, ...]
    """Adapters whose low-rank updates are added, in order."""
    spec: TensorSpec
    """Type and shape of the merged weight."""


@dataclass(frozen=True)
class MergePlan:
    """A compatible base and adapters, and the merged weights, computed one at a time."""

    base_dir: Path
    """Directory of the base."""
    base: ShardedWeights
    """Weights of the base."""
    names: BaseWeightNames
    """Names of the base's embedding tables."""
    adapters: tuple[Adapter, ...]
    """Adapters in training order."""
    recipes: Mapping[str, WeightRecipe]
    """Recipes by name of the merged weight, in the order of the base's files."""
    tokenizer_dir: Path | None
    """Directory with the tokenizer of the result; None if there is no tokenizer."""
    settings: Mapping[str, Any]
    """The config.json of the result, except for the type of its weights."""
    is_untied: bool
    """Whether a tied embedding table of the base becomes two."""
    stop_ids: frozenset[int]
    """Ids that end an answer in the chat template of the training."""
    model_settings: Mapping[str, Any]
    """Model settings of the adapters' training that override the base's config.json."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """See `Weights.specs`."""
        return {name: recipe.spec for name, recipe in self.recipes.items()}

    def read(self, name: str) -> Tensor:
        """Compute a merged weight in the type of its recipe.

        Raises:
            ValueError: A value exceeds float16's range.
        """
        spec = self.recipes[name].spec
        merged = torch.empty(spec.shape, dtype=spec.dtype)
        for rows in row_slices(spec.shape):
            merged[rows] = self.merge_rows(name, rows, self.read_source_rows(name, rows))
        return merged

    def merge_rows(self, name: str, rows: slice, source: Tensor) -> Tensor:
        """Compute some rows of a merged weight, in the type of its recipe.

        Args:
            name: Name of the weight.
            rows: Rows to compute.
            source: These rows of the weight to which low-rank updates are added.

        Raises:
            ValueError: A value exceeds float16's range.
        """
        return _cast(name, self.merge_exactly(name, rows, source), self.recipes[name].spec.dtype)

    def merge_exactly(self, name: str, rows: slice, source: Tensor) -> Tensor:
        """Compute some rows of a merged weight in float32, or return those of one without updates.

        See `merge_rows`.
        """
        updates = self.recipes[name].updates
        part = source.float() if updates else source
        for adapter in updates:
            part = adapter.apply_update(name, part, rows)
        return part

    def read_source_rows(self, name: str, rows: slice) -> Tensor:
        """Read some rows of the weight to which low-rank updates are added."""
        recipe = self.recipes[name]
        if recipe.source is None:
            return self.base.read_rows(recipe.source_name, rows)
        return recipe.source.read_replaced_rows(recipe.source_name, rows)

    def hash_inputs(self) -> dict[str, dict[str, str]]:
        """Return the hashes of the files of base and adapters, by owner and file name."""
        inputs = {"base": hash_files(self.base.files)}
        for number, adapter in enumerate(self.adapters):
            files = [adapter.path / ADAPTER_CONFIG_FILE, adapter.file]
            inputs[f"adapter {number}"] = hash_files(files)
        return inputs


def plan_merge(
    base_dir: Path, adapter_dirs: list[Path], dtype_of: Callable[[TensorSpec], torch.dtype]
) -> MergePlan:
    """Plan how each weight is merged; reads only the headers of the weight files.

    Args:
        base_dir: Hugging Face model directory.
        adapter_dirs: Directories written by PEFT, in training order.
        dtype_of: Returns the type to which a weight of the base is cast.

    Raises:
        ValueError: Files are missing or damaged, or an adapter or tokenizer does not fit.
    """
    base = open_weights(base_dir, what="base")
    quantized = check_not_quantized(base_dir, "base")
    if quantized:
        raise UserError(quantized[0])
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
    chat = find_chat_template([base_dir, *adapter_dirs])
    return MergePlan(
        base_dir=base_dir,
        base=base,
        names=names,
        adapters=tuple(adapters),
        recipes=recipes,
        tokenizer_dir=tokenizer_dir,
        settings=settings,
        is_untied=untied,
        stop_ids=find_stop_ids(chat[1] if chat else None, tokenizer_dir),
        model_settings=changed,
    )


def _model_settings(adapter_dirs: list[Path]) -> dict[str, Any]:
    """Return the model settings that the adapters were trained with and the base does not have."""
    found: dict[str, Any] = {}
    for path in adapter_dirs:
        # An adapter that was trained on the merge of earlier ones got theirs from its base.
        values = read_model_settings(path)
        differing = [field for field in values if found.get(field, values[field]) != values[field]]
        if differing:
            raise UserError(
                f"adapters: {path} was trained with {differing[0]} {values[differing[0]]}, but an "
                f"earlier adapter with {found[differing[0]]}; merge only adapters that agree"
            )
        found |= values
    if found:
        logger.info("writing settings of the adapters' training to config.json: %s", found)
    return found


def _is_tied(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json ties the embedding tables, by default as its model family does."""
    stated = settings.get("tie_word_embeddings")
    if stated is None and settings.get("model_type") in CONFIG_MAPPING:
        stated = CONFIG_MAPPING[settings["model_type"]]().tie_word_embeddings
    return bool(stated)


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of the rows of a weight of a shape, about 256 thousand elements each."""
    num_rows = max(1, _SLICE_NUMEL // max(1, math.prod(shape[1:])))
    return (slice(start, min(start + num_rows, shape[0])) for start in range(0, shape[0], num_rows))


def _cast(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    cast = values.to(dtype)
    if dtype == torch.float16 and values.dtype != dtype and not bool(cast.isfinite().all()):
        largest = float(values.abs().max())
        raise UserError(
            f"dtype: {name} has values up to {largest:.4g}, but float16 ends at 65,504; use "
            "bfloat16 or float32"
        )
    return cast


def _names(
    base: ShardedWeights, base_names: BaseWeightNames, adapters: list[Adapter], *, tied: bool
) -> list[str]:
    """Return the names of the merged weights; an adapter may untie the base's embedding tables."""
    names = list(base.specs)
    for adapter in adapters:
        unknown = sorted(adapter.weight_names - set(names) - ({base_names.head} if tied else set()))
        if unknown:
            raise UserError(
                f"adapters: {adapter.path} changes {len(unknown)} weights that the base does not "
                f"have, first {unknown[0]}; set base to the model that it was trained on"
            )
    if tied and _is_untied(adapters, base_names):
        if base_names.prefix:
            raise UserError(
                f"base: the adapters untie its embedding tables, but its files lack the prefix "
                f"{base_names.prefix!r} in their names, so that a head would not be loaded; load "
                "the base in transformers and save it again"
            )
        names.append(base_names.head)
        logger.warning("the adapters train the output projection separately: it becomes untied")
    return names


def _is_untied(adapters: list[Adapter], base_names: BaseWeightNames) -> bool:
    """Whether the adapters make the base's tied input and output tables differ."""
    tables = (base_names.embedding, base_names.head)
    for adapter in adapters:
        both = [adapter.replaced.get(name) for name in tables]
        if all(both):
            if not torch.equal(*(adapter.read_replaced(name) for name in tables)):
                return True
        elif any(both) and not adapter.settings.get("ensure_weight_tying"):
            return True  # PEFT trained a copy of one table, and left the other unchanged
        changed = {*adapter.low_rank, *(adapter.token_rows.keys() - {base_names.embedding})}
        if changed & set(tables):
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
                f"adapters: {name} has shape {list(shape)} in {adapter.path}, but {list(before)} "
                "before; set base to the model that it was trained on"
            )
        if shape[0] < before[0]:
            raise UserError(
                f"adapters: {name} has {shape[0]} rows in {adapter.path}, fewer than the "
                f"{before[0]} before; list adapters in the order of their training"
            )
    updates = tuple(adapter for adapter in adapters[first:] if adapter.updates(name))
    source_name = base_names.embedding if is_tied_head and source is None else name
    for adapter in updates:
        if not adapter.fits(name, shape):
            raise UserError(
                f"adapters: {adapter.path} updates {name} of another shape than the base's "
                f"{list(shape)}; set base to the model that it was trained on"
            )
    dtype = dtype_of(TensorSpec(spec.dtype, shape))
    return WeightRecipe(source, source_name, updates, TensorSpec(dtype, shape))


def _find_tokenizer(base_dir: Path, adapters: list[Adapter]) -> Path | None:
    """Return the directory of the last adapter with a tokenizer, else the base's, else None."""
    for path in [*(adapter.path for adapter in reversed(adapters)), base_dir]:
        if has_tokenizer(path):
            return path
    logger.warning("neither the adapters nor the base have a tokenizer; writing none")
    return None


def _check_rows(
    recipes: Mapping[str, WeightRecipe],
    base_names: BaseWeightNames,
    num_before: int,
    tokenizer_dir: Path | None,
    *,
    is_adapters: bool,
) -> None:
    """Reject embedding tables of different sizes, and a tokenizer that does not match their rows.

    Rows without a token are valid as padding; if their total is not a multiple of 8, they belong to
    tokens that are missing from the adapter's tokenizer.
    """
    embedding, head = base_names.embedding, base_names.head
    rows = {name: recipes[name].spec.shape[0] for name in (embedding, head) if name in recipes}
    if len(set(rows.values())) > 1:
        raise UserError(
            f"adapters: {embedding} would have {rows[embedding]} rows and {head} {rows[head]}; "
            "set base to the model that was expanded for the adapter"
        )
    if tokenizer_dir is None:
        return
    num_ids = max(load_tokenizer(tokenizer_dir).get_vocab().values()) + 1
    if num_ids > rows[embedding]:
        raise UserError(
            f"adapters: the tokenizer of {tokenizer_dir} has {num_ids} ids, but the merged model "
            f"only {rows[embedding]} rows; use the tokenizer that the adapter was trained with"
        )
    if num_ids > num_before or rows[embedding] == num_before:
        return
    if not is_adapters or rows[embedding] % _PADDED == 0:
        num_surplus = rows[embedding] - num_before
        logger.warning("the adapters add %d embedding rows without a token", num_surplus)
    else:
        raise UserError(
            f"adapters: they have {rows[embedding]} rows and the base {num_before}, but the "
            f"tokenizer of {tokenizer_dir} has {num_ids} ids, none of them new; copy the tokenizer "
            "that the adapter was trained with into its directory"
        )


def check_adapters(plan: MergePlan) -> None:
    """Check that the adapters are complete, finite, and made to be merged in their order.

    Raises:
        ValueError: Lists what is wrong with each adapter, or the order that would be right.
    """
    problems: list[str] = []
    model = build_empty_model(plan.base_dir)
    for opened in plan.adapters:
        adapter = Adapter.open(opened.path)  # under PEFT's names
        rows = [adapter.spec(name).shape[0] for name in adapter.replaced if _is_table(name, model)]
        problems += check_adapter_fits(
            model, adapter, field="adapters", num_rows=max(rows, default=0)
        )
    if not problems:
        problems = check_chain(plan.base_dir, plan.adapters)
    if problems:
        raise UserError("\n".join(problems))
    for adapter in plan.adapters:
        adapter.check_values()


def _is_table(name: str, model: PreTrainedModel) -> bool:
    return any(name == f"{layer}.weight" for layer in embedding_layers(model))
