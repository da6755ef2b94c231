"""Stream the conversations of files in any known format, with the location of every bad row.

    for row in read_conversations((ConversationSource(path="alpaca.json"),), counts): ...

A source has one format: rows in two formats are most likely two files mixed up by mistake.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from raytune_llama.chat.config import FormatName
from raytune_llama.chat.conversations import Conversation, Defect
from raytune_llama.chat.formats import RowFormat, describe_columns, detect_row_format, read_row
from raytune_llama.chat.row_fields import KeyCounts, plain_name
from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.config import ConversationSource, SourceConfig
from raytune_llama.data.readers.documents import read_file
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


def find_conversation_files(
    sources: tuple[ConversationSource, ...], *, is_quiet: bool = False
) -> list[SourceFile]:
    """List the files of all sources, in source order and by name within a source.

    Args:
        sources: Sources in the config.
        is_quiet: Whether to log nothing.

    Raises:
        ConfigError: See `discover_files`; or a file is plain text.
    """
    return discover_files(
        tuple(SourceConfig(path=source.path, encoding=source.encoding) for source in sources),
        rows="objects",
        is_quiet=is_quiet,
    )


def starts_with_conversation(sources: tuple[ConversationSource, ...]) -> bool:
    """Whether the first row of the sources is in a known format, and is no text: has no `text`.

    False for plain text, and for files that cannot be read, which whoever opens them reports.
    """
    try:
        files = find_conversation_files(sources, is_quiet=True)
        rows = (row for file in files for row in read_objects(file, ConversationCounts()))
        first = next((row for row in rows if isinstance(row, ObjectRow)), None)
    except (ConfigError, SourceError):
        return False
    return first is not None and "text" not in first.value and bool(detect_row_format(first.value))


def read_conversations(
    sources: tuple[ConversationSource, ...],
    counts: ConversationCounts,
    ignore_fields: tuple[str, ...] = (),
    files: list[SourceFile] | None = None,
) -> Iterator[ConversationRow]:
    """Stream the rows of all sources in order, valid and bad ones.

    Args:
        sources: Sources in the config.
        counts: Counts to update.
        ignore_fields: Names of fields to ignore.
        files: Files of the sources, from `find_conversation_files`. None: they are listed here.

    Raises:
        ConfigError: See `find_conversation_files`.
        SourceError: A source mixes formats (the message has file and line), or has no row in a
            known format; or a file cannot be read, or changes while it is read.
    """
    number = 0
    files = find_conversation_files(sources) if files is None else files
    for index, source in enumerate(sources):
        sniffer = _Sniffer(source, ignore_fields)
        own = [file for file in files if file.source == index]
        for file in own:
            for row in read_objects(file, counts):
                number += 1
                read = row if isinstance(row, BadRow) else sniffer.read(row, file, counts.keys)
                yield ConversationRow(number, index, file.name, row.line, read)
        if sniffer.format is None and any(file.status.num_bytes for file in own):
            raise SourceError(
                f"sources.{index}.fields: no row of {source.path} is in a known format: alpaca "
                "(instruction, output), conversations, messages or completion (prompt, "
                "completion); write which columns hold what, or set format if the rows are damaged"
            )
        counts.files[sniffer.format or "empty"] += len(own)


class _Sniffer:
    """Reads the rows of a source and checks that all are in one format."""

    def __init__(self, source: ConversationSource, ignore_fields: tuple[str, ...]) -> None:
        self.format: FormatName | None = None if source.format == "auto" else source.format
        self._source = source
        ignored = frozenset(map(plain_name, ignore_fields))
        name = self.format or "messages"
        self._options = RowFormat(name, source.input_separator, source.fields, ignored)
        self._first = f"format is {self.format}"

    def read(self, row: ObjectRow, file: SourceFile, keys: KeyCounts) -> Conversation | Defect:
        """Read a row in the source's format.

        Raises:
            SourceError: The row is in another format.
        """
        found = detect_row_format(row.value, self._source.fields)
        if self.format is None:
            if found is None:
                return Defect("unknown_format", excerpt(describe_columns(row.value)))
            self.format, self._first = found, f"{file.place}, line {row.line} is {found}"
            self._options = replace(self._options, name=found)
        read = read_row(row.value, self._options, keys)
        is_other = isinstance(read, Defect) and read.reason == "missing_field"
        if is_other and found not in (None, self.format):
            raise SourceError(
                f"{file.place}: line {row.line}: the row is {found}, but {self._first}; use a "
                "separate source per format"
            )
        return read


def read_objects(file: SourceFile, counts: ConversationCounts) -> Iterator[ObjectRow | BadRow]:
    """Stream the rows of a file as objects, valid and bad ones in order; blank lines are counted.

    Raises:
        SourceError: See `read_file`.
    """
    for batch in read_file(file):
        counts.blank_lines += len(batch.texts)
        yield from heapq.merge(batch.objects, batch.bad, key=_offset)


def _offset(row: ObjectRow | BadRow) -> int:
    return row.offset
