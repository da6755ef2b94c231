"""Does a tokenizer fit a model, and growing the embeddings where it is larger."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from raytune_llama.model.tokenizer import (
    TOKENIZER_FILES,
    build_reference,
    encode_text,
    load_tokenizer,
    tokenizer_sha256,
)

logger = logging.getLogger(__name__)

InitialRows = Literal["mean_subtokens", "mean", "normal"]
"""How the rows of new tokens start: as the mean of the old tokens that their text splits into, as
the mean of all old tokens, or drawn from a normal distribution around 0, as transformers did."""


@dataclass(frozen=True)
class VocabularyFit:
    """How a tokenizer and the rows of a model's embedding go together."""

    num_rows: int
    """Rows of the model's input embedding."""

    num_base_ids: int
    """Ids that the model was trained with: those of its own tokenizer, or all rows without one."""

    num_ids: int
    """One more than the largest id of the tokenizer in use."""

    @property
    def num_new_ids(self) -> int:
        """Ids that the model has not been trained with."""
        return max(0, self.num_ids - self.num_base_ids)

    @property
    def num_surplus_rows(self) -> int:
        """Rows that no id of the tokenizer names; legal, and kept."""
        return max(0, self.num_rows - self.num_ids)


def check_vocabulary(num_rows: int, model_path: Path, tokenizer_path: Path) -> VocabularyFit:
    """Compare a tokenizer with the model that it is to be used with.

    Args:
        num_rows: rows of the model's input embedding.
        model_path: the model's directory; its own tokenizer, where it has one, is the reference.
        tokenizer_path: directory of the tokenizer to use.

    Raises:
        ValueError: the tokenizer gives other meanings to ids that the model was trained with, or
            the model's own tokenizer has ids beyond its rows, or the model has none to grow from.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    num_ids = count_ids(tokenizer)
    if not has_tokenizer(model_path):
        if num_ids > num_rows:
            raise ValueError(
                f"model.tokenizer: {tokenizer_path} has ids up to {num_ids - 1}, and the embedding "
                f"of {model_path} has {num_rows} rows; it can grow only from the tokenizer that "
                "the model was trained with: put that one into model.path"
            )
        logger.warning("%s has no tokenizer of its own: only sizes can be compared", model_path)
        return VocabularyFit(num_rows=num_rows, num_base_ids=num_rows, num_ids=num_ids)
    own = load_tokenizer(model_path)
    if tokenizer_sha256(model_path) != tokenizer_sha256(tokenizer_path):
        _refuse_foreign(own, tokenizer, model_path, tokenizer_path)
    references = [build_reference(each).name for each in (own, tokenizer)]
    if references[0] != references[1]:
        logger.warning(
            "ids of %s are made by %s and those of %s by %s: they can differ where pieces have "
            "equal scores, and the model was trained with the former",
            *(model_path, references[0], tokenizer_path, references[1]),
        )
    if count_ids(own) > num_rows:
        raise ValueError(
            f"model.path: the tokenizer of {model_path} has ids up to {count_ids(own) - 1}, but "
            f"its embedding has {num_rows} rows; put the tokenizer that the model was trained with "
            "there and name the larger one in model.tokenizer"
        )
    return VocabularyFit(num_rows=num_rows, num_base_ids=count_ids(own), num_ids=num_ids)


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def count_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id; the length would be too small with gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _refuse_foreign(
    own: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    model_path: Path,
    tokenizer_path: Path,
) -> None:
    own_ids, other_ids = own.get_vocab(), other.get_vocab()
    changed = sorted((id_, token) for token, id_ in own_ids.items() if other_ids.get(token) != id_)
    if changed:
        id_, token = changed[0]
        raise ValueError(
            f"model.tokenizer: {tokenizer_path} ({len(other_ids)} tokens) is neither the tokenizer "
            f"of {model_path} ({len(own_ids)} tokens) nor grown from it: {len(changed)} tokens "
            f"have another id or none, the first is {token!r}, {id_} there and "
            f"{other_ids.get(token)} here; use the model's own tokenizer or one grown from it"
        )


@torch.no_grad()
def grow_embeddings(
    model: PreTrainedModel, old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast
) -> int:
    """Give every id of `new` that `old` lacks a row, and return how many there are.

    A new row is the mean of the rows of the tokens into which `old` splits the new token, in the
    input embedding and, where it is not tied, in the output projection. A control token, which
    stands for no text, starts as the mean of all old rows. Rows of old ids keep their bits.
    """
    num_old, num_new = count_ids(old), count_ids(new)
    if num_new <= num_old:
        return 0
    pieces = {id_: split_new_token(old, new, id_) for id_ in range(num_old, num_new)}
    if num_new > num_embedding_rows(model):
        model.resize_token_embeddings(num_new, mean_resizing=False)
    for table in {id(table): table for table in _embedding_tables(model)}.values():
        rows = initial_rows(table[:num_old], list(pieces.values()))
        table[num_old:num_new] = rows.to(table.dtype)
    num_unsplit = sum(not ids for ids in pieces.values())
    logger.info(
        "vocabulary grown from %d to %d ids: %d rows start as the mean of the tokens that their "
        "text splits into, %d (control tokens) as the mean of all rows",
        num_old,
        num_new,
        len(pieces) - num_unsplit,
        num_unsplit,
    )
    return len(pieces)


def initial_rows(
    old_rows: torch.Tensor,
    pieces: Sequence[Sequence[int]],
    method: InitialRows = "mean_subtokens",
    *,
    std: float = 0.02,
    seed: int = 0,
) -> torch.Tensor:
    """Return the rows that new tokens start with, float32 [new tokens, width].

    Args:
        old_rows: The rows of the old tokens, [old tokens, width].
        pieces: For each new token, the old tokens that its text splits into; none for a control
            token, which then starts as the mean of all.
        method: How.
        std: Standard deviation of `normal`.
        seed: Of `normal`.
    """
    if method == "normal":
        drawn = np.random.default_rng(seed).standard_normal((len(pieces), old_rows.shape[1]))
        return torch.from_numpy(drawn).float() * std
    rows = old_rows.float().mean(dim=0).repeat(len(pieces), 1)
    if method == "mean_subtokens":
        for row, ids in zip(rows, pieces, strict=True):
            if ids:
                row[:] = old_rows[list(ids)].float().mean(dim=0)
    return rows


def split_new_token(
    old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, id_: int
) -> list[int]:
    """Return the ids into which `old` splits a token of `new`; none for a control token."""
    added = new.added_tokens_decoder.get(id_)
    if added is None:
        # Tokens are spelled in the engine's own alphabet, in which a space and a part of a
        # character can be told from text; decoding and encoding again would lose both.
        token = new.convert_ids_to_tokens(id_)
        return [] if token is None else [p.id for p in old.backend_tokenizer.model.tokenize(token)]
    if added.special or id_ in new.all_special_ids:
        return []
    # Behind a line break no space is put before the text, as at the beginning of a document.
    line, ids = encode_text(old, ["\n", f"\n{added.content}"])
    if ids[: len(line)] == line:
        return ids[len(line) :]
    return encode_text(old, [added.content])[0]


def num_embedding_rows(model: PreTrainedModel) -> int:
    """Return the rows of the input embedding."""
    return _embedding_tables(model)[0].shape[0]


def _embedding_tables(model: PreTrainedModel) -> list[torch.Tensor]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [cast("torch.Tensor", layer.weight) for layer in layers if layer is not None]
