"""Detect a file's format from its beginning: encoding, JSON or JSON Lines, Parquet columns."""

import json
from dataclasses import dataclass, replace
from typing import Literal, Self

import pyarrow as pa

from raytune_llama.config.errors import UserError
from raytune_llama.data.readers.config import Encoding
from raytune_llama.data.readers.encodings import HEAD_BYTES, TextEncoding, detect_encoding
from raytune_llama.data.readers.parquet import open_parquet
from raytune_llama.data.readers.rows import Compression, FileFormat, excerpt
from raytune_llama.storage.place import FileStatus, Place

FORMATS_BY_SUFFIX: dict[str, FileFormat] = {
    "txt": "txt",
    "json": "json",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "parquet": "parquet",
}
"""File format by file name suffix."""

_COMPRESSIONS: dict[str, Compression] = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}


@dataclass(frozen=True)
class FileKind:
    """Format and compression of a file, from its name and the config."""

    format: FileFormat
    """Format of the file."""
    compression: Compression
    """Compression of the file."""

    @classmethod
    def from_name(cls, name: str, declared: Literal["auto"] | FileFormat) -> Self | None:
        """Return the kind for the suffixes of a file name; None if they are unknown."""
        parts = name.lower().split(".")
        compression = _COMPRESSIONS.get(parts[-1], "none")
        suffix = parts[-2] if compression != "none" and len(parts) > 1 else parts[-1]
        kind = FORMATS_BY_SUFFIX.get(suffix) if declared == "auto" else declared
        return None if kind is None else cls(kind, compression)


@dataclass(frozen=True)
class DetectedFormat:
    """What is known about a file before it is read."""

    kind: FileKind
    """Format and compression; `json` or `jsonl` as its first bytes show."""
    encoding: TextEncoding
    """Encoding of the text."""
    row_group_bytes: tuple[int, ...] = ()
    """Compressed size of each row group, in bytes; empty unless Parquet."""
    notes: tuple[str, ...] = ()
    """Warnings about properties that were detected and not declared."""


def detect_format(
    place: Place,
    status: FileStatus,
    kind: FileKind,
    *,
    declared_encoding: Encoding,
    is_format_declared: bool,
    text_fields: tuple[str, ...],
) -> DetectedFormat:
    """Detect the format of a file from its beginning (for Parquet, from its footer).

    Raises:
        ValueError: The file contradicts the config or its name; says which file and how to fix it.
        OSError: The file cannot be read.
    """
    with place.open() as file:
        if kind.format == "parquet":
            if kind.compression != "none":
                raise UserError(f"{place}: Parquet is compressed internally; decompress the file")
            return _inspect_parquet(file, place, text_fields)
        head = _read_head(file, place, status, kind.compression)
    try:
        encoding = detect_encoding(head, declared_encoding)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    notes: list[str] = []
    if encoding.is_guessed:
        notes.append(f"encoding {encoding.codec} guessed from its bytes; set encoding if wrong")
    if kind.format in ("json", "jsonl"):
        text = head[encoding.bom_bytes :].decode(encoding.codec, errors="replace")
        found = _json_kind(text, kind.format)
        if found != kind.format and is_format_declared:
            raise UserError(
                f"{place}: format is {kind.format}, but the file begins with "
                f"{excerpt(text.lstrip()[:40])!r}; set format to {found} or auto"
            )
        if found != kind.format:
            notes.append(f"format {found} detected from its first bytes")
            kind = replace(kind, format=found)
    return DetectedFormat(kind, encoding, notes=tuple(notes))


def _inspect_parquet(
    file: pa.NativeFile, place: Place, text_fields: tuple[str, ...]
) -> DetectedFormat:
    parquet = open_parquet(file, place, text_fields)
    metadata = parquet.metadata
    sizes = [
        sum(
            metadata.row_group(group).column(column).total_compressed_size
            for column in range(metadata.num_columns)
        )
        for group in range(metadata.num_row_groups)
    ]
    kind = FileKind("parquet", "none")
    return DetectedFormat(kind, TextEncoding("utf-8", 0, is_guessed=False), tuple(sizes))


def _read_head(
    file: pa.NativeFile, place: Place, status: FileStatus, compression: Compression
) -> bytes:
    if compression == "none" or not status.num_bytes:
        return file.read(HEAD_BYTES)
    try:
        return pa.CompressedInputStream(file, compression).read(HEAD_BYTES)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{place}: not {compression}, as its suffix says ({error})") from error


def _json_kind(text: str, kind: FileFormat) -> FileFormat:
    """Distinguish JSON Lines from one array, or one object over several lines."""
    text = text.lstrip("\ufeff \t\r\n")
    if text.startswith("["):
        return "json"
    if kind == "jsonl" or not text.startswith("{"):
        return kind  # a malformed first line is a bad row like any other
    first, _, rest = text.partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "json"
    return "jsonl" if rest.strip() else "json"
