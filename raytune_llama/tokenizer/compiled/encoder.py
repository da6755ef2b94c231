"""A fast BPE engine: the merge rules of a reference, compiled to machine code.

No library reproduces SentencePiece's ids for pieces of equal score, which merged vocabularies are
full of. The compiler is numba: widely maintained, with wheels for all platforms.
On Chinese and English text it is 4 to 8 times as fast as SentencePiece (`benchmarks/encoders.py`).
"""

import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from raytune_llama.tokenizer.compiled import kernel
from raytune_llama.tokenizer.compiled.tables import build_tables
from raytune_llama.tokenizer.reference import (
    ReferenceEncoder,
    SentencePieceReference,
    check_version,
)
from raytune_llama.tokenizer.split_points import SPACE, encode_in_chunks

REVISION = 1
"""Increment with each change of the kernel."""


class SegmentCache(NamedTuple):
    """Fixed-size cache of the ids of segments."""

    slots: np.ndarray
    """int32: hash table of offsets in `pool`; -1 marks a free slot."""
    pool: np.ndarray
    """int32: per entry, the counts of its code points and ids, then both."""
    used: np.ndarray
    """int64: entries used, values of `pool` used, and the maximum number of entries."""


def _empty_cache(entries: int) -> SegmentCache:
    return SegmentCache(
        slots=np.full(4 * entries, -1, np.int32),
        pool=np.zeros(16 * entries, np.int32),
        used=np.array([0, 0, entries]),
    )


class CompiledEncoder:
    """Encodes texts as a reference does, and passes the few texts it can't handle to it."""

    name = "compiled"

    def __init__(self, reference: ReferenceEncoder, memo_entries: int = 1 << 17) -> None:
        """Build the kernel tables of a reference.

        Args:
            reference: Encoder whose ids are reproduced.
            memo_entries: Size of the segment cache, at 80 bytes per entry; a full cache is
                cleared.

        Raises:
            ValueError: The kernel does not support the reference; the message names the reason.
        """
        self.version = compiled_version()
        self.split_points = reference.split_points
        self.num_apart = 0
        """Number of texts passed to the reference."""
        self._reference = reference
        self._vocabulary, self._boundaries = build_tables(reference)
        self._memo = _empty_cache(memo_entries)
        self._spaced, self._unless_spaced = False, False
        self._normal_form, self._strings = False, ()
        if isinstance(reference, SentencePieceReference):
            self._spaced = reference.proto.normalizer_spec.add_dummy_prefix
        else:
            self._read_engine(reference.engine)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_memo": int(self._memo.used[2])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"version": compiled_version()}
        check_version(self, state["version"])
        self._memo = _empty_cache(state["_memo"])

    def _read_engine(self, engine: dict[str, Any]) -> None:
        """Read the steps of a `tokenizers` engine that come before splitting."""
        self._normal_form = engine["normalizer"] == {"type": "NFC"}
        self._strings = tuple(
            token["content"] for token in engine["added_tokens"] if not token["special"]
        )
        splitter = engine["pre_tokenizer"]
        if splitter is not None and splitter["type"] == "Metaspace":
            self._spaced = splitter["prepend_scheme"] != "never"
            self._unless_spaced = True
        else:
            self._spaced = "Prepend" in str(engine["normalizer"])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextEncoder.encode`."""
        return encode_in_chunks(texts, self.split_points, self.encode_unsplit)

    def encode_unsplit(self, texts: Sequence[str], _: int = 0) -> list[np.ndarray]:
        """Encode texts as one batch: memory grows with their total length."""
        joined, lengths = self._join(texts)
        codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        starts = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        apart = np.zeros(len(texts), bool)
        if self._strings or self._normal_form:
            apart[:] = [self._needs_reference(text) for text in texts]
        stops = np.zeros(len(codes) + 1, np.int32)
        num = kernel.split(codes, starts, self._boundaries, stops[1:], apart)
        stops = stops[: num + 1]
        ids, ends = np.empty(4 * len(codes), np.int32), np.zeros(len(stops), np.int32)
        skipped = np.zeros(len(stops), bool)
        self._forget_if_full()
        segments = (ids, ends[1:], skipped[1:])
        kernel.encode(codes, stops[1:], self._vocabulary, self._memo, *segments)
        # A skipped segment ends after the start of its text.
        apart[np.searchsorted(starts, stops[skipped]) - 1] = True
        bounds = ends[np.searchsorted(stops, starts)].tolist()
        ids = ids[: bounds[-1]].astype(np.uint32)
        encoded = [ids[start:end] for start, end in pairwise(bounds)]
        return self._with_reference(texts, encoded, np.flatnonzero(apart).tolist())

    def _with_reference(
        self, texts: Sequence[str], encoded: list[np.ndarray], apart: list[int]
    ) -> list[np.ndarray]:
        if apart:
            self.num_apart += len(apart)
            others = self._reference.encode_unsplit([texts[index] for index in apart])
            for index, ids in zip(apart, others, strict=True):
                encoded[index] = ids
        return encoded

    def _join(self, texts: Sequence[str]) -> tuple[str, np.ndarray]:
        """Join texts, with the space that the tokenizer prepends to each; return the lengths."""
        if self._spaced and not self._unless_spaced and all(texts):
            return " " + " ".join(texts), _lengths(texts) + 1
        if self._spaced:
            unspaced = ("", " ", SPACE) if self._unless_spaced else ("",)
            texts = [text if text[:1] in unspaced else " " + text for text in texts]
        return "".join(texts), _lengths(texts)

    def _needs_reference(self, text: str) -> bool:
        """Whether a text contains something that the kernel can't handle."""
        if any(string in text for string in self._strings):
            return True
        return self._normal_form and not unicodedata.is_normalized("NFC", text)

    def _forget_if_full(self) -> None:
        entries, places, most_entries = self._memo.used.tolist()
        if entries == most_entries or places > 0.9 * len(self._memo.pool):
            self._memo.slots.fill(-1)
            self._memo.used[:2] = 0


def _lengths(texts: Sequence[str]) -> np.ndarray:
    return np.fromiter(map(len, texts), np.int64, len(texts))


def compiled_version() -> str:
    """Return the version of the engine: its revision and numba's version."""
    return f"{REVISION} (numba {version('numba')})"
