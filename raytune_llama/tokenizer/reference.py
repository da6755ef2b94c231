"""The two libraries that define ids, behind one protocol: SentencePiece and `tokenizers`.

Both encode plain text: no special token is added, and one that is written in a text stays text.
Both can be pickled, with all that they read from files.
"""

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError

# The classes of a protobuf module are made when it is imported: no type checker sees them.
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]
)
from tokenizers import Tokenizer

from raytune_llama.config.errors import UserError
from raytune_llama.tokenizer.split_points import (
    SplitPoints,
    build_engine_split_points,
    build_pair_split_points,
    encode_in_chunks,
)

PieceProto = ModelProto.SentencePiece
"""Kinds of pieces: `PieceProto.NORMAL`, `PieceProto.CONTROL` and so on."""

_BPE = 2


class TextEncoder(Protocol):
    """What turns texts into ids."""

    @property
    def name(self) -> str:
        """The engine that makes the ids."""
        ...

    @property
    def version(self) -> str:
        """Its version."""
        ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint32, without special tokens.

        Texts of any number and length: memory stays bounded beyond what texts and ids take.

        Raises:
            UnicodeEncodeError: A text holds half of a surrogate pair (a `ValueError`).
            UncuttableTextError: A text is millions of characters long without a place where it
                could be cut (a `ValueError`).
        """
        ...


class SentencePieceReference:
    """SentencePiece's own ids.

    Its processor matches control pieces nowhere in a text. Pieces of another type that the
    tokenizer's settings call special are made control pieces, so that it matches them nowhere.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, controls: frozenset[int]) -> None:
        """Load the content of a tokenizer.model.

        Args:
            model: The file's bytes.
            controls: Ids that may not come out of a text.
        """
        self.version = version("sentencepiece")
        self._content = (model, controls)
        self.proto = ModelProto.FromString(model)
        for id_, piece in enumerate(self.proto.pieces):
            if id_ in controls and piece.type in (PieceProto.NORMAL, PieceProto.USER_DEFINED):
                piece.type = PieceProto.CONTROL
        self.cuts: SplitPoints | None = None
        if is_plain_merging(self.proto):
            self.cuts = build_pair_split_points(
                [piece.piece for piece in self.proto.pieces if piece.type in _TEXT_TYPES]
            )
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=self.proto.SerializeToString()
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (SentencePieceReference, self._content, self.version)

    def is_user_defined(self, id_: int) -> bool:
        """Whether an id stands for text that is always one token, wherever it is."""
        pieces = self.proto.pieces
        return id_ < len(pieces) and pieces[id_].type == PieceProto.USER_DEFINED

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`."""
        return encode_in_chunks(texts, self.cuts, self.encode_unsplit)

    def encode_unsplit(self, texts: Sequence[str], _: int = 0) -> list[np.ndarray]:
        """Encode texts whole: time and memory grow with the longest."""
        utf8 = [text.encode() for text in texts]
        encoded = self._processor.encode(utf8, return_type="numpy", num_threads=1)
        return [ids.astype(np.uint32) for ids in encoded]


class TokenizersReference:
    """The ids of the `tokenizers` library, for a tokenizer.json."""

    name = "tokenizers"

    def __init__(self, engine: str) -> None:
        """Load a tokenizer from its JSON.

        It runs on the calling thread: the library's own threads are switched off in this process.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.version = version("tokenizers")
        self._content = (engine,)
        self.engine: dict[str, Any] = json.loads(engine)
        self.cuts = build_engine_split_points(self.engine)
        self._tokenizer = Tokenizer.from_str(engine)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (TokenizersReference, self._content, self.version)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`."""
        return encode_in_chunks(texts, self.cuts, self.encode_unsplit)

    def encode_unsplit(self, texts: Sequence[str], _: int = 0) -> list[np.ndarray]:
        """Encode texts whole: time and memory grow with the longest."""
        for text in texts:
            text.encode()  # the library says of half of a surrogate pair that it is no str
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]


ReferenceEncoder = SentencePieceReference | TokenizersReference


def _rebuild(
    kind: Callable[..., ReferenceEncoder], content: tuple[Any, ...], wanted: str
) -> ReferenceEncoder:
    """Unpickle a reference."""
    reference = kind(*content)
    check_version(reference, wanted)
    return reference


def check_version(encoder: TextEncoder, wanted: str) -> None:
    """Refuse an encoder that was pickled where its engine has another version.

    Raises:
        ValueError: Another version may give other ids.
    """
    if encoder.version != wanted:
        raise UserError(
            f"ids are made by {encoder.name} {encoder.version} on this node and by {wanted} on the "
            "driver's; give all nodes the same packages"
        )


_TEXT_TYPES = (PieceProto.NORMAL, PieceProto.USER_DEFINED)


def is_plain_merging(proto: Any) -> bool:  # noqa: ANN401  # made when protobuf is imported
    """Whether a SentencePiece model merges the characters of a text as they are.

    Not so are: unigram models; a normalizer that changes characters or strips spaces; unused
    pieces, of which the parts depend on the whole text; and models without byte fallback, which
    make one token of unknown characters in a row.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return bool(
        trainer.model_type == _BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and not any(piece.type == PieceProto.UNUSED for piece in proto.pieces)
    )


def is_sentencepiece(content: bytes) -> bool:
    """Whether the bytes of a tokenizer.model are SentencePiece's; tiktoken's have that name too."""
    try:
        proto = ModelProto.FromString(content)
    except DecodeError:
        return False
    return bool(proto.pieces)
