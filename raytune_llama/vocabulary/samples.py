"""Corpus samples: full documents from evenly spaced byte ranges."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from raytune_llama.data.build.text_corpus import choose_splits
from raytune_llama.data.build.unit_reader import Tally, read_unit_documents
from raytune_llama.data.build.units import plan_units
from raytune_llama.data.filters.cleaning import Cleaner
from raytune_llama.data.filters.config import CleaningConfig
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.sources import discover_files

logger = logging.getLogger(__name__)

_RANGE_BYTES = 1 << 20


@dataclass(slots=True)
class TextSample:
    """A sample of documents from corpora, some of them held out."""

    texts: list[str] = field(default_factory=list)
    """Documents to learn from."""
    held_out: list[str] = field(default_factory=list)
    """Documents to measure on, chosen by a hash of their text."""
    num_bytes: int = 0
    """Number of UTF-8 bytes of all documents."""
    corpus_bytes: int = 0
    """Size of the corpora's files in bytes."""
    num_bad: int = 0
    """Number of rows read that can't be used."""


def sample_documents(
    sources: tuple[SourceConfig, ...], max_bytes: int, *, held_out: float = 0.0
) -> TextSample:
    """Sample documents evenly from corpora.

    Args:
        sources: The corpora.
        max_bytes: Bytes of text to read; of larger corpora, evenly spaced ranges of 1 MiB are read,
            or the beginning of a file that can't be read in ranges.
        held_out: Fraction of the documents to hold out.

    Raises:
        SourceError: A file cannot be read as configured.
    """
    files = discover_files(sources)
    units = plan_units(files, _RANGE_BYTES)
    sample = TextSample(corpus_bytes=sum(unit.num_bytes for unit in units))
    share = min(1.0, max_bytes / max(1, sample.corpus_bytes))
    cleaner, read = Cleaner(CleaningConfig()), 0.0
    for unit in units:
        # Bytes due by now: small units are read in full or skipped.
        read += share * unit.num_bytes
        tally, due = Tally(), int(read) - sample.num_bytes
        if due <= 0:
            continue
        for documents in read_unit_documents(unit, files, tally, None, cleaner):
            _add(sample, documents.texts, held_out)
            sample.num_bytes += sum(documents.num_bytes)
            if share < 1 and sample.num_bytes >= read:
                break
        sample.num_bad += sum(tally.quarantined.values())
    logger.info(
        "read %.1f of %.1f MB of text: %d documents to learn from, %d held out, %d bad rows",
        *(sample.num_bytes / 1e6, sample.corpus_bytes / 1e6),
        *(len(sample.texts), len(sample.held_out), sample.num_bad),
    )
    return sample


def _add(sample: TextSample, texts: list[str], held_out: float) -> None:
    sides = choose_splits(texts, held_out)
    for split, chosen in (("train", sample.texts), ("validation", sample.held_out)):
        if split in sides:
            chosen += [text for text, is_in in zip(texts, sides[split], strict=True) if is_in]


def first_texts(texts: list[str], max_bytes: int) -> Iterator[str]:
    """Yield texts until they exceed a number of UTF-8 bytes."""
    for text in texts:
        if max_bytes <= 0:
            return
        max_bytes -= len(text.encode())
        yield text
