"""The documents of one unit of work: its rows, without what is blank, bad or filtered out.

Every row is counted where it ends up, so that the tally balances.
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

_ABORT_BAD_ROWS = 1000  # so many bad rows, and more bad ones than good: the file is something else
_FIRST_REASONS = 10


@dataclass(frozen=True, kw_only=True)
class ByteRangeRecord:
    """What was met in a piece of a file."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    digests: list[str]
    """Hash of each block that the piece hashes."""
    lines: int
    """Lines that start in it, to number those of the next piece."""


@dataclass(slots=True)
class DocumentBatch:
    """Documents one after the other; the lists go together."""

    file: int
    """Index of the source file that all are from."""
    texts: list[str]
    """As they are encoded."""
    offsets: list[int]
    """Where each starts in the file."""
    num_bytes: list[int]
    """UTF-8 bytes of each text."""

    def filter(self, which: Sequence[bool]) -> "DocumentBatch":
        """Return those for which `which`, as long as the lists, is true."""
        if all(which):
            return self
        return DocumentBatch(
            self.file,
            list(compress(self.texts, which)),
            list(compress(self.offsets, which)),
            list(compress(self.num_bytes, which)),
        )


@dataclass(slots=True)
class Tally:
    """What became of the rows of a unit; filled while it is read."""

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
            # Without reasons of which there was none.
            skipped=dict(sorted((+self.skipped).items())),
            quarantined=dict(sorted(self.quarantined.items())),
            aliased=self.aliased,
            events=dict(sorted((+self.events).items())),
        )


class QuarantineWriter:
    """Write bad rows to a local file, a JSON object a line; without any there is no file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.unlink(missing_ok=True)
        self._file = None
        self.first: list[str] = []

    def write(self, row: BadRow, file: SourceFile, piece: int) -> None:
        """Append a row; its line is counted from the start of the piece of its unit."""
        if self._file is None:
            self._file = self._path.open("w")
        place = {"source": file.source, "file": file.name, "piece": piece}
        self._file.write(json.dumps(place | asdict(row), ensure_ascii=False) + "\n")
        if len(self.first) < _FIRST_REASONS:
            self.first.append(f"{file.place}: byte {row.offset}: {row.reason}: {row.detail}")

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
    """Stream the documents of a unit, and account for every row.

    Args:
        unit: What to read.
        files: All source files.
        tally: Counts rows, blank and bad ones; the caller counts what it does with the rest.
        quarantine: Takes the bad rows; None where they were taken in an earlier pass.
        cleaner: Normalises texts, and says which of them are left out.

    Raises:
        SourceError: A file cannot be read as configured, was changed since it was listed, or is
            something else than the config says: most of its rows are bad.
    """
    for _, piece, batch in read_byte_ranges(unit, files, tally, quarantine):
        yield _clean(_without_blank(batch, piece.file, tally), cleaner, tally)


def read_byte_ranges(
    unit: WorkUnit, files: list[SourceFile], tally: Tally, quarantine: QuarantineWriter | None
) -> Iterator[tuple[int, ByteRange, RowBatch]]:
    """Stream the rows of a unit, with the piece that they are of and its number.

    Args:
        unit: What to read.
        files: All source files.
        tally: Counts rows and bad ones; the caller counts what it does with the rest.
        quarantine: Takes the bad rows; None where they were taken in an earlier pass.

    Raises:
        SourceError: As `read_unit_documents`.
    """
    for number, piece in enumerate(unit.byte_ranges):
        file = files[piece.file]
        try:
            for batch in _read_byte_range(piece, number, file, tally, quarantine):
                yield number, piece, batch
            status = file.place.status()
        except OSError as error:
            if error.errno == errno.ENOSPC:  # not of this file, but of one that is written
                raise
            problem = f"{file.place}: cannot be read: {error.strerror or error}"
            raise SourceError(problem) from error
        if status is None or status.version != file.status.version:
            raise SourceError(f"{file.place} was changed while it was read; run again")


def _read_byte_range(
    piece: ByteRange,
    number: int,
    file: SourceFile,
    tally: Tally,
    quarantine: QuarantineWriter | None,
) -> Iterator[RowBatch]:
    lines = 0
    with file.place.open() as opened:
        reader = HashingReader(opened, piece.hash_start, piece.hash_stop)
        part = OpenRange(file.place, opened, piece.start, piece.stop, reader)
        for batch in read_rows(part, file.options):
            lines += batch.num_lines
            tally.total += batch.num_rows
            tally.aliased += batch.num_alias_rows
            quarantine_rows(batch.bad, tally, quarantine, file, number)
            yield batch
        tally.range_records.append(ByteRangeRecord(digests=reader.digests(), lines=lines))


def quarantine_rows(
    rows: Iterable[BadRow],
    tally: Tally,
    quarantine: QuarantineWriter | None,
    file: SourceFile,
    piece: int,
) -> None:
    """Count bad rows of a piece of a unit and write them down.

    Raises:
        SourceError: So many are bad that the file must be something else.
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
            f"{file.place}: {bad} of its first {tally.total} rows cannot be used; check format, "
            f"encoding and text_field of its source. The first ones:\n  {listed}"
        )


def _without_blank(batch: RowBatch, file: int, tally: Tally) -> DocumentBatch:
    documents = DocumentBatch(file, batch.texts, batch.offsets, batch.num_bytes)
    are_space = list(map(str.isspace, batch.texts))
    if "" not in batch.texts and True not in are_space:  # told without a loop of Python's
        return documents
    has_text = [
        bool(text) and not is_space for text, is_space in zip(batch.texts, are_space, strict=True)
    ]
    tally.skipped["blank"] += has_text.count(False)
    return documents.filter(has_text)
