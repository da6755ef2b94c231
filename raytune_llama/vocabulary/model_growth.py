"""Write a model with embedding rows for a grown tokenizer, one tensor at a time.

    grow_model(Path("llama"), Path("grown-tokenizer"), folder, GrowthConfig())

Every weight except the embedding tables is copied bit for bit, and so are the rows of old tokens:
the model's logits for them do not change.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from raytune_llama.config.errors import UserError
from raytune_llama.model.directory import rewrite_weights, write_settings
from raytune_llama.model.tensors import ShardedWeights, open_weights
from raytune_llama.model.vocab import (
    EMBEDDING,
    HEAD,
    count_ids,
    initialize_new_rows,
    split_new_tokens,
)
from raytune_llama.storage.files import read_json
from raytune_llama.tokenizer.loader import load_tokenizer, write_tokenizer
from raytune_llama.vocabulary.config import GrowthConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GrownModelSummary:
    """Sizes and hashes of a grown model."""

    num_old_ids: int
    """Number of ids of the model's own tokenizer."""
    num_ids: int
    """Number of ids of the grown tokenizer."""
    num_rows: int
    """Number of rows of the embedding tables."""
    tensors: dict[str, str]
    """Hash of each tensor's bytes, by name."""


def grow_model(
    model: Path, tokenizer: Path, folder: Path, config: GrowthConfig
) -> GrownModelSummary:
    """Write a model directory for a tokenizer that was grown from the model's own.

    Args:
        model: A Hugging Face model directory with its tokenizer.
        tokenizer: Directory of the grown tokenizer.
        folder: Output directory; it must exist.
        config: How to initialize the new rows.

    Raises:
        ValueError: The model's files are missing or damaged, or it has no LLaMA embedding.
    """
    old, new = load_tokenizer(model), load_tokenizer(tokenizer)
    num_old, num_ids = count_ids(old), count_ids(new)
    weights = open_weights(model)
    num_before = _count_rows(weights, model, num_old)
    num_rows = max(num_before, num_ids)
    num_rows += -num_rows % config.rows_multiple_of
    subtokens: dict[int, list[int]] = split_new_tokens(old, new)
    values: dict[str, Any] = read_json(model / "config.json")
    start = partial(
        initialize_new_rows,
        subtokens=subtokens,
        method=config.initial_rows,
        std=float(values.get("initializer_range", 0.02)),
        seed=config.seed,
    )

    def change(_: str, old_VD: Tensor) -> Tensor:
        table_VD = _grown(old_VD, num_old, num_rows)
        start(table_VD)
        return table_VD

    hashes = rewrite_weights(
        model,
        folder,
        dict.fromkeys({EMBEDDING, HEAD} & set(weights.specs), num_rows),
        change,
        max_shard_bytes=config.max_shard_mib << 20,
    )
    write_settings(model, folder, {"vocab_size": num_rows}, new)
    write_tokenizer(tokenizer, folder)
    logger.info(
        "%s: grown from %d to %d ids, from %d to %d rows",
        model,
        num_old,
        num_ids,
        num_before,
        num_rows,
    )
    return GrownModelSummary(
        num_old_ids=num_old, num_ids=num_ids, num_rows=num_rows, tensors=hashes
    )


def _count_rows(weights: ShardedWeights, model: Path, num_old: int) -> int:
    """Return the rows of the input embedding, which must cover the model's own tokenizer."""
    if EMBEDDING not in weights.specs:
        raise UserError(f"model: {model} has no {EMBEDDING}; name a LLaMA-family model")
    num_rows = weights.specs[EMBEDDING].shape[0]
    if num_old > num_rows:
        raise UserError(
            f"model: the tokenizer of {model} has {num_old} ids, but its embedding {num_rows} "
            "rows; put the tokenizer that the model was trained with there"
        )
    return num_rows


def _grown(table_VD: Tensor, num_old: int, num_rows: int) -> Tensor:
    """Return the table grown to `num_rows`; new rows are the mean of the rows of old ids."""
    grown_VD = table_VD.new_empty((num_rows, *table_VD.shape[1:]))
    grown_VD[: len(table_VD)] = table_VD
    grown_VD[len(table_VD) :] = table_VD[:num_old].float().mean(dim=0)
    return grown_VD
