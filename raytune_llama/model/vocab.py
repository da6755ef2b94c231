"""Checks that a tokenizer fits a model, and grows the embeddings for new tokens."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raytune_llama.config.errors import UserError
from raytune_llama.model.config import InitialRows
from raytune_llama.storage.files import read_manifest
from raytune_llama.tokenizer.loader import (
    TOKENIZER_FILES,
    encode_text,
    hash_tokenizer,
    load_tokenizer,
    reference_name,
)

logger = logging.getLogger(__name__)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names of the two embedding tables in a LLaMA's weights."""


@dataclass(frozen=True)
class VocabularyFit:
    """The match between a tokenizer's ids and the rows of a model's embedding."""

    num_rows: int
    """Rows of the model's input embedding."""

    num_base_ids: int
    """Number of ids that the model was trained with: those of its own tokenizer, else all rows."""

    num_ids: int
    """One more than the largest id of the tokenizer in use."""

    @property
    def num_new_ids(self) -> int:
        """Number of ids that the model has not been trained with."""
        return max(0, self.num_ids - self.num_base_ids)

    @property
    def new_ids(self) -> range:
        """The ids that the model has not been trained with."""
        return range(self.num_base_ids, self.num_base_ids + self.num_new_ids)

    @property
    def num_unused_rows(self) -> int:
        """Number of rows without an id in the tokenizer; they are legal, and kept."""
        return max(0, self.num_rows - self.num_ids)


def check_vocabulary(num_rows: int, model_path: Path, tokenizer_path: Path) -> VocabularyFit:
    """Check a tokenizer against the model that it is to be used with.

    Args:
        num_rows: rows of the model's input embedding.
        model_path: the model's directory; its own tokenizer, if it has one, is the reference.
        tokenizer_path: directory of the tokenizer to use.

    Raises:
        ValueError: the tokenizer changes the meaning of ids that the model was trained with, or
            has more ids than a model without its own tokenizer has rows, or the model's own
            tokenizer has ids beyond its rows.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    num_ids = count_ids(tokenizer)
    if not has_tokenizer(model_path):
        if num_ids > num_rows:
            raise UserError(
                f"model.tokenizer: {tokenizer_path} has ids up to {num_ids - 1}, but the "
                f"embedding of {model_path} has {num_rows} rows; to grow it, put the tokenizer "
                "that the model was trained with into model.path"
            )
        logger.warning("%s has no tokenizer: only the number of ids can be compared", model_path)
        return VocabularyFit(num_rows=num_rows, num_base_ids=num_rows, num_ids=num_ids)
    own = load_tokenizer(model_path)
    if hash_tokenizer(model_path) != hash_tokenizer(tokenizer_path):
        foreign = describe_tokenizer_mismatch(model_path, tokenizer_path)
        if foreign is not None:
            raise UserError(
                f"model.tokenizer: {foreign}; use the model's own tokenizer or one grown from it"
            )
    references = [reference_name(each) for each in (own, tokenizer)]
    if references[0] != references[1]:
        logger.warning(
            "%s is encoded by %s, but %s by %s: ids can differ if pieces have equal scores, and "
            "the model was trained with the former",
            *(model_path, references[0], tokenizer_path, references[1]),
        )
    if count_ids(own) > num_rows:
        raise UserError(
            f"model.path: the tokenizer of {model_path} has ids up to {count_ids(own) - 1}, but "
            f"its embedding has {num_rows} rows; put the tokenizer that the model was trained with "
            "there, and name the larger one in model.tokenizer"
        )
    num_base_ids = _num_trained_ids(model_path, own)
    return VocabularyFit(num_rows=num_rows, num_base_ids=num_base_ids, num_ids=num_ids)


def _num_trained_ids(model_path: Path, own: PreTrainedTokenizerBase) -> int:
    """Return how many ids a model was trained with; ids that were only grown do not count."""
    expanded = read_manifest(model_path).get("expanded")
    return expanded["num_old_ids"] if expanded else count_ids(own)


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id; `len` would be too small if ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def describe_tokenizer_mismatch(older: Path, newer: Path) -> str | None:
    """Describe how `newer` contradicts `older`; None if it is the same or grown from it."""
    own_ids, other_ids = (load_tokenizer(path).get_vocab() for path in (older, newer))
    changed = sorted((id_, token) for token, id_ in own_ids.items() if other_ids.get(token) != id_)
    if not changed:
        return None
    id_, token = changed[0]
    return (
        f"{newer} ({len(other_ids)} tokens) is neither the tokenizer of {older} ({len(own_ids)} "
        f"tokens) nor grown from it: {len(changed)} tokens have another id or none, the first is "
        f"{token!r}, {id_} there and {other_ids.get(token)} here"
    )


def new_ids(model_path: Path, tokenizer_path: Path) -> range:
    """Return the ids that a tokenizer has beyond those that the model was trained with.

    The range is empty for a model without a tokenizer, whose trained ids are unknown.
    """
    if not has_tokenizer(model_path):
        return range(0)
    num_old = _num_trained_ids(model_path, load_tokenizer(model_path))
    return range(num_old, max(num_old, count_ids(load_tokenizer(tokenizer_path))))


def grow_embeddings(
    model: PreTrainedModel, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast
) -> int:
    """Add a row for each id of `new` that `old` lacks; return the number of such ids.

    The input embedding grows and, if it is not tied, the output projection; see
    `initialize_new_rows`. Rows of old ids stay bit-identical.
    """
    subtokens = split_new_tokens(old, new)
    if not subtokens:
        return 0
    if max(subtokens) >= num_embedding_rows(model):
        model.resize_token_embeddings(max(subtokens) + 1, mean_resizing=False)
    for table in {id(table): table for table in _embedding_tables(model)}.values():
        initialize_new_rows(table, subtokens)
    num_unsplit = sum(not ids for ids in subtokens.values())
    logger.info(
        "vocabulary grown from %d to %d ids: %d new rows initialized to the mean of their "
        "subtokens, %d (control tokens) to the mean of all rows",
        min(subtokens),
        max(subtokens) + 1,
        len(subtokens) - num_unsplit,
        num_unsplit,
    )
    return len(subtokens)


@torch.no_grad()
def initialize_new_rows(
    table_VD: torch.Tensor,
    subtokens: Mapping[int, Sequence[int]],
    method: InitialRows = "mean_subtokens",
    *,
    std: float = 0.02,
    seed: int = 0,
) -> None:
    """Initialize the rows of new ids, which follow the old ones, in a table that is large enough.

    Args:
        table_VD: the table, modified in place.
        subtokens: the result of `split_new_tokens`; a control token has none, and gets the mean of
            all old rows.
        method: initialization method.
        std: standard deviation of `normal`.
        seed: random seed of `normal`.
    """
    old_rows = table_VD[: min(subtokens, default=0)]
    if method == "normal":
        drawn = np.random.default_rng(seed).standard_normal((len(subtokens), table_VD.shape[1]))
        table_VD[list(subtokens)] = (torch.from_numpy(drawn) * std).to(table_VD.dtype)
        return
    mean_of_all = old_rows.float().mean(dim=0)
    for id_, ids in subtokens.items():
        by_subtokens = ids and method == "mean_subtokens"
        table_VD[id_] = table_VD[list(ids)].float().mean(dim=0) if by_subtokens else mean_of_all


def split_new_tokens(
    old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast
) -> dict[int, list[int]]:
    """Return, for each id of `new` after the last id of `old`, the ids `old` splits it into."""
    ids = range(count_ids(old), count_ids(new))
    return {id_: split_new_token(old, new, id_) for id_ in ids}


def split_new_token(
    old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, id_: int
) -> list[int]:
    """Return the ids that `old` splits a token of `new` into; empty for a control token."""
    added = new.added_tokens_decoder.get(id_)
    if added is None:
        # Tokens are spelled in the engine's own alphabet, which marks spaces and partial
        # characters; decoding and encoding again would lose both.
        token = new.convert_ids_to_tokens(id_)
        return [] if token is None else [p.id for p in old.backend_tokenizer.model.tokenize(token)]
    if added.special or id_ in new.all_special_ids:
        return []
    # A tokenizer may prepend a space at the start of a document, but not after a line break.
    line, ids = encode_text(old, ["\n", f"\n{added.content}"])
    if ids[: len(line)] == line:
        return ids[len(line) :]
    return encode_text(old, [added.content])[0]


def num_embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of the input embedding."""
    return _embedding_tables(model)[0].shape[0]


def _embedding_tables(model: PreTrainedModel) -> list[torch.Tensor]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [cast("torch.Tensor", layer.weight) for layer in layers if layer is not None]


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output projection and the input embedding share one table."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight
