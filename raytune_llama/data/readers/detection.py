"""Detect a file's format from its beginning: encoding, kind of JSON, columns of a table."""

import json
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import pyarrow as pa

from raytune_llama.chat.formats import holds_messages
from raytune_llama.config.errors import UserError
from raytune_llama.data.readers.config import Encoding
from raytune_llama.data.readers.encodings import HEAD_BYTES, TextEncoding, detect_encoding
from raytune_llama.data.readers.rows import TABLE_FORMATS, Compression, FileFormat, excerpt
from raytune_llama.data.readers.tables import open_table
from raytune_llama.storage.place import FileStatus, Place

FORMATS_BY_SUFFIX: dict[str, FileFormat] = {
    "txt": "txt",
    "json": "json",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "parquet": "parquet",
    "arrow": "arrow",
    "feather": "arrow",
}
"""File format by file name suffix."""

_DECODER = json.JSONDecoder()
_NEAR_END_CHARACTERS = 32  # a value that is cut fails at most this far from the cut

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
    """Size of each row group or Arrow record batch, in bytes; empty unless a table."""
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
    """Detect the format of a file from its beginning (for tables, from their footer or schema).

    Raises:
        ValueError: The file contradicts the config or its name; says which file and how to fix it.
        OSError: The file cannot be read.
    """
    with place.open() as file:
        if kind.format in TABLE_FORMATS:
            if kind.compression != "none":
                raise UserError(
                    f"{place}: {kind.format} files are compressed internally and not read from "
                    f"{kind.compression}; decompress the file"
                )
            table = open_table(file, place, kind.format, text_fields)
            utf8 = TextEncoding("utf-8", 0, is_guessed=False)
            return DetectedFormat(kind, utf8, table.group_bytes)
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
        is_cut = len(head) >= HEAD_BYTES
        found = _detect_json(text, kind.format, is_cut=is_cut, wants_objects=not text_fields)
        if found.format != kind.format and is_format_declared:
            raise UserError(
                f"{place}: format is {kind.format}, but it begins with "
                f"{excerpt(text.lstrip()[:40])!r} ({found.note}); set format to {found.format} or "
                "auto"
            )
        if found.format != kind.format or found.note in (_ARRAYS, _TURNS):
            notes.append(found.note)
        kind = replace(kind, format=found.format)
    return DetectedFormat(kind, encoding, notes=tuple(notes))


def _read_head(
    file: pa.NativeFile, place: Place, status: FileStatus, compression: Compression
) -> bytes:
    if compression == "none" or not status.num_bytes:
        return file.read(HEAD_BYTES)
    try:
        return pa.CompressedInputStream(file, compression).read(HEAD_BYTES)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{place}: not {compression}, as its suffix says, or truncated ({error})"
        ) from error


class _JsonKind(NamedTuple):
    """Layout of a JSON file."""

    format: FileFormat
    note: str = ""
    """Why it is read in this format; empty if the beginning does not show it."""


_OBJECT_PER_LINE = "each line is an object: read as jsonl"
_ONE_ARRAY = "the file is an array: read as json, by a single task"
_ARRAYS = "each line is an array, whose objects are the rows"
_TURNS = "each line is an array of messages, which is one row"
_SEVERAL_LINES = "an object takes several lines: read as json, by a single task"
_ONE_LINE = "the objects are not on lines of their own: read as json, by a single task"


def _detect_json(text: str, kind: FileFormat, *, is_cut: bool, wants_objects: bool) -> _JsonKind:
    """Return how a JSON file is laid out, from the text at its beginning.

    Args:
        text: Beginning of the file.
        kind: Format by its name, `json` or `jsonl`.
        is_cut: Whether the file has more text.
        wants_objects: Whether rows are read as objects, so that an array of messages is one row.
    """
    text = text.lstrip("\ufeff \t\r\n")
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        near_end = len(text) - error.pos <= _NEAR_END_CHARACTERS
        is_long = is_cut and (near_end or error.msg.startswith("Unterminated string"))
        num_read = error.pos if is_long else 0
        return _detect_unread(text, kind, num_read, wants_objects=wants_objects)
    except RecursionError:
        return _JsonKind(kind)
    rest = text[end:].strip(" \t\r")
    if isinstance(value, list):
        has_turns = wants_objects and holds_messages(value)
        found = _detect_arrays(text[:end], rest, has_turns=has_turns)
    elif isinstance(value, dict):
        found = _detect_objects(text[:end], rest, kind)
    else:
        found = _JsonKind(kind)
    return found


def _detect_arrays(first: str, rest: str, *, has_turns: bool) -> _JsonKind:
    """Return the layout of a file that begins with an array; `rest` follows it."""
    is_one_line = "\n" not in first
    if is_one_line and has_turns:
        return _JsonKind("jsonl", _TURNS)
    if is_one_line and rest.startswith("\n") and rest.strip():
        return _JsonKind("jsonl", _ARRAYS)
    return _JsonKind("json", _ONE_ARRAY)


def _detect_objects(first: str, rest: str, kind: FileFormat) -> _JsonKind:
    """Return the layout of a file that begins with an object; `rest` follows it."""
    if "\n" in first:
        return _JsonKind("json", _SEVERAL_LINES)
    if rest[:1] in (",", "{", "["):
        return _JsonKind("json", _ONE_LINE)
    if rest.startswith("\n") and rest.strip():
        return _JsonKind("jsonl", _OBJECT_PER_LINE)
    return _JsonKind(kind)


def _detect_unread(
    text: str, kind: FileFormat, read_characters: int, *, wants_objects: bool
) -> _JsonKind:
    """Return the layout of a file whose first value is malformed or longer than its beginning.

    Args:
        text: Beginning of the file.
        kind: Format by its name, `json` or `jsonl`.
        read_characters: Number of characters of the value that were read; 0 if it is malformed.
        wants_objects: Whether rows are read as objects.
    """
    is_one_line = "\n" not in text[:read_characters]
    if text.startswith("["):
        element = text[1:].lstrip(" \t\r\n")
        try:
            value, _ = _DECODER.raw_decode(element)
        except (ValueError, RecursionError):
            value = None
        if is_one_line and wants_objects and holds_messages([value]):
            return _JsonKind("jsonl", _TURNS)
        return _JsonKind("json", _ONE_ARRAY)
    if kind == "jsonl" and text.startswith("{") and not is_one_line:
        return _JsonKind("json", _SEVERAL_LINES)
    return _JsonKind(kind)  # a malformed first line is a bad row like any other
