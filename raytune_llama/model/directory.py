"""A model directory rewritten with other embedding tables; other weights stay bit-identical.

    write_with_tables(model, Path(base), Path(tokenizer), {"model.embed_tokens.weight": table}, out)

Weights are copied from the base's files one tensor at a time, so that neither the precision of
training nor its partitions affect them.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raytune_llama.config.errors import UserError
from raytune_llama.model.embeddings import embedding_layers, new_rows_name
from raytune_llama.model.tensors import TensorSpec, WeightsWriter, open_weights
from raytune_llama.model.vocab import (
    has_tokenizer,
    initialize_new_rows,
    is_tied,
    new_ids,
    split_new_tokens,
)
from raytune_llama.storage.files import read_json, write_json_atomic
from raytune_llama.tokenizer.loader import load_tokenizer

MAX_SHARD_BYTES = 5 * 2**30

_CONFIG, _GENERATION = "config.json", "generation_config.json"


def stored_tables(model: PreTrainedModel, path: Path) -> dict[str, str]:
    """Return the embedding tables in a model directory's files, by their name there.

    Args:
        model: the model of that directory, with or without its weights.
        path: a model directory.

    Returns:
        The name of each stored table's parameter in the model. A tied table can be stored under
        either name.

    Raises:
        ValueError: the files hold a table under none of the known names.
    """
    names = open_weights(path, what="model.path").specs
    layers = embedding_layers(model)
    first = next(n for n, layer in layers.items() if layer is model.get_input_embeddings())
    tied = is_tied(model)
    found: dict[str, str] = {}
    for layer in layers:
        name = f"{layer}.weight"
        # Models saved without their head lack the base-model prefix.
        stored = [n for n in (name, name.removeprefix(f"{model.base_model_prefix}.")) if n in names]
        if stored:
            found[stored[0]] = f"{first}.weight" if tied else name
    if len(set(found.values())) < (1 if tied else len(layers)):
        wanted = ", ".join(f"{layer}.weight" for layer in layers)
        raise UserError(
            f"model.path: the files of {path} lack the embedding tables {wanted}; load the model "
            "in transformers and save it again"
        )
    return found


def rewrite_weights(
    base: Path,
    folder: Path,
    num_rows: Mapping[str, int],
    change: Callable[[str, Tensor], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Rewrite a model's weights, changing some; the others stay bit-identical.

    Args:
        base: the model directory.
        folder: an existing directory.
        num_rows: new number of rows of each weight that changes.
        change: called with the name and values of such a weight; returns the tensor to write.
        max_shard_bytes: maximum size of a safetensors file, unless one tensor is larger.

    Returns:
        The hash of each tensor's bytes, by name.
    """
    weights = open_weights(base, what="model.path")
    specs = {
        name: TensorSpec(spec.dtype, (num_rows[name], *spec.shape[1:]))
        if name in num_rows
        else spec
        for name, spec in weights.specs.items()
    }
    hashes: dict[str, str] = {}
    with WeightsWriter(folder, specs, max_shard_bytes=max_shard_bytes) as writer:
        for name in specs:
            tensor = weights.read(name)
            hashes[name] = writer.write(name, change(name, tensor) if name in num_rows else tensor)
    return hashes


def write_settings(
    base: Path,
    folder: Path,
    values: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Iterable[int] = (),
) -> None:
    """Write a model's `config.json` and `generation_config.json`.

    Args:
        base: directory of the model whose settings are kept otherwise.
        folder: an existing directory.
        values: fields to override in `config.json`.
        tokenizer: see `write_token_settings`.
        stop_ids: see `write_token_settings`.
    """
    write_json_atomic(folder / _CONFIG, read_json(base / _CONFIG) | dict(values))
    if (base / _GENERATION).is_file():
        shutil.copyfile(base / _GENERATION, folder / _GENERATION)
    write_token_settings(folder, tokenizer, stop_ids)


def write_token_settings(
    folder: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int] = ()
) -> None:
    """Let a model directory's settings name the control tokens of the tokenizer that it carries.

    Plain `generate` stops at the ids in `generation_config.json`, which need not be those of a base
    that had another tokenizer or no chat template.

    Args:
        folder: a model directory; its `generation_config.json` is written if there is none.
        tokenizer: its tokenizer.
        stop_ids: further ids that end an answer, such as those of its chat template.
    """
    ids: dict[str, int | list[int]] = {
        f"{name}_token_id": found
        for name in ("bos", "eos", "pad")
        if isinstance(found := getattr(tokenizer, f"{name}_token_id"), int)
    }
    write_json_atomic(folder / _CONFIG, read_json(folder / _CONFIG) | ids)
    file = folder / _GENERATION
    generation = read_json(file) if file.is_file() else {}
    before = generation.get("eos_token_id")
    controls = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    kept = [before] if isinstance(before, int) else before or []
    own = tokenizer.eos_token_id
    ends = [*([own] if isinstance(own, int) else []), *stop_ids]
    ends = list(dict.fromkeys([*ends, *(id_ for id_ in kept if id_ in controls)]))
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    write_json_atomic(file, generation | ids)


def write_with_trained_tables(
    model: PreTrainedModel,
    base: Path,
    tokenizer: Path,
    trained: Mapping[str, Tensor],
    folder: Path,
    *,
    settings: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Write the weights and settings of a base model with trained embedding tables.

    Tables have one row per tokenizer id. Untrained rows are the base's, bit for bit, or are
    initialized by `vocab.initialize_new_rows`.

    Args:
        model: the trained model; only its structure is read.
        base: the directory that it was loaded from.
        tokenizer: directory of its tokenizer, which is not copied.
        trained: full tables, and new rows of tables, by parameter name.
        folder: an existing directory.
        settings: further config.json fields to override; see `llama.model_settings`. None: none.

    Returns:
        The L2 norm of each trained tensor, by parameter name.

    Raises:
        ValueError: a trained tensor is not finite in the base's precision.
    """
    weights = open_weights(base, what="model.path")
    tables = stored_tables(model, base)
    subtokens = _split_new_tokens(base, tokenizer)
    ids = new_ids(base, tokenizer)
    names = {name for table in tables.values() for name in (table, new_rows_name(table))}
    assert trained.keys() <= names, f"not embedding tables: {sorted(trained.keys() - names)}"
    num_rows = max(
        [*(weights.specs[name].shape[0] for name in tables), *(id_ + 1 for id_ in subtokens)]
    )

    def change(name: str, old_VD: Tensor) -> Tensor:
        table_VD = _grow_table(old_VD, subtokens)
        return _with_trained(table_VD, tables[name], trained, ids)

    rewrite_weights(base, folder, dict.fromkeys(tables, num_rows), change)
    values = {"vocab_size": num_rows, **(settings or {})}
    write_settings(base, folder, values, load_tokenizer(tokenizer))
    return {name: float(tensor.norm()) for name, tensor in trained.items()}


def _split_new_tokens(base: Path, tokenizer: Path) -> dict[int, list[int]]:
    if not has_tokenizer(base):
        return {}
    return split_new_tokens(load_tokenizer(base), load_tokenizer(tokenizer))


def _grow_table(old_VD: Tensor, subtokens: Mapping[int, list[int]]) -> Tensor:
    """Return the table grown by a row for each id that the base's tokenizer lacks."""
    if not subtokens:
        return old_VD
    table_VD = old_VD.new_empty((max(len(old_VD), max(subtokens) + 1), *old_VD.shape[1:]))
    table_VD[: len(old_VD)] = old_VD
    initialize_new_rows(table_VD, subtokens)
    return table_VD


def _with_trained(table_VD: Tensor, name: str, trained: Mapping[str, Tensor], ids: range) -> Tensor:
    """Return the table with its trained values: all of it, or the rows of ids new to the base."""
    if name in trained:
        return _cast(name, trained[name], table_VD.dtype)
    rows_name = new_rows_name(name)
    if rows_name in trained:
        rows_RD = _cast(rows_name, trained[rows_name], table_VD.dtype)
        assert len(rows_RD) == len(ids), f"{rows_name}: {len(rows_RD)} rows for {len(ids)} ids"
        table_VD = table_VD.clone()
        table_VD[ids.start : ids.stop] = rows_RD
    return table_VD


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    norm = float(cast.float().norm())
    if not math.isfinite(norm):
        raise UserError(f"{name}: is not finite in the base's precision, {dtype} (norm {norm})")
    return cast
