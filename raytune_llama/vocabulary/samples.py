"""Samples of corpora: whole documents, from ranges of bytes at even distances."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from raytune_llama.data.build.text_corpus import choose_splits
from raytune_llama.data.build.unit_reader import Tally, read_unit_documents
from raytune_llama.data.build.units import plan_units
from raytune_llama.data.filters.cleaning import Cleaner, CleaningConfig
from raytune_llama.data.readers.sources import SourceConfig, discover_files

logger = logging.getLogger(__name__)

_RANGE_BYTES = 1 << 20


@dataclass(slots=True)
class TextSample:
    """Documents of a corpus, some of them held out."""

    texts: list[str] = field(default_factory=list)
    """Those to learn from."""
    held_out: list[str] = field(default_factory=list)
    """Those to measure on, chosen by a hash of their text."""
    num_bytes: int = 0
    """Bytes of UTF-8 of both."""
    corpus_bytes: int = 0
    """Bytes of the files."""
    num_bad: int = 0
    """Rows met that can't be used."""


def sample_documents(
    sources: tuple[SourceConfig, ...], max_bytes: int, *, held_out: float = 0.0
) -> TextSample:
    """Read documents from all over some corpora.

    Args:
        sources: The corpora.
        max_bytes: How much text; where the corpora have more, ranges of 1 MiB at even distances
            are read, and of a file that can't be cut its beginning.
        held_out: Share of the documents to hold out.

    Raises:
        SourceError: A file cannot be read as configured.
    """
    files = discover_files(sources)
    units = plan_units(files, _RANGE_BYTES)
    sample = TextSample(corpus_bytes=sum(unit.num_bytes for unit in units))
    share = min(1.0, max_bytes / max(1, sample.corpus_bytes))
    cleaner, read = Cleaner(CleaningConfig()), 0.0
    for unit in units:
        # What is due by now: small units are taken or passed over as a whole.
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
    """Yield the first texts, up to a number of bytes of UTF-8."""
    for text in texts:
        if max_bytes <= 0:
            return
        max_bytes -= len(text.encode())
        yield text
