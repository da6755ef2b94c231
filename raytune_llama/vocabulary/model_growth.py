"""Write a model with the rows of a grown tokenizer, a tensor at a time.

    grow_model(Path("llama"), Path("grown-tokenizer"), folder, GrowthConfig())

Every weight but the embedding tables is copied bit for bit, and so are the rows of old tokens: what
the model says of them is unchanged.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import settings
from raytune_llama.model.directory import rewrite_weights, write_settings
from raytune_llama.model.tensors import open_weights
from raytune_llama.model.vocab import (
    EMBEDDING,
    HEAD,
    InitialRows,
    count_ids,
    initialize_new_rows,
    split_new_tokens,
)
from raytune_llama.storage.files import read_json
from raytune_llama.tokenizer.loader import load_tokenizer, write_tokenizer

logger = logging.getLogger(__name__)


@settings
class GrowthConfig:
    """The rows that a model gets for new tokens."""

    initial_rows: InitialRows = "mean_subtokens"
    """How they start, in the input embedding and in the output projection. `mean_subtokens`: the
    mean of the old tokens that their text splits into; `mean`: of all old tokens; `normal`: drawn
    around 0 with the deviation that the model's config names, as transformers did for the seeds."""
    rows_multiple_of: Annotated[int, Field(ge=1)] = 1
    """The number of rows is rounded up to a multiple of it; 64 or 128 suits GPUs. The surplus rows
    start as the mean of all old tokens."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Of `normal`."""
    max_shard_mib: Annotated[int, Field(ge=1)] = 5120
    """Largest safetensors file, unless one tensor is larger."""


@dataclass(frozen=True, kw_only=True)
class GrownModelSummary:
    """What was written."""

    num_old_ids: int
    """Ids of the model's own tokenizer."""
    num_ids: int
    """Ids of the grown one."""
    num_rows: int
    """Rows of the tables."""
    tensors: dict[str, str]
    """SHA256 of the bytes of each tensor."""


def grow_model(
    model: Path, tokenizer: Path, folder: Path, config: GrowthConfig
) -> GrownModelSummary:
    """Write a model directory for a tokenizer that was grown from the model's own.

    Args:
        model: A Hugging Face model directory with its tokenizer.
        tokenizer: Directory of the grown tokenizer.
        folder: Where to write; it must exist.
        config: How rows start.

    Raises:
        ValueError: The model's files are missing or damaged, or its tables are none of a LLaMA's.
    """
    old, new = load_tokenizer(model), load_tokenizer(tokenizer)
    num_old, num_ids = count_ids(old), count_ids(new)
    weights = open_weights(model)
    if EMBEDDING not in weights.specs:
        raise UserError(f"model: {model} has no {EMBEDDING}; name a LLaMA-family model")
    num_before = weights.specs[EMBEDDING].shape[0]
    if num_old > num_before:
        raise UserError(
            f"model: the tokenizer of {model} has {num_old} ids, and its embedding {num_before} "
            "rows; put the tokenizer there that the model was trained with"
        )
    num_rows = max(num_before, num_ids)
    num_rows += -num_rows % config.rows_multiple_of
    pieces: dict[int, list[int]] = split_new_tokens(old, new)
    values: dict[str, Any] = read_json(model / "config.json")
    start = partial(
        initialize_new_rows,
        pieces=pieces,
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
    pad: dict[str, Any] = {}
    if new.pad_token is not None:
        pad["pad_token_id"] = new.pad_token_id
    write_settings(model, folder, {"vocab_size": num_rows} | pad, pad)
    write_tokenizer(tokenizer, folder)
    logger.info(
        "%s: %d ids become %d, %d rows become %d", model, num_old, num_ids, num_before, num_rows
    )
    return GrownModelSummary(
        num_old_ids=num_old, num_ids=num_ids, num_rows=num_rows, tensors=hashes
    )


def _grown(table_VD: Tensor, num_old: int, num_rows: int) -> Tensor:
    """Return a table with more rows, which are the mean of those of old ids."""
    grown_VD = table_VD.new_empty((num_rows, *table_VD.shape[1:]))
    grown_VD[: len(table_VD)] = table_VD
    grown_VD[len(table_VD) :] = table_VD[:num_old].float().mean(dim=0)
    return grown_VD
