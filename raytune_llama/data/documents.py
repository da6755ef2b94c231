r"""The documents of one file, with their places in it; streamed, except `.json`.

Reading is strict: a byte that is not UTF-8, a row that is not JSON or has no text is an error that
names file, row and byte offset. Nothing is guessed, repaired or dropped.

Lines end with "\n" only, and a "\r" before it is dropped: U+2028, form feeds and the like, which
`str.splitlines` cuts at, are part of the text.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

Format = Literal["txt", "json", "jsonl", "parquet"]
"""How a file is parsed."""

DocumentMode = Literal["line", "file", "blank_line"]
"""What a document of a txt file is."""

_BOM = b"\xef\xbb\xbf"
_JSON_SPACE = " \t\r\n"
_PARQUET_ROWS = 1024  # a batch of rows in memory


class SourceError(ValueError):
    """A file of a corpus that cannot be read as configured."""


@dataclass(frozen=True)
class ReadOptions:
    """How to read a file; part of a store's fingerprint."""

    format: Format
    """Its format."""
    document: DocumentMode
    """What a document is; used for txt only."""
    text_field: str
    """Where the text is; not used for txt."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from."""

    text: str
    """Without its line end."""
    offset: int
    """Byte at which it (for JSON: its object) starts in the file; for Parquet, its row from 0."""
    num_bytes: int
    """UTF-8 bytes of `text`."""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing but white space: the caller skips and counts it."""
        return not self.text.strip()


def read_documents(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Stream the documents of a file in their order, blank ones too.

    Raises:
        SourceError: The file cannot be read or is not what `options` say; names file, row (from 1)
            and byte offset.
    """
    readers = {"jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet}
    try:
        if options.format == "txt":
            yield from _read_txt(path, options.document)
        else:
            yield from readers[options.format](path, options.text_field)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_parquet(path: Path, text_field: str) -> None:
    """Check that a Parquet file has a column of text, by its footer only.

    Raises:
        SourceError: It is no Parquet file, or has no such column of strings.
    """
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path}: not a Parquet file ({error})") from error
    if text_field not in schema.names:
        raise SourceError(_no_field(f"{path}", text_field, schema.names))
    kind = schema.field(text_field).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (
        pa.types.is_string(value)
        or pa.types.is_large_string(value)
        or pa.types.is_string_view(value)
    ):
        raise SourceError(f"{path}: column {text_field!r} is {kind}, wanted string")


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a file without its end."""

    number: int
    offset: int
    data: bytes


def _read_lines(path: Path) -> Iterator[_Line]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            skipped = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
            data = raw[skipped:].removesuffix(b"\n").removesuffix(b"\r")
            yield _Line(number, offset + skipped, data)
            offset += len(raw)


def _decode(data: bytes, offset: int, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{place}: byte 0x{data[error.start]:02x} at offset {offset + error.start} is not "
            "UTF-8; convert the file to UTF-8"
        ) from error


def _read_txt(path: Path, mode: DocumentMode) -> Iterator[Document]:
    lines = (
        (line.offset, _decode(line.data, line.offset, f"{path}: row {line.number}"))
        for line in _read_lines(path)
    )
    if mode == "line":
        for offset, text in lines:
            yield _document(text, offset)
    elif mode == "file":
        yield _joined(lines)
    else:
        for blank, paragraph in groupby(lines, key=lambda line: not line[1].strip()):
            if not blank:
                yield _joined(paragraph)


def _joined(lines: Iterable[tuple[int, str]]) -> Document:
    listed = list(lines)
    return _document("\n".join(text for _, text in listed), listed[0][0] if listed else 0)


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    for line in _read_lines(path):
        place = f"{path}: row {line.number}"
        text = _decode(line.data, line.offset, place)
        place = f"{place} at byte {line.offset}"
        if not text.strip(_JSON_SPACE):
            yield Document("", line.offset, 0)
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{place}: not JSON ({error}); mend or remove the row") from error
        yield _document_of_row(row, text_field, place, line.offset)


def _read_json(path: Path, text_field: str) -> Iterator[Document]:
    """Yield the objects of an array, or the one object; the whole file is in memory."""
    data = path.read_bytes()
    offset = len(_BOM) if data.startswith(_BOM) else 0
    text = _decode(data[offset:], offset, f"{path}")
    try:
        is_array = isinstance(json.loads(text), list)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path}: not JSON ({error}); set format to jsonl if each line is an object"
        ) from error
    # The text is known to be valid: commas and white space are all that is between two rows.
    decoder = json.JSONDecoder()
    between = _JSON_SPACE + "," if is_array else _JSON_SPACE
    end, number = (text.index("[") + 1, 1) if is_array else (0, 1)
    offset += end
    while (start := _skip(text, end, between)) < len(text) and text[start] != "]":
        offset += start - end
        row, end = decoder.raw_decode(text, start)
        yield _document_of_row(row, text_field, f"{path}: row {number} at byte {offset}", offset)
        offset += len(text[start:end].encode())
        number += 1


def _skip(text: str, start: int, characters: str) -> int:
    while start < len(text) and text[start] in characters:
        start += 1
    return start


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    check_parquet(path, text_field)
    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0):
                    place = f"{path}: row {row + 1}"
                    yield _document_of_row({text_field: value.as_py()}, text_field, place, row)
                    row += 1
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: row {row + 1}: not UTF-8 ({error}); mend the row") from error
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path}: damaged behind row {row} ({error})") from error


def _document_of_row(row: object, text_field: str, place: str, offset: int) -> Document:
    if not isinstance(row, dict):
        raise SourceError(f"{place}: got {_kind(row)}, wanted an object with field {text_field!r}")
    if text_field not in row:
        raise SourceError(_no_field(place, text_field, list(row)))
    text = row[text_field]
    if not isinstance(text, str):
        raise SourceError(f"{place}: field {text_field!r} is {_kind(text)}, wanted a text")
    try:
        return _document(text, offset)
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{place}: field {text_field!r} holds half of a surrogate pair at character "
            f"{error.start}, which no UTF-8 text can; mend the row"
        ) from error


def _document(text: str, offset: int) -> Document:
    return Document(text, offset, len(text.encode()))


def _no_field(place: str, text_field: str, names: list[str]) -> str:
    there = ", ".join(names[:20]) or "none"
    return f"{place}: no field {text_field!r}; there are: {there}. Set text_field to one of them"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
