"""Read, clean and encode plain-text documents, unit by unit.

for documents in TextUnitReader(encoder).read(unit, plan, tally, quarantine): ...
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_llama.data.build.actors import read_sample_texts
from raytune_llama.data.build.duplicates_pass import DuplicateFilter
from raytune_llama.data.build.unit_reader import (
    DocumentBatch,
    QuarantineWriter,
    Tally,
    read_unit_documents,
)
from raytune_llama.data.build.units import BuildPlan, WorkUnit
from raytune_llama.data.config import DataConfig
from raytune_llama.data.filters.cleaning import Cleaner
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.store.manifest import SplitName
from raytune_llama.data.store.shards import EncodedDocuments
from raytune_llama.tokenizer.encoder import TokenIdMismatchError
from raytune_llama.tokenizer.reference import TextEncoder
from raytune_llama.tokenizer.split_points import UnsplittableTextError

logger = logging.getLogger(__name__)

_BATCH_DOCUMENTS = 8192
_BATCH_BYTES = 2 << 20


class TextUnitReader:
    """Picklable reader of text units; implements `unit_encoder.UnitReader`."""

    has_targets = False

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def read(
        self, unit: WorkUnit, plan: BuildPlan, tally: Tally, quarantine: QuarantineWriter
    ) -> Iterator[EncodedDocuments]:
        """Stream the encoded documents of a unit, accounting for every row."""
        duplicates = DuplicateFilter(unit, plan)
        for documents in read_unit_documents(
            unit, plan.files, tally, quarantine, Cleaner(plan.cleaning)
        ):
            for batch in _batched(duplicates.keep(documents, tally)):
                yield _encode_batch(batch, plan, self._encoder, tally)


def _encode_batch(
    documents: DocumentBatch, plan: BuildPlan, encoder: TextEncoder, tally: Tally
) -> EncodedDocuments:
    """Encode a batch; a text that yields no tokens is counted and dropped."""
    encoded = _encode(documents, plan, encoder, tally)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    has_tokens = lengths > 0
    tally.skipped["no_tokens"] += int((~has_tokens).sum())
    sides = choose_splits(documents.texts, plan.validation_fraction)
    is_validation = sides.get("validation", np.zeros(len(lengths), dtype=bool))
    return EncodedDocuments(
        file=documents.file,
        ids=encoded[0] if len(encoded) == 1 else np.concatenate(encoded),
        lengths=lengths[has_tokens],
        num_bytes=np.array(documents.num_bytes, dtype=np.int64)[has_tokens],
        offsets=np.array(documents.offsets, dtype=np.int64)[has_tokens],
        is_validation=is_validation[has_tokens],
    )


def _encode(
    documents: DocumentBatch, plan: BuildPlan, encoder: TextEncoder, tally: Tally
) -> list[NDArray[np.uint32]]:
    """Encode a batch; a text that cannot be split for encoding is counted and gets no ids."""
    place = plan.files[documents.file].place
    try:
        return encoder.encode(documents.texts)
    except TokenIdMismatchError as error:
        offset = documents.offsets[error.index]
        raise SourceError(f"{place}: byte {offset}: {error}") from error
    except UnsplittableTextError:
        pass
    encoded: list[NDArray[np.uint32]] = []
    for text, offset in zip(documents.texts, documents.offsets, strict=True):
        try:
            encoded += encoder.encode([text])
        except UnsplittableTextError as error:
            logger.warning("%s: byte %d: document skipped: %s", place, offset, error)
            tally.skipped["uncuttable"] += 1
            tally.skipped["no_tokens"] -= 1  # the caller adds 1 for every text without tokens
            encoded.append(np.empty(0, dtype=np.uint32))
    return encoded


def _batched(documents: DocumentBatch) -> Iterator[DocumentBatch]:
    """Split documents into batches large enough to amortize a call, in bounded memory."""
    ends = np.cumsum(documents.num_bytes)
    start = num_bytes = 0
    while start < len(documents.texts):
        full = int(np.searchsorted(ends, num_bytes + _BATCH_BYTES)) + 1
        stop = min(full, start + _BATCH_DOCUMENTS, len(documents.texts))
        yield _slice(documents, start, stop)
        start, num_bytes = stop, int(ends[stop - 1])


def _slice(documents: DocumentBatch, start: int, stop: int) -> DocumentBatch:
    return DocumentBatch(
        documents.file,
        documents.texts[start:stop],
        documents.offsets[start:stop],
        documents.num_bytes[start:stop],
    )


def choose_splits(
    texts: list[str], validation_fraction: float
) -> dict[SplitName, NDArray[np.bool_]]:
    """Assign documents to splits by their texts alone, so that equal texts stay together.

    A text goes to validation if the first 64 bits of its SHA-256, scaled to [0, 1), are below
    `validation_fraction`.

    Returns:
        A boolean mask over `texts` per split; only `train` if the fraction is 0.
    """
    if not validation_fraction:
        return {"train": np.ones(len(texts), dtype=bool)}
    bound = int(validation_fraction * 2**64).to_bytes(8, "big")
    below = (sha256(text.encode()).digest()[:8] < bound for text in texts)
    validation = np.fromiter(below, dtype=bool, count=len(texts))
    return {"train": ~validation, "validation": validation}


@dataclass(frozen=True)
class TextCorpus:
    """Plain-text documents; implements `Corpus`."""

    config: DataConfig
    """Data settings of the job."""
    files: list[SourceFile]
    """All source files, in store order."""

    @property
    def fingerprint_inputs(self) -> dict[str, Any]:
        """Inputs that decide the documents, besides the files and the tokenizer."""
        config = self.config
        return {
            "cleaning": config.cleaning.fingerprint_inputs,
            "duplicates": config.duplicates.fingerprint_inputs,
        }

    def sample_texts(self) -> list[str]:
        """Read the heads of some files, to select an encoder."""
        return read_sample_texts(self.files)

    def build_reader(self, encoder: TextEncoder) -> TextUnitReader:
        """Build the unit reader for the workers."""
        return TextUnitReader(encoder)
