"""Corpus encoders that run in the workers: the reference, or a fast engine it spot-checks.

`select_encoder` builds an encoder once on the driver; the workers receive it pickled, so they need
neither the tokenizer's directory nor transformers. The workers of a node share the fast engine's
tables.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raytune_llama.tokenizer.reference import ReferenceEncoder, TextEncoder
from raytune_llama.tokenizer.split_points import encode_in_chunks

if TYPE_CHECKING:
    from raytune_llama.tokenizer.compiled.encoder import CompiledEncoder


CHECK_INTERVAL_TEXTS = 1000
"""A worker checks one text in this many against the reference."""


@dataclass(frozen=True, kw_only=True)
class SelectedEncoder:
    """The encoder chosen for a corpus, and why it was chosen."""

    encoder: TextEncoder
    """Encoder to use: a reference or a `CheckedEncoder`. Picklable."""
    num_texts: int
    """Number of texts compared, sample and hard texts together; 0 for a reference."""
    num_bytes: int
    """Total size of the compared texts, in bytes of UTF-8."""
    reason: str | None
    """Why the reference is used; None for the fast engine."""


class TokenIdMismatchError(Exception):
    """The fast engine's ids differ from the reference's, although the initial comparison passed."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(index, message)
        self.index = index
        """Index of the text among those given to `encode`."""

    def __str__(self) -> str:
        return f"text {self.index} of a batch: {self.args[1]}"


class CheckedEncoder:
    """The fast engine, with a share of its texts checked against the reference.

    A mismatch is an error, not a reason to fall back to the reference: unchecked texts have already
    been written. A hash of the batch selects the texts to check, so each run checks the same ones;
    a chunk of a long document counts as a text.
    """

    def __init__(self, fast: "CompiledEncoder", reference: ReferenceEncoder) -> None:
        self.name, self.version = fast.name, fast.version
        self._fast = fast
        self._reference = reference

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`.

        Raises:
            TokenIdMismatchError: The ids of a checked text differ from the reference's.
        """
        return encode_in_chunks(texts, self._fast.split_points, self._encode)

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
            f"token ids differ: {self.name} {self.version} returned {len(ids)} ids, the reference "
            f"{self._reference.name} {self._reference.version} {len(wanted)}: "
            f"{excerpt(text)}; rebuild the store with engine=reference, and report this text"
        )


def excerpt(text: str) -> str:
    """Return a text quoted, truncated to 80 characters."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r} ... ({len(text)} characters)"
