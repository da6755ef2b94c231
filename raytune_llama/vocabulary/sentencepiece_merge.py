"""Train SentencePiece pieces and merge them into LLaMA's vocabulary, as protobuf messages.

    added = train_pieces(texts, PieceTraining(num_pieces=20_000))
    merged = merge_pieces(base_model_bytes, added, scores="descending")

Pieces that are merged get ids behind the base's, whose own stay. SentencePiece merges the adjacent
pair of the highest score first: scores below all of the base's leave its merges what they were, and
unique ones leave nothing to the order in which a library meets them. With equal scores (`tied`, the
Chinese-LLaMA scripts' zeros) libraries differ, and new pieces win over the base's own merges.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import sentencepiece
from pydantic import Field

# The classes of a protobuf module are made when it is imported: no type checker sees them.
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]
)

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import settings
from raytune_llama.tokenizer.reference import PieceProto, is_sentencepiece
from raytune_llama.tokenizer.split_points import SPACE

PieceScores = Literal["descending", "tied"]
"""How merged pieces are scored: each below the one before it, or all 0."""

_BPE = 2
_WESTERN = re.compile("[\0-\x7f\xa0-\xbf\u2000-\u206f]+")
_SENTENCE_CHARACTERS = 1024
_MAX_SENTENCE_BYTES = 4 * _SENTENCE_CHARACTERS


@settings
class PieceTraining:
    """What new tokens are learned from text."""

    num_tokens: Annotated[int, Field(ge=300)] = 20_000
    """Size of the vocabulary that SentencePiece trains, of which the base may have a part already;
    for a byte-level base, the tokens that are added."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece's training. A LLaMA tokenizer merges pairs whatever trained the pieces: of
    unigram's it can never make some. Not used for a byte-level base."""
    character_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9995
    """Share of the text's characters that get a piece. Not used for a byte-level base, which can
    spell all of them."""
    num_threads: Annotated[int, Field(ge=1)] = 2
    """Threads of SentencePiece."""


@dataclass(frozen=True, kw_only=True)
class MergedPieces:
    """A grown SentencePiece model, and what became of the pieces that were to be added."""

    model: bytes
    """Content of its tokenizer.model."""
    num_base: int
    """Pieces of the base, whose ids are unchanged."""
    num_new: int
    """Pieces behind them."""
    left_out: dict[str, int]
    """Pieces that were not added, by reason: `known`, `control` (of another type than text),
    `ascii` (and signs that Western text has), `unreachable`, `chosen` (by the caller)."""
    unreachable: tuple[str, ...]
    """Pieces that merging pairs never makes, whether they were left out or not."""


def train_pieces(texts: Iterable[str], training: PieceTraining) -> bytes:
    """Train a SentencePiece model and return its bytes.

    Line ends separate sentences, and a long line is cut into several: SentencePiece would skip it.

    Raises:
        ValueError: There is too little text for so many pieces.
    """
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=written,
            model_type=training.model_type,
            vocab_size=training.num_tokens,
            character_coverage=training.character_coverage,
            num_threads=training.num_threads,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            train_extremely_large_corpus=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"training.num_tokens: SentencePiece can't train {training.num_tokens} pieces on this "
            f"text ({error}); give more text, or ask for fewer"
        ) from error
    return written.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            # NUL ends a sentence for SentencePiece.
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                yield line[start : start + _SENTENCE_CHARACTERS].replace("\0", " ")


def read_pieces(content: bytes, name: str) -> Any:  # noqa: ANN401  # made when it is imported
    """Parse a tokenizer.model.

    Raises:
        ValueError: It is no SentencePiece model; names it.
    """
    if not is_sentencepiece(content):
        raise UserError(f"{name}: is no SentencePiece model; name a tokenizer.model of that kind")
    return ModelProto.FromString(content)


def check_base(content: bytes, name: str) -> None:
    """Refuse a base that pieces can't be merged into.

    Raises:
        ValueError: Says why.
    """
    base = read_pieces(content, name)
    if base.trainer_spec.model_type != _BPE:
        raise UserError(
            f"{name}: is no BPE model, the scores of its pieces are probabilities; pieces can be "
            "merged into tokenizers of LLaMA's kind"
        )


def merge_pieces(
    base_model: bytes,
    added_model: bytes,
    *,
    scores: PieceScores = "descending",
    keep_ascii: bool = False,
    keep_unreachable: bool = False,
    without: frozenset[str] = frozenset(),
) -> MergedPieces:
    """Append the pieces of one SentencePiece model to another one.

    Args:
        base_model: Content of a tokenizer.model that `check_base` takes.
        added_model: Content of the other one, of any kind.
        scores: How the new pieces are scored.
        keep_ascii: Whether to add pieces of ASCII characters and Western signs alone. They change
            the ids of text that the base was trained on.
        keep_unreachable: Whether to add pieces that merging never makes: rows without use.
        without: Pieces to leave out whatever the rest says.
    """
    base, added = ModelProto.FromString(base_model), ModelProto.FromString(added_model)
    known = {piece.piece for piece in base.pieces}
    left_out: Counter[str] = Counter()
    pieces: dict[str, None] = {}
    for piece in added.pieces:
        if piece.piece in known or piece.piece in pieces:
            left_out["known"] += 1
        elif piece.type not in (PieceProto.NORMAL, PieceProto.USER_DEFINED):
            left_out["control"] += 1
        elif piece.piece in without:
            left_out["chosen"] += 1
        elif not keep_ascii and _is_western(piece.piece):
            left_out["ascii"] += 1
        else:
            pieces[piece.piece] = None
    unreachable = _find_unreachable(_appended(base_model, pieces, scores), len(base.pieces))
    if not keep_unreachable:
        left_out["unreachable"] = len(unreachable)
        for piece in unreachable:
            del pieces[piece]
    return MergedPieces(
        model=_appended(base_model, pieces, scores),
        num_base=len(base.pieces),
        num_new=len(pieces),
        left_out=dict(sorted((+left_out).items())),
        unreachable=tuple(unreachable),
    )


def _is_western(piece: str) -> bool:
    """Whether a piece is of ASCII, or of several characters with the signs of English text."""
    text = piece.replace(SPACE, "")
    return text.isascii() or (len(text) > 1 and _WESTERN.fullmatch(text) is not None)


def _appended(base_model: bytes, pieces: Iterable[str], scores: PieceScores) -> bytes:
    proto = ModelProto.FromString(base_model)
    # Single characters are merged from nothing, and LLaMA's have scores of -1e9, where a float32
    # tells no neighbours apart.
    score = np.float32(min((p.score for p in proto.pieces if len(p.piece) > 1), default=0))
    for piece in pieces:
        score = min(np.float32(score - 1), np.nextafter(score, np.float32("-inf")))
        proto.pieces.add(piece=piece, score=0.0 if scores == "tied" else float(score))
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _find_unreachable(model: bytes, first: int) -> list[str]:
    """Return the pieces from an id on that their own text does not become.

    That is exact: a merge inside of a text looks at nothing outside of it, so that a piece which is
    made anywhere is made from its text alone.
    """
    proto = ModelProto.FromString(model)
    pieces = [piece.piece for piece in proto.pieces][first:]
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    encoded = processor.encode([piece.replace(SPACE, " ") for piece in pieces])
    return [
        piece
        for id_, (piece, ids) in enumerate(zip(pieces, encoded, strict=True), start=first)
        if ids != [id_]
    ]
