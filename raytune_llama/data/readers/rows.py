"""What is read from a corpus: rows of text with their places, and rows that cannot be used."""

from dataclasses import dataclass, field
from typing import Any, Literal

from raytune_llama.chat import conversations
from raytune_llama.config.errors import UserError

FileFormat = Literal["txt", "json", "jsonl", "parquet"]
"""How a file is parsed; `json` is one array, or objects one after the other."""

Compression = Literal["none", "gzip", "bz2", "zstd"]
"""How a file is compressed."""

DocumentMode = Literal["line", "file", "blank_line"]
"""What a document of a txt file is."""

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
"""Why a row is in quarantine."""

_EXCERPT_CHARACTERS = 200


class SourceError(UserError):
    """A file of a corpus that cannot be read as configured, or a corpus that is too bad to use."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read a file; part of a store's fingerprint."""

    format: FileFormat
    """Its format."""
    compression: Compression = "none"
    """How it is compressed."""
    encoding: str = "utf-8"
    """Python's name of the codec of its text; not used for Parquet."""
    bom_bytes: int = 0
    """Length of the byte order mark at its start."""
    document: DocumentMode = "line"
    """What a document is; used for txt only."""
    text_fields: tuple[str, ...] = ("text",)
    """Names of the field with the text, the first one that a row has counts; not used for txt.
    Empty for JSON of which each object is wanted as it is."""
    max_document_bytes: int = 256 * 2**20
    """A longer row goes to quarantine unread."""

    @property
    def is_splittable(self) -> bool:
        """Whether parts of the file can be read apart."""
        by_lines = self.format == "jsonl" or (self.format == "txt" and self.document != "file")
        one_byte_line_end = not self.encoding.startswith("utf-16")
        plain = self.compression == "none"
        return self.format == "parquet" or (by_lines and one_byte_line_end and plain)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is kept out of the store."""

    line: int
    """Its line, from 1 at the start of what is read (a range of a file); for Parquet, its row."""
    offset: int
    """Byte at which it starts in the file, after decompression (and, for UTF-16, in UTF-8); for
    Parquet, its row from 0."""
    reason: BadRowReason | conversations.DefectReason
    """Why."""
    detail: str
    """What exactly, for a person: some bytes of it, the fields that it has."""


@dataclass(frozen=True, slots=True)
class ObjectRow:
    """A JSON object that is a row as it is."""

    line: int
    """As in `BadRow`."""
    offset: int
    """As in `BadRow`."""
    value: dict[str, Any]
    """The object; one with a key that stands in it twice is `RepeatedKeys`."""


@dataclass(slots=True)
class RowBatch:
    """Rows in their order; the lists go together."""

    texts: list[str] = field(default_factory=list)
    """Each without its line end; blank ones too."""
    offsets: list[int] = field(default_factory=list)
    """Byte at which it (for JSON: its object) starts; as in `BadRow`."""
    num_bytes: list[int] = field(default_factory=list)
    """UTF-8 bytes of the text."""
    objects: list[ObjectRow] = field(default_factory=list)
    """Rows instead of texts, where `text_fields` is empty."""
    bad: list[BadRow] = field(default_factory=list)
    """Rows between them that cannot be used."""
    num_rows: int = 0
    """Rows that were met, counted apart from the lists: usable and bad ones."""
    num_lines: int = 0
    """Lines that start in what was read, whatever rows they belong to."""
    num_alias_rows: int = 0
    """Rows whose text was under another name than the first of `text_fields`."""

    def add(self, text: str, offset: int, num_bytes: int) -> None:
        """Append a usable row."""
        self.texts.append(text)
        self.offsets.append(offset)
        self.num_bytes.append(num_bytes)


def excerpt(data: bytes | str) -> str:
    """Return the beginning of a row in a form that is legal in any file."""
    if isinstance(data, bytes):
        data = data[: 4 * _EXCERPT_CHARACTERS].decode(errors="backslashreplace")
    short = data[:_EXCERPT_CHARACTERS]
    return short.encode(errors="backslashreplace").decode().replace("\0", "\\0")
