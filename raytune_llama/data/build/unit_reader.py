"""Read the documents of a work unit: its rows, minus blank, bad and filtered-out ones.

Every row is counted once, so that the tally balances.
"""

import errno
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress
from pathlib import Path
from types import TracebackType
from typing import Self

import pydantic

from raytune_llama.data.build.units import ByteRange, WorkUnit
from raytune_llama.data.filters.cleaning import Cleaner
from raytune_llama.data.readers.documents import OpenRange, read_rows
from raytune_llama.data.readers.lines import count_bytes
from raytune_llama.data.readers.ranges import HashingReader
from raytune_llama.data.readers.rows import BadRow, RowBatch, SourceError
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.store.manifest import RowCounts

_ABORT_BAD_ROWS = 1000  # more bad rows than this, and than good ones: not the configured format
_FIRST_REASONS = 10


@dataclass(frozen=True, kw_only=True)
class ByteRangeRecord:
    """Hashes and line count of a byte range."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    digests: list[str]
    """Hash of each block in the range's hashed bytes."""
    lines: int
    """Number of lines that start in the range, to number the lines of the next one."""


@dataclass(slots=True)
class DocumentBatch:
    """Consecutive documents of one file, as parallel lists."""

    file: int
    """Index of the source file."""
    texts: list[str]
    """Text of each document, as it will be encoded."""
    offsets: list[int]
    """Offset of each document in the file: bytes, or rows for tables."""
    num_bytes: list[int]
    """Size of each text in UTF-8 bytes."""

    def filter(self, mask: Sequence[bool]) -> "DocumentBatch":
        """Return the documents for which `mask` is true; it has one value per document."""
        if all(mask):
            return self
        return DocumentBatch(
            self.file,
            list(compress(self.texts, mask)),
            list(compress(self.offsets, mask)),
            list(compress(self.num_bytes, mask)),
        )


@dataclass(slots=True)
class Tally:
    """Mutable row counts of a unit by outcome, updated while it is read."""

    total: int = 0
    documents: int = 0
    aliased: int = 0
    events: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    range_records: list[ByteRangeRecord] = field(default_factory=list)

    def counts(self) -> RowCounts:
        """Return the counts for a manifest."""
        return RowCounts(
            total=self.total,
            documents=self.documents,
            # Unary plus drops reasons with a count of 0.
            skipped=dict(sorted((+self.skipped).items())),
            quarantined=dict(sorted(self.quarantined.items())),
            aliased=self.aliased,
            events=dict(sorted((+self.events).items())),
        )


class QuarantineWriter:
    """Writer of bad rows to a local JSON Lines file, which is created at the first bad row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.unlink(missing_ok=True)
        self._file = None
        self.first: list[str] = []

    def write(self, row: BadRow, file: SourceFile, piece: int) -> None:
        """Append a row; its line number counts from the start of the unit's byte range `piece`."""
        if self._file is None:
            self._file = self._path.open("w")
        place = {"source": file.source, "file": file.name, "piece": piece}
        self._file.write(json.dumps(place | asdict(row), ensure_ascii=False) + "\n")
        if len(self.first) < _FIRST_REASONS:
            where = f"{file.place}: {file.options.offset_unit} {row.offset}"
            self.first.append(f"{where}: {row.reason}: {row.detail}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_unit_documents(
    unit: WorkUnit,
    files: list[SourceFile],
    tally: Tally,
    quarantine: QuarantineWriter | None,
    cleaner: Cleaner,
) -> Iterator[DocumentBatch]:
    """Stream the documents of a unit, accounting for every row.

    Args:
        unit: Work unit to read.
        files: All source files.
        tally: Gets the counts of all, blank, bad and filtered rows; the caller counts the rest.
        quarantine: Gets the bad rows; None in a pass that does not record them.
        cleaner: Normalizes texts and decides which ones to drop.

    Raises:
        SourceError: A file cannot be read as configured, was changed since it was listed, or has
            mostly bad rows, so that it probably has another format than configured.
    """
    for _, byte_range, batch in read_byte_ranges(unit, files, tally, quarantine):
        yield _clean(_without_blank(batch, byte_range.file, tally), cleaner, tally)


def read_byte_ranges(
    unit: WorkUnit, files: list[SourceFile], tally: Tally, quarantine: QuarantineWriter | None
) -> Iterator[tuple[int, ByteRange, RowBatch]]:
    """Stream the rows of a unit as (index of the byte range in the unit, byte range, rows).

    Args:
        unit: Work unit to read.
        files: All source files.
        tally: Gets the counts of all and of bad rows; the caller counts the rest.
        quarantine: Gets the bad rows; None in a pass that does not record them.

    Raises:
        SourceError: As in `read_unit_documents`.
    """
    for number, byte_range in enumerate(unit.byte_ranges):
        file = files[byte_range.file]
        try:
            for batch in _read_byte_range(byte_range, number, file, tally, quarantine):
                yield number, byte_range, batch
            status = file.place.status()
        except OSError as error:
            if error.errno == errno.ENOSPC:  # from writing the quarantine, not from this file
                raise
            problem = f"{file.place}: cannot be read: {error.strerror or error}"
            raise SourceError(problem) from error
        if status is None or status.version != file.status.version:
            raise SourceError(f"{file.place} was changed while it was being read; run again")


def _read_byte_range(
    byte_range: ByteRange,
    number: int,
    file: SourceFile,
    tally: Tally,
    quarantine: QuarantineWriter | None,
) -> Iterator[RowBatch]:
    lines = 0
    with file.place.open() as opened:
        reader = HashingReader(opened, byte_range.hash_start, byte_range.hash_stop)
        opened_range = OpenRange(file.place, opened, byte_range.start, byte_range.stop, reader)
        for batch in read_rows(opened_range, file.options):
            lines += batch.num_lines
            tally.total += batch.num_rows
            tally.aliased += batch.num_alias_rows
            quarantine_rows(batch.bad, tally, quarantine, file, number)
            yield batch
        tally.range_records.append(ByteRangeRecord(digests=reader.block_hashes(), lines=lines))


def quarantine_rows(
    rows: Iterable[BadRow],
    tally: Tally,
    quarantine: QuarantineWriter | None,
    file: SourceFile,
    piece: int,
) -> None:
    """Count bad rows and write them to the quarantine; `piece` indexes the unit's byte ranges.

    Raises:
        SourceError: Most rows so far are bad, so the file probably has another format.
    """
    for row in rows:
        tally.quarantined[row.reason] += 1
        if quarantine is not None:
            quarantine.write(row, file, piece)
    _check_bad_rows(tally, file, quarantine)


def _clean(documents: DocumentBatch, cleaner: Cleaner, tally: Tally) -> DocumentBatch:
    if not cleaner.is_enabled:
        return documents
    kept = DocumentBatch(documents.file, [], [], [])
    cleaned = cleaner.clean_all(documents.texts)
    for (text, reason), offset in zip(cleaned, documents.offsets, strict=True):
        if reason is not None:
            tally.skipped[reason] += 1
        else:
            kept.texts.append(text)
            kept.offsets.append(offset)
            kept.num_bytes.append(count_bytes(text))
    return kept


def _check_bad_rows(tally: Tally, file: SourceFile, quarantine: QuarantineWriter | None) -> None:
    bad = tally.quarantined.total()
    if quarantine is not None and bad > _ABORT_BAD_ROWS and 2 * bad > tally.total:
        listed = "\n  ".join(quarantine.first)
        raise SourceError(
            f"{file.place}: {bad} of its first {tally.total} rows are unusable; check format, "
            f"encoding and text_field of its source. First ones:\n  {listed}"
        )


def _without_blank(batch: RowBatch, file: int, tally: Tally) -> DocumentBatch:
    documents = DocumentBatch(file, batch.texts, batch.offsets, batch.num_bytes)
    are_space = list(map(str.isspace, batch.texts))
    if "" not in batch.texts and True not in are_space:  # fast path without a Python loop
        return documents
    has_text = [
        bool(text) and not is_space for text, is_space in zip(batch.texts, are_space, strict=True)
    ]
    tally.skipped["blank"] += has_text.count(False)
    return documents.filter(has_text)
