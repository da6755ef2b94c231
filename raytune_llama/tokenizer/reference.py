"""The two libraries that define token ids, with one protocol: SentencePiece and `tokenizers`.

Both encode plain text: no special token is added, and one that is written in a text stays text.
Both can be pickled, including everything read from files.
"""

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError

# protobuf creates the classes of the module at import time: no type checker sees them.
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
"""SentencePiece's piece message; holds the types `PieceProto.NORMAL`, `PieceProto.CONTROL`, ..."""

_BPE = 2


class TextEncoder(Protocol):
    """Turns texts into token ids."""

    @property
    def name(self) -> str:
        """Name of the engine that produces the ids."""
        ...

    @property
    def version(self) -> str:
        """Version of the engine."""
        ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint32, without special tokens.

        Texts may be of any number and length: memory beyond texts and ids stays bounded.

        Raises:
            UnicodeEncodeError: A text holds a lone surrogate (a `ValueError`).
            UnsplittableTextError: A text has millions of characters without a safe split point
                (a `ValueError`).
        """
        ...


class SentencePieceReference:
    """Encodes with the SentencePiece library, for a tokenizer.model.

    Its processor never matches control pieces in a text. Pieces of another type that the
    tokenizer's settings call special are turned into control pieces for that reason.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, controls: frozenset[int]) -> None:
        """Load the content of a tokenizer.model.

        Args:
            model: Bytes of the file.
            controls: Ids that encoding a text must never produce.
        """
        self.version = version("sentencepiece")
        self._content = (model, controls)
        self.proto = ModelProto.FromString(model)
        for id_, piece in enumerate(self.proto.pieces):
            if id_ in controls and piece.type in (PieceProto.NORMAL, PieceProto.USER_DEFINED):
                piece.type = PieceProto.CONTROL
        self.split_points: SplitPoints | None = None
        if is_plain_merging(self.proto):
            self.split_points = build_pair_split_points(
                [piece.piece for piece in self.proto.pieces if piece.type in _TEXT_TYPES]
            )
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=self.proto.SerializeToString()
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (SentencePieceReference, self._content, self.version)

    def is_user_defined(self, id_: int) -> bool:
        """Whether an id is a user-defined piece: text that is always encoded as one token."""
        pieces = self.proto.pieces
        return id_ < len(pieces) and pieces[id_].type == PieceProto.USER_DEFINED

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`."""
        return encode_in_chunks(texts, self.split_points, self.encode_unsplit)

    def encode_unsplit(self, texts: Sequence[str], _: int = 0) -> list[np.ndarray]:
        """Encode texts without splitting them: time and memory grow with the longest."""
        utf8 = [text.encode() for text in texts]
        encoded = self._processor.encode(utf8, return_type="numpy", num_threads=1)
        return [ids.astype(np.uint32) for ids in encoded]


class TokenizersReference:
    """Encodes with the `tokenizers` library, for a tokenizer.json."""

    name = "tokenizers"

    def __init__(self, engine: str) -> None:
        """Load a tokenizer from its JSON.

        Encoding runs on the calling thread: the library's threads are disabled in this process.
        """
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.version = version("tokenizers")
        self._content = (engine,)
        self.engine: dict[str, Any] = json.loads(engine)
        self.split_points = build_engine_split_points(self.engine)
        self._tokenizer = Tokenizer.from_str(engine)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (TokenizersReference, self._content, self.version)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`."""
        return encode_in_chunks(texts, self.split_points, self.encode_unsplit)

    def encode_unsplit(self, texts: Sequence[str], _: int = 0) -> list[np.ndarray]:
        """Encode texts without splitting them: time and memory grow with the longest."""
        for text in texts:
            text.encode()  # on a lone surrogate the library raises a misleading TypeError
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]


ReferenceEncoder = SentencePieceReference | TokenizersReference


def _rebuild(
    kind: Callable[..., ReferenceEncoder], content: tuple[Any, ...], wanted: str
) -> ReferenceEncoder:
    """Unpickle a reference encoder."""
    reference = kind(*content)
    check_version(reference, wanted)
    return reference


def check_version(encoder: TextEncoder, wanted: str) -> None:
    """Check that an unpickled encoder's engine has the version that it was pickled with.

    Raises:
        ValueError: The versions differ, so the ids may differ.
    """
    if encoder.version != wanted:
        raise UserError(
            f"tokenizer version mismatch: {encoder.name} is {encoder.version} on this node and "
            f"{wanted} on the driver; install the same packages on all nodes"
        )


_TEXT_TYPES = (PieceProto.NORMAL, PieceProto.USER_DEFINED)


def is_plain_merging(proto: Any) -> bool:  # noqa: ANN401  # created at import time by protobuf
    """Whether a SentencePiece model merges the characters of a text unchanged.

    False for unigram models, normalizers that change characters or strip spaces, unused pieces
    (how they are resegmented depends on the full text), and models without byte fallback, which
    turn a run of unknown characters into one token.
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
    """Whether the bytes of a tokenizer.model are SentencePiece's; tiktoken uses the same name."""
    try:
        proto = ModelProto.FromString(content)
    except DecodeError:
        return False
    return bool(proto.pieces)
