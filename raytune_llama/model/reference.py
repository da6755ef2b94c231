"""The two libraries that define ids, behind one protocol: SentencePiece and `tokenizers`.

Both encode plain text: no special token is added, and one that is written in a text stays text.
"""

import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Protocol

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError

# The classes of a protobuf module are made when it is imported: no type checker sees them.
from sentencepiece.sentencepiece_model_pb2 import (
    ModelProto,  # pyright: ignore[reportAttributeAccessIssue]
)
from tokenizers import Tokenizer

_PIECE = ModelProto.SentencePiece


class TextEncoder(Protocol):
    """What turns texts into ids."""

    @property
    def name(self) -> str:
        """The library that makes the ids."""
        ...

    @property
    def version(self) -> str:
        """Its version."""
        ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, uint32, without special tokens.

        Raises:
            UnicodeEncodeError: A text holds half of a surrogate pair (a `ValueError`).
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
        proto = ModelProto.FromString(model)
        self._user_defined: set[int] = set()
        for id_, piece in enumerate(proto.pieces):
            if piece.type == _PIECE.USER_DEFINED and id_ not in controls:
                self._user_defined.add(id_)
            if id_ in controls and piece.type in (_PIECE.NORMAL, _PIECE.USER_DEFINED):
                piece.type = _PIECE.CONTROL
        self._processor = sentencepiece.SentencePieceProcessor(
            model_proto=proto.SerializeToString()
        )

    def is_user_defined(self, id_: int) -> bool:
        """Whether an id stands for text that is always one token, wherever it is."""
        return id_ in self._user_defined

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`."""
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
        self._engine = Tokenizer.from_str(engine)
        self._engine.no_truncation()
        self._engine.no_padding()
        self._engine.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`."""
        for text in texts:
            text.encode()
        encoded = self._engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]


Reference = SentencePieceReference | TokenizersReference


def is_sentencepiece(content: bytes) -> bool:
    """Whether the bytes of a tokenizer.model are SentencePiece's; tiktoken's have that name too."""
    try:
        proto = ModelProto.FromString(content)
    except DecodeError:
        return False
    return bool(proto.pieces)
