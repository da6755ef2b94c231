"""Conversations of JSON files, whatever their format, streamed, with a place for every bad row.

    for row in read_conversations((ConversationSource(path="alpaca.json"),), counts): ...

A source is of one format: rows of two are most likely two files that somebody mixed up.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from raytune_llama.chat.conversations import Conversation, Defect
from raytune_llama.chat.formats import FormatName, KeyCounts, detect_row_format, read_row
from raytune_llama.config.settings import PLACEMENT, ConfigError, settings
from raytune_llama.data.readers.documents import OpenRange, read_rows
from raytune_llama.data.readers.encodings import Encoding
from raytune_llama.data.readers.ranges import HashingReader
from raytune_llama.data.readers.rows import BadRow, ObjectRow, SourceError, excerpt
from raytune_llama.data.readers.sources import SourceConfig, SourceFile, discover_files


@settings
class ConversationSource:
    """Conversations in JSON files."""

    path: Annotated[Annotated[str, Field(min_length=1)], PLACEMENT]
    """File, folder (read recursively, without hidden files) or glob of JSON and JSON-lines files,
    local or `s3://...`, `gs://...`."""
    format: Literal["auto"] | FormatName = "auto"
    """How rows become conversations. `auto`: by the first row of a known format; a later row of
    another one is an error."""
    encoding: Encoding = "auto"
    """As for text: by a mark, else UTF-8 or plainly GB18030."""
    input_separator: str = "\n"
    """What stands between instruction and input of an `alpaca` row: a line break, as
    Chinese-LLaMA-Alpaca trains, or nothing, as CALM converts."""


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """A row of a file."""

    number: int
    """Which row of all sources it is, from 1; bad rows count, blank lines don't."""
    source: int
    """Index of its source."""
    file: str
    """Its file, relative to its source."""
    line: int
    """The line that it starts in, from 1."""
    conversation: Conversation | Defect | BadRow
    """What it holds; or why it is no conversation, or no row."""


@dataclass(slots=True)
class ConversationCounts:
    """What was met while rows were read."""

    files: Counter[str] = field(default_factory=Counter)
    """Files by the format of their rows."""
    blank_lines: int = 0
    """Lines without a row."""
    keys: KeyCounts = field(default_factory=KeyCounts)
    """Names of fields that are aliases, or have no meaning."""


def find_conversation_files(sources: tuple[ConversationSource, ...]) -> list[SourceFile]:
    """List the files of all sources, in source order and by name within a source.

    Raises:
        ConfigError: As `discover_files`, or a file holds no JSON.
    """
    files = discover_files(
        tuple(SourceConfig(path=source.path, encoding=source.encoding) for source in sources)
    )
    problems = [
        f"sources.{file.source}.path: {file.place} is {file.options.format}, conversations are "
        "read from json and jsonl; name such files with a glob"
        for file in files
        if file.options.format not in ("json", "jsonl")
    ]
    if problems:
        raise ConfigError(problems)
    return [replace(file, options=replace(file.options, text_fields=())) for file in files]


def read_conversations(
    sources: tuple[ConversationSource, ...], counts: ConversationCounts
) -> Iterator[ConversationRow]:
    """Stream the rows of all sources in their order, good ones and bad ones.

    Args:
        sources: What the config names.
        counts: What is met is added here.

    Raises:
        ConfigError: As `find_conversation_files`.
        SourceError: A source mixes formats, with file and line of the row that does, or no row of
            it is of a known one; or a file cannot be read, or was changed meanwhile.
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
                f"sources.{index}.format: no row of {source.path} is of a known format; name it if "
                "the rows are damaged. Known are alpaca (instruction, output), conversations, "
                "messages and completion (prompt, completion)"
            )
        counts.files[sniffer.format or "empty"] += len(own)


class _Sniffer:
    """Reads the rows of a source, and sees to it that all are of one format."""

    def __init__(self, source: ConversationSource) -> None:
        self.format: FormatName | None = None if source.format == "auto" else source.format
        self._source = source
        self._first = f"format is {self.format}"

    def read(self, row: ObjectRow, file: SourceFile, keys: KeyCounts) -> Conversation | Defect:
        """Read a row in the source's format.

        Raises:
            SourceError: It is of another one.
        """
        found = detect_row_format(row.value)
        if self.format is None:
            if found is None:
                return Defect("unknown_format", f"there are: {excerpt(str([*row.value]))}")
            self.format, self._first = found, f"{file.place}, line {row.line} is {found}"
        separator = self._source.input_separator
        read = read_row(row.value, self.format, keys, input_separator=separator)
        is_other = isinstance(read, Defect) and read.reason == "missing_field"
        if is_other and found not in (None, self.format):
            raise SourceError(
                f"{file.place}: line {row.line}: the row is {found}, but {self._first}; give each "
                "format a source of its own"
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
        raise SourceError(f"{file.place} was changed while it was read; run again")


def _offset(row: ObjectRow | BadRow) -> int:
    return row.offset
