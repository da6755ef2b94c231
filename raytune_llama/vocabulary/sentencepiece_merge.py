"""Train SentencePiece pieces and merge them into LLaMA's vocabulary, as protobuf messages.

    added = train_pieces(texts, PieceTraining(num_tokens=20_000))
    merged = merge_pieces(base_model_bytes, added, scores="descending")

Merged pieces get ids after the base's, which do not change. SentencePiece merges the adjacent pair
with the highest score first: scores below all of the base's preserve its merges, and unique scores
make the result independent of the library's order. With equal scores (`tied`, the Chinese-LLaMA
scripts' zeros) libraries differ, and new pieces take precedence over the base's own merges.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece

# The classes of a protobuf module are created on import: no type checker sees them.
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]
)

from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.reference import PieceProto, is_sentencepiece
from raytune_llama.tokenizer.split_points import SPACE
from raytune_llama.vocabulary.config import PieceScores, PieceTraining

_BPE = 2
_WESTERN = re.compile("[\0-\x7f\xa0-\xbf\u2000-\u206f]+")
_SENTENCE_CHARACTERS = 1024
_MAX_SENTENCE_BYTES = 4 * _SENTENCE_CHARACTERS


@dataclass(frozen=True, kw_only=True)
class MergedPieces:
    """A grown SentencePiece model, and the numbers of pieces added and dropped."""

    model: bytes
    """Content of the grown tokenizer.model."""
    num_base: int
    """Number of pieces of the base, whose ids are unchanged."""
    num_new: int
    """Number of added pieces, whose ids follow the base's."""
    left_out: dict[str, int]
    """Number of dropped pieces by reason: `known`, `control` (not of type text), `ascii` (or
    Western punctuation), `unreachable`, `chosen` (by the caller)."""
    unreachable: tuple[str, ...]
    """Pieces that merging pairs can never produce, whether dropped or not."""


def train_pieces(texts: Iterable[str], training: PieceTraining) -> bytes:
    """Train a SentencePiece model and return its bytes.

    Line ends separate sentences, and long lines are split, since SentencePiece would skip them.

    Raises:
        ValueError: The text is too short for this number of pieces.
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
            f"text ({error}); add text, or use fewer pieces"
        ) from error
    return written.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            # NUL ends a sentence for SentencePiece.
            for start in range(0, len(line), _SENTENCE_CHARACTERS):
                yield line[start : start + _SENTENCE_CHARACTERS].replace("\0", " ")


def read_pieces(content: bytes, name: str) -> Any:  # noqa: ANN401  # created on import
    """Parse a tokenizer.model.

    Raises:
        ValueError: The content is not a SentencePiece model; the message starts with `name`.
    """
    if not is_sentencepiece(content):
        raise UserError(
            f"{name}: is not a SentencePiece model; name a SentencePiece tokenizer.model"
        )
    return ModelProto.FromString(content)


def check_base(content: bytes, name: str) -> None:
    """Refuse a base that pieces can't be merged into.

    Raises:
        ValueError: The content is not a SentencePiece BPE model.
    """
    base = read_pieces(content, name)
    if base.trainer_spec.model_type != _BPE:
        raise UserError(
            f"{name}: is not a BPE model, since its scores are probabilities; name a LLaMA "
            "tokenizer, into which pieces can be merged"
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
    """Append the pieces of one SentencePiece model to another.

    Args:
        base_model: Content of a tokenizer.model that `check_base` accepts.
        added_model: Content of the tokenizer.model to add, of any model type.
        scores: How to score the new pieces.
        keep_ascii: Whether to add pieces of only ASCII characters and Western punctuation. They
            change the ids of text that the base was trained on.
        keep_unreachable: Whether to add pieces that merging can never produce: unused rows.
        without: Pieces to drop in any case.
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
    """Whether a piece is ASCII-only, or several characters of ASCII and Western punctuation."""
    text = piece.replace(SPACE, "")
    return text.isascii() or (len(text) > 1 and _WESTERN.fullmatch(text) is not None)


def _appended(base_model: bytes, pieces: Iterable[str], scores: PieceScores) -> bytes:
    proto = ModelProto.FromString(base_model)
    # Single characters result from no merge, and LLaMA's have scores near -1e9, where adjacent
    # values are equal in float32.
    score = np.float32(min((p.score for p in proto.pieces if len(p.piece) > 1), default=0))
    for piece in pieces:
        score = min(np.float32(score - 1), np.nextafter(score, np.float32("-inf")))
        proto.pieces.add(piece=piece, score=0.0 if scores == "tied" else float(score))
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def _find_unreachable(model: bytes, first: int) -> list[str]:
    """Return the pieces with ids of `first` or more that encoding their own text does not produce.

    This is exact: a merge depends on nothing outside the merged text, so a piece that is produced
    anywhere is also produced from its own text.
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
