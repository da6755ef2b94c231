"""Types of what is read from a corpus: rows of text with their offsets, and bad rows."""

from dataclasses import dataclass, field
from typing import Any, Literal

from raytune_llama.chat import conversations
from raytune_llama.config.errors import UserError
from raytune_llama.data.readers.config import DocumentMode

FileFormat = Literal["txt", "json", "jsonl", "parquet", "arrow"]
"""File formats; `json` is one array of objects or several, or a sequence of objects; `arrow` is
Arrow's IPC format, as a file (also Feather) or a stream."""

TABLE_FORMATS: tuple[FileFormat, ...] = ("parquet", "arrow")
"""File formats with rows in columns, which are read by groups of rows."""

Compression = Literal["none", "gzip", "bz2", "zstd"]
"""Compression formats."""


BadRowReason = Literal[
    "invalid_bytes",
    "nul",
    "lone_surrogate",
    "too_long",
    "invalid_json",
    "truncated",
    "not_an_object",
    "missing_field",
    "null_field",
    "wrong_type",
    "duplicate_key",
    "damaged",
]
"""Reasons for which a row is quarantined."""

_EXCERPT_CHARACTERS = 200


class SourceError(UserError):
    """A corpus file that cannot be read as configured, or a corpus with too many bad rows."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read a file; part of a store's fingerprint."""

    format: FileFormat
    """Format of the file."""
    compression: Compression = "none"
    """Compression of the file."""
    encoding: str = "utf-8"
    """Python codec name of the text; unused for tables."""
    bom_bytes: int = 0
    """Length of the byte order mark at the start of the file, in bytes."""
    document: DocumentMode = "line"
    """Unit that is one document; used for txt only."""
    text_fields: tuple[str, ...] = ("text",)
    """Names of the text field, in order of preference; unused for txt. Empty: each JSON object,
    or row of a table, is returned as an object."""
    max_document_bytes: int = 256 * 2**20
    """Maximum size of a document, in bytes; longer rows are quarantined unread."""

    @property
    def is_table(self) -> bool:
        """Whether the file has rows in columns: ranges are in row groups, and offsets in rows."""
        return self.format in TABLE_FORMATS

    @property
    def offset_unit(self) -> Literal["byte", "row"]:
        """What offsets of rows in the file count, from 0."""
        return "row" if self.is_table else "byte"

    @property
    def is_splittable(self) -> bool:
        """Whether ranges of the file can be read independently."""
        by_lines = self.format == "jsonl" or (self.format == "txt" and self.document != "file")
        one_byte_line_end = not self.encoding.startswith("utf-16")
        plain = self.compression == "none"
        return self.is_table or (by_lines and one_byte_line_end and plain)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is kept out of the store."""

    line: int
    """Line of the row, or the row of a table, counted from 1 at the start of the range that is
    read."""
    offset: int
    """Byte offset of the row in the file, after decompression (and, for UTF-16, in UTF-8); for
    tables, its row from 0."""
    reason: BadRowReason | conversations.DefectReason
    """Why the row cannot be used."""
    detail: str
    """Human-readable details, such as an excerpt of the row or the names of its fields."""


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """A row that is returned as a JSON object."""

    line: int
    """Line of the row, see `BadRow`."""
    offset: int
    """Byte offset of the row, see `BadRow`."""
    value: dict[str, Any]
    """The object; a `RepeatedKeys` if it has a key more than once."""


@dataclass(slots=True)
class RowBatch:
    """Rows in file order; `texts`, `offsets` and `num_bytes` are parallel lists."""

    texts: list[str] = field(default_factory=list)
    """Texts without line ends, including blank ones."""
    offsets: list[int] = field(default_factory=list)
    """Byte offset of each row (for JSON: of its object), see `BadRow`."""
    num_bytes: list[int] = field(default_factory=list)
    """UTF-8 length of each text, in bytes."""
    objects: list[ObjectRow] = field(default_factory=list)
    """Rows as JSON objects, instead of `texts`, if `text_fields` is empty."""
    bad: list[BadRow] = field(default_factory=list)
    """Unusable rows."""
    num_rows: int = 0
    """Number of rows read, usable and bad; not derived from the lists."""
    num_lines: int = 0
    """Number of lines that start in the range read, whatever rows they belong to."""
    num_alias_rows: int = 0
    """Number of rows whose text was in a field other than the first of `text_fields`."""

    def add(self, text: str, offset: int, num_bytes: int) -> None:
        """Append a usable row."""
        self.texts.append(text)
        self.offsets.append(offset)
        self.num_bytes.append(num_bytes)


def excerpt(data: bytes | str) -> str:
    """Return the beginning of a row, escaped so that it can be written to any text file."""
    if isinstance(data, bytes):
        data = data[: 4 * _EXCERPT_CHARACTERS].decode(errors="backslashreplace")
    short = data[:_EXCERPT_CHARACTERS]
    return short.encode(errors="backslashreplace").decode().replace("\0", "\\0")
