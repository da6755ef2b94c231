"""What encodes a corpus in the workers: a reference, or a fast engine that it goes on checking.

An encoder is made once, by `select_encoder` on the driver, and sent to the workers as a pickle:
they need neither the tokenizer's directory nor transformers, and the tables of the fast engine are
shared by the workers of a node.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from raytune_llama.tokenizer.reference import ReferenceEncoder, TextEncoder
from raytune_llama.tokenizer.split_points import encode_in_chunks

if TYPE_CHECKING:
    from raytune_llama.tokenizer.compiled.encoder import CompiledEncoder

EncoderKind = Literal["auto", "reference", "compiled"]
"""What may be asked for: `auto` is the fast engine where its ids were shown to be the reference's,
and `compiled` the same or an error."""

CHECK_INTERVAL_TEXTS = 1000
"""Of so many texts a worker checks one against the reference."""


@dataclass(frozen=True, kw_only=True)
class SelectedEncoder:
    """What encodes a corpus, and why."""

    encoder: TextEncoder
    """What makes the ids: a reference, or `CheckedEncoder`. Picklable."""
    num_texts: int
    """How many texts were compared: the sample and the hard ones; 0 for a reference."""
    num_bytes: int
    """How many bytes of UTF-8 they have."""
    reason: str | None
    """Why the reference is used; None for a fast engine."""


class TokenIdMismatchError(Exception):
    """A fast engine gave other ids than the reference, in spite of all that was compared before."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(index, message)
        self.index = index
        """The text's place among those given to `encode`."""

    def __str__(self) -> str:
        return f"text {self.index} of a batch: {self.args[1]}"


class CheckedEncoder:
    """The fast engine, with the reference beside it that checks a share of its texts.

    A difference is an error, and not a reason to go on with the reference: texts that were not
    checked have been written already. A hash of what is encoded at once says which are checked, so
    that it is the same ones in each run; a stretch of a long document is a text of its own.
    """

    def __init__(self, fast: "CompiledEncoder", reference: ReferenceEncoder) -> None:
        self.name, self.version = fast.name, fast.version
        self._fast = fast
        self._reference = reference

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`.

        Raises:
            IdsDifferError: A text that was checked has other ids.
        """
        return encode_in_chunks(texts, self._fast.cuts, self._encode)

    def _encode(self, texts: Sequence[str], first: int) -> list[np.ndarray]:
        encoded = self._fast.encode_unsplit(texts)
        offset = zlib.crc32("".join(texts).encode()) % CHECK_INTERVAL_TEXTS
        checked = range(offset, len(texts), CHECK_INTERVAL_TEXTS)
        wanted = self._reference.encode_unsplit([texts[place] for place in checked])
        for place, ids in zip(checked, wanted, strict=True):
            if not np.array_equal(encoded[place], ids):
                raise TokenIdMismatchError(
                    first + place, self._report(texts[place], encoded[place], ids)
                )
        return encoded

    def _report(self, text: str, ids: np.ndarray, wanted: np.ndarray) -> str:
        return (
            f"{self.name} {self.version} gives {len(ids)} ids, and {self._reference.name} "
            f"{self._reference.version}, the reference, {len(wanted)}, which are others: "
            f"{excerpt(text)}; build the store with engine=reference, and report the text"
        )


def excerpt(text: str) -> str:
    """Quote a text, or its beginning."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r} ... ({len(text)} characters)"
