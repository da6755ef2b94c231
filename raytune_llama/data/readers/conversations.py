"""Stream the conversations of JSON files in any known format, with the location of every bad row.

    for row in read_conversations((ConversationSource(path="alpaca.json"),), counts): ...

A source has one format: rows in two formats are most likely two files mixed up by mistake.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from raytune_llama.chat.config import FormatName
from raytune_llama.chat.conversations import Conversation, Defect
from raytune_llama.chat.formats import KeyCounts, detect_row_format, read_row
from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.config import ConversationSource, SourceConfig
from raytune_llama.data.readers.documents import OpenRange, read_rows
from raytune_llama.data.readers.ranges import HashingReader
from raytune_llama.data.readers.rows import BadRow, ObjectRow, SourceError, excerpt
from raytune_llama.data.readers.sources import SourceFile, discover_files


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """A row of a file."""

    number: int
    """Number of the row over all sources, from 1; bad rows count, blank lines do not."""
    source: int
    """Index of the row's source."""
    file: str
    """Path of the row's file, relative to its source."""
    line: int
    """Line in which the row starts, from 1."""
    conversation: Conversation | Defect | BadRow
    """The conversation; or why the row is not one, or cannot be parsed."""


@dataclass(slots=True)
class ConversationCounts:
    """Counts collected while rows are read."""

    files: Counter[str] = field(default_factory=Counter)
    """Number of files by the format of their rows."""
    blank_lines: int = 0
    """Number of blank lines."""
    keys: KeyCounts = field(default_factory=KeyCounts)
    """Counts of field names that are aliases, ignored or repeated."""


def find_conversation_files(sources: tuple[ConversationSource, ...]) -> list[SourceFile]:
    """List the files of all sources, in source order and by name within a source.

    Raises:
        ConfigError: See `discover_files`; or a file is not JSON.
    """
    files = discover_files(
        tuple(SourceConfig(path=source.path, encoding=source.encoding) for source in sources)
    )
    problems = [
        f"sources.{file.source}.path: {file.place} is {file.options.format}, but conversations are "
        "read from json and jsonl; select such files with a glob"
        for file in files
        if file.options.format not in ("json", "jsonl")
    ]
    if problems:
        raise ConfigError(problems)
    return [replace(file, options=replace(file.options, text_fields=())) for file in files]


def read_conversations(
    sources: tuple[ConversationSource, ...], counts: ConversationCounts
) -> Iterator[ConversationRow]:
    """Stream the rows of all sources in order, valid and bad ones.

    Args:
        sources: Sources in the config.
        counts: Counts to update.

    Raises:
        ConfigError: See `find_conversation_files`.
        SourceError: A source mixes formats (the message has file and line), or has no row in a
            known format; or a file cannot be read, or changes while it is read.
    """
    number = 0
    files = find_conversation_files(sources)
    for index, source in enumerate(sources):
        sniffer = _Sniffer(source)
        own = [file for file in files if file.source == index]
        for file in own:
            for row in _read_file(file, counts):
                number += 1
                read = row if isinstance(row, BadRow) else sniffer.read(row, file, counts.keys)
                yield ConversationRow(number, index, file.name, row.line, read)
        if sniffer.format is None and any(file.status.num_bytes for file in own):
            raise SourceError(
                f"sources.{index}.format: no row of {source.path} is in a known format: alpaca "
                "(instruction, output), conversations, messages or completion (prompt, "
                "completion); set format if the rows are damaged"
            )
        counts.files[sniffer.format or "empty"] += len(own)


class _Sniffer:
    """Reads the rows of a source and checks that all are in one format."""

    def __init__(self, source: ConversationSource) -> None:
        self.format: FormatName | None = None if source.format == "auto" else source.format
        self._source = source
        self._first = f"format is {self.format}"

    def read(self, row: ObjectRow, file: SourceFile, keys: KeyCounts) -> Conversation | Defect:
        """Read a row in the source's format.

        Raises:
            SourceError: The row is in another format.
        """
        found = detect_row_format(row.value)
        if self.format is None:
            if found is None:
                return Defect("unknown_format", f"fields are {excerpt(str([*row.value]))}")
            self.format, self._first = found, f"{file.place}, line {row.line} is {found}"
        separator = self._source.input_separator
        read = read_row(row.value, self.format, keys, input_separator=separator)
        is_other = isinstance(read, Defect) and read.reason == "missing_field"
        if is_other and found not in (None, self.format):
            raise SourceError(
                f"{file.place}: line {row.line}: the row is {found}, but {self._first}; use a "
                "separate source per format"
            )
        return read


def _read_file(file: SourceFile, counts: ConversationCounts) -> Iterator[ObjectRow | BadRow]:
    try:
        with file.place.open() as opened:
            reader = HashingReader(opened, 0, file.status.num_bytes)
            part = OpenRange(file.place, opened, 0, file.status.num_bytes, reader)
            for batch in read_rows(part, file.options):
                counts.blank_lines += len(batch.texts)
                yield from heapq.merge(batch.objects, batch.bad, key=_offset)
        status = file.place.status()
    except OSError as error:
        problem = f"{file.place}: cannot be read: {error.strerror or error}"
        raise SourceError(problem) from error
    if status is None or status.version != file.status.version:
        raise SourceError(f"{file.place} was changed while it was being read; run again")


def _offset(row: ObjectRow | BadRow) -> int:
    return row.offset
