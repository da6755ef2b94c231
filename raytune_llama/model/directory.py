"""A model directory written again with other embedding tables; all other weights keep their bits.

    write_with_tables(model, Path(base), Path(tokenizer), {"model.embed_tokens.weight": table}, out)

Weights go from the base's files to the new ones a tensor at a time, so that neither the precision
of training nor its partitions touch them.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raytune_llama.config.errors import UserError
from raytune_llama.model.embeddings import embedding_layers, new_rows_name
from raytune_llama.model.lora import is_tied
from raytune_llama.model.tensors import TensorSpec, WeightsWriter, open_weights
from raytune_llama.model.vocab import (
    has_tokenizer,
    initialize_new_rows,
    new_ids,
    split_new_tokens,
)
from raytune_llama.storage.files import read_json, write_json_atomic
from raytune_llama.tokenizer.loader import load_tokenizer

MAX_SHARD_BYTES = 5 * 2**30

_CONFIG, _GENERATION = "config.json", "generation_config.json"


def stored_tables(model: PreTrainedModel, path: Path) -> dict[str, str]:
    """Return the embedding tables in a model directory's files, by name there.

    Args:
        model: of that directory, with or without its weights.
        path: a model directory.

    Returns:
        For each table the name of its parameter in the model. A tied table can be stored under
        both of its names.

    Raises:
        ValueError: the files hold a table under no name that is known.
    """
    names = open_weights(path, what="model.path").specs
    layers = embedding_layers(model)
    first = next(n for n, layer in layers.items() if layer is model.get_input_embeddings())
    tied = is_tied(model)
    found: dict[str, str] = {}
    for layer in layers:
        name = f"{layer}.weight"
        # Models that were saved without their head lack the first part of the name.
        stored = [n for n in (name, name.removeprefix(f"{model.base_model_prefix}.")) if n in names]
        if stored:
            found[stored[0]] = f"{first}.weight" if tied else name
    if len(set(found.values())) < (1 if tied else len(layers)):
        wanted = ", ".join(f"{layer}.weight" for layer in layers)
        raise UserError(
            f"model.path: the files of {path} do not hold the embedding tables under the names "
            f"{wanted}; load it in transformers and save it again"
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
    """Write a model's weights again, some of them changed; of the others each bit is kept.

    Args:
        base: the model directory.
        folder: an existing directory.
        num_rows: for each weight that changes its new number of rows.
        change: takes the name and the values of such a weight; returns what is written.
        max_shard_bytes: largest safetensors file, unless one tensor is larger.

    Returns:
        The SHA256 of the bytes of each tensor.
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
    generation: Mapping[str, object] | None = None,
) -> None:
    """Write a model's `settings.json` and, where it has one, `generation_config.json`.

    Args:
        base: the model directory.
        folder: an existing directory.
        values: what differs in the first file.
        generation: what differs in the second; without that it is copied.
    """
    write_json_atomic(folder / _CONFIG, read_json(base / _CONFIG) | dict(values))
    if (base / _GENERATION).is_file():
        if generation:
            changed = read_json(base / _GENERATION) | dict(generation)
            write_json_atomic(folder / _GENERATION, changed)
        else:
            shutil.copyfile(base / _GENERATION, folder / _GENERATION)


def write_with_trained_tables(
    model: PreTrainedModel,
    base: Path,
    tokenizer: Path,
    trained: Mapping[str, Tensor],
    folder: Path,
    *,
    settings: Mapping[str, object] | None = None,
) -> dict[str, float]:
    """Write the weights and settings of a base whose embedding tables were trained.

    Tables have a row for each id of the tokenizer. Rows that were not trained are the base's, bit
    for bit, or start as `vocab.initialize_new_rows` has it.

    Args:
        model: the model that was trained; only its structure is read.
        base: the directory that it was loaded from.
        tokenizer: directory of its tokenizer; nothing of it is written.
        trained: whole tables, and new rows of tables, by parameter name.
        folder: an existing directory.
        settings: what else differs in the config.json; see `llama.model_settings`. None: nothing.

    Returns:
        The L2 norm of each trained tensor, by parameter name.

    Raises:
        ValueError: a trained tensor is not finite in the base's precision.
    """
    weights = open_weights(base, what="model.path")
    tables = stored_tables(model, base)
    pieces = _split_new_tokens(base, tokenizer)
    ids = new_ids(base, tokenizer)
    names = {name for table in tables.values() for name in (table, new_rows_name(table))}
    assert trained.keys() <= names, f"not written: {sorted(trained.keys() - names)}"
    num_rows = max(
        [*(weights.specs[name].shape[0] for name in tables), *(id_ + 1 for id_ in pieces)]
    )

    def change(name: str, old_VD: Tensor) -> Tensor:
        table_VD = _grow_table(old_VD, pieces)
        return _with_trained(table_VD, tables[name], trained, ids)

    rewrite_weights(base, folder, dict.fromkeys(tables, num_rows), change)
    write_settings(base, folder, {"vocab_size": num_rows, **(settings or {})})
    return {name: float(tensor.norm()) for name, tensor in trained.items()}


def _split_new_tokens(base: Path, tokenizer: Path) -> dict[int, list[int]]:
    if not has_tokenizer(base):
        return {}
    return split_new_tokens(load_tokenizer(base), load_tokenizer(tokenizer))


def _grow_table(old_VD: Tensor, pieces: Mapping[int, list[int]]) -> Tensor:
    """Return a table with a row for each id that the base's tokenizer lacks."""
    if not pieces:
        return old_VD
    table_VD = old_VD.new_empty((max(len(old_VD), max(pieces) + 1), *old_VD.shape[1:]))
    table_VD[: len(old_VD)] = old_VD
    initialize_new_rows(table_VD, pieces)
    return table_VD


def _with_trained(table_VD: Tensor, name: str, trained: Mapping[str, Tensor], ids: range) -> Tensor:
    """Return a table with what was trained of it: all, or the rows of ids new to the base."""
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
        raise UserError(f"{name}: is not finite as {dtype} (norm {norm}), the base's precision")
    return cast
