"""Stream the rows of a file, or of a range of it, in any format and in bounded memory.

    with place.open() as file:
        reader = HashingReader(file, start, stop)
        for batch in read_rows(OpenRange(place, file, start, stop, reader), options): ...

Nothing is repaired or dropped: an unusable row is yielded as a bad row with a reason.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from raytune_llama.chat import conversations
from raytune_llama.data.readers.encodings import TranscodingReader
from raytune_llama.data.readers.json_rows import add_json_lines, check_text, read_json_stream
from raytune_llama.data.readers.lines import TextLines, decode_lines
from raytune_llama.data.readers.ranges import (
    READ_BYTES,
    ByteReader,
    HashingReader,
    LineBlock,
    is_line_start,
    read_line_blocks,
)
from raytune_llama.data.readers.rows import BadRow, BadRowReason, ReadOptions, RowBatch, SourceError
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.readers.tables import open_table, read_table_rows
from raytune_llama.storage.place import Place

_SHORT_BYTES = 256 << 10


@dataclass(frozen=True)
class OpenRange:
    """A range of an open file, in row groups for tables and in bytes for other formats."""

    place: Place
    """Location of the file."""
    file: pa.NativeFile
    """The open file, seekable."""
    start: int
    """First byte or row group."""
    stop: int
    """End of the range, exclusive."""
    reader: HashingReader
    """Reader that hashes the range's bytes, positioned at `start`; unused for tables."""

    def error(self, problem: str) -> SourceError:
        """Return an error that names the file."""
        return SourceError(f"{self.place}: {problem}")


def read_head_rows(file: SourceFile, max_bytes: int | None = None) -> Iterator[RowBatch]:
    """Stream a file's rows from its beginning; of a table, only the first row group.

    Args:
        file: File to read.
        max_bytes: Number of bytes to read of a file that can be read in ranges; None: all.

    Raises:
        SourceError: As in `read_rows`.
        OSError: The file cannot be read.
    """
    stop = min(1, file.end) if file.options.is_table else file.end
    if max_bytes is not None and file.options.is_splittable and not file.options.is_table:
        stop = min(stop, max_bytes)
    with file.place.open() as opened:
        part = OpenRange(file.place, opened, 0, stop, HashingReader(opened, 0, 0))
        yield from read_rows(part, file.options)


def read_file(file: SourceFile) -> Iterator[RowBatch]:
    """Stream all rows of a file.

    Raises:
        SourceError: As in `read_rows`; or the file cannot be read, or changes while it is read.
    """
    try:
        with file.place.open() as opened:
            reader = HashingReader(opened, 0, file.status.num_bytes)
            yield from read_rows(OpenRange(file.place, opened, 0, file.end, reader), file.options)
        status = file.place.status()
    except OSError as error:
        problem = f"{file.place}: cannot be read: {error.strerror or error}"
        raise SourceError(problem) from error
    if status is None or status.version != file.status.version:
        raise SourceError(f"{file.place} was changed while it was being read; run again")


def read_rows(part: OpenRange, options: ReadOptions) -> Iterator[RowBatch]:
    """Stream the rows that start in a range of a file, in file order, including blank ones.

    Raises:
        SourceError: The file does not match `options`, or its compressed data or its Arrow stream
            is damaged; the message names the file.
        OSError: The file cannot be read.
    """
    if options.is_table:
        table = open_table(part.file, part.place, options.format, options.text_fields)
        yield from read_table_rows(table, options, range(part.start, part.stop))
    elif options.format == "json":
        text = _open_text(part, options)
        yield from read_json_stream(text.reader, options, str(part.place), text.start)
    elif options.format == "jsonl":
        # `map` and no loop, whose variable would keep a large line alive while it is encoded.
        yield from map(partial(_rows_of_json_lines, options=options), _read_lines(part, options))
    elif options.document == "line":
        yield from map(_rows_of_lines, _read_lines(part, options))
    elif options.document == "blank_line":
        yield from _read_paragraphs(part, options)
    else:
        yield _read_single_document(part, options)


@dataclass(frozen=True)
class _Text:
    """The decompressed bytes of a text file, without its byte order mark."""

    reader: ByteReader
    start: int
    codec: str


def _open_text(part: OpenRange, options: ReadOptions) -> _Text:
    """Decompress and transcode as needed; return a reader positioned after the BOM."""
    reader: ByteReader = part.reader
    codec, mark_bytes = options.encoding, options.bom_bytes
    if options.compression != "none":
        reader = _Decompressed(part, options)
    # JSON is scanned as characters; in UTF-16 the byte of a line end occurs in other characters.
    if codec.startswith("utf-16") or (options.format == "json" and codec != "utf-8"):
        reader, codec = TranscodingReader(reader, codec), "utf-8"
        mark_bytes = len(codecs.BOM_UTF8) if mark_bytes else 0
    start = part.start
    if start == 0:
        while start < mark_bytes and (data := reader.read(mark_bytes - start)):
            start += len(data)
    return _Text(reader, start, codec)


class _Decompressed:
    """Reader of a compressed file that raises an error if the file is truncated."""

    def __init__(self, part: OpenRange, options: ReadOptions) -> None:
        self._part = part
        raw = pa.PythonFile(part.reader, mode="r")
        self._stream = pa.CompressedInputStream(raw, options.compression)

    def read(self, num_bytes: int, /) -> bytes:
        """Return up to `num_bytes` of the next bytes; empty only at the end of the file."""
        try:
            return self._stream.read(num_bytes)
        except (OSError, pa.ArrowInvalid) as error:
            # The number of lost rows is unknown, so any share of bad rows would be wrong.
            raise self._part.error(
                f"damaged or truncated ({error}); download the file again"
            ) from error


def _read_lines(part: OpenRange, options: ReadOptions) -> Iterator[TextLines]:
    """Stream the decoded lines that start in a range."""
    at_line_start = is_line_start(part.file, part.start)
    text = _open_text(part, options)
    blocks = read_line_blocks(
        text.reader,
        text.start,
        part.stop if options.is_splittable else None,
        at_line_start=at_line_start,
        max_line_bytes=options.max_document_bytes,
    )
    return map(_Decoder(text.codec, options), blocks)


class _Decoder:
    """Decodes consecutive blocks and numbers their lines."""

    def __init__(self, codec: str, options: ReadOptions) -> None:
        self._codec = codec
        self._options = options
        self._first_line = 1

    def __call__(self, block: LineBlock) -> TextLines:
        lines = decode_lines(block, self._codec, self._first_line, self._options.max_document_bytes)
        self._first_line += len(lines.texts)
        return lines


def _rows_of_json_lines(lines: TextLines, options: ReadOptions) -> RowBatch:
    batch = RowBatch(num_lines=len(lines.texts))
    add_json_lines(batch, lines, options)
    return batch


def _rows_of_lines(lines: TextLines) -> RowBatch:
    batch = RowBatch(num_rows=len(lines.texts), num_lines=len(lines.texts))
    if not lines.bad:
        batch.texts, batch.offsets = lines.texts, lines.offsets
        batch.num_bytes = lines.num_bytes
        return batch
    for number, text in enumerate(lines.texts):
        if number not in lines.bad:
            batch.add(text, lines.offsets[number], lines.num_bytes[number])
    batch.bad = list(lines.bad.values())
    return batch


def _read_paragraphs(part: OpenRange, options: ReadOptions) -> Iterator[RowBatch]:
    """Stream the paragraphs whose first line starts in a range, even if they end after it."""
    open_paragraph: _Paragraph | None = None
    skipping = None  # whether the lines belong to a paragraph of the previous range
    end = part.start
    for lines in _read_lines(part, options):
        batch = RowBatch(num_lines=len(lines.texts))
        if skipping is None:
            skipping = part.start > 0 and _follows_text(part.file, lines.offsets[0], options)
        for number, is_blank in enumerate(_blanks(lines)):
            if is_blank:
                skipping = False
                _close(open_paragraph, batch)
                open_paragraph = None
            elif not skipping:
                open_paragraph = open_paragraph or _Paragraph(lines, number, options)
                open_paragraph.append(lines, number)
        end = lines.end
        yield batch
    batch = RowBatch()
    if open_paragraph is not None and options.is_splittable:
        for lines in _read_after(part, end, options):
            first_blank = next((n for n, is_blank in enumerate(_blanks(lines)) if is_blank), None)
            for number in range(len(lines.texts) if first_blank is None else first_blank):
                open_paragraph.append(lines, number)
            if first_blank is not None:
                break
    _close(open_paragraph, batch)
    yield batch


def _blanks(lines: TextLines) -> list[bool]:
    """Return which lines are blank and end a paragraph; an undecodable line is not blank."""
    return [number not in lines.bad and not text.strip() for number, text in enumerate(lines.texts)]


def _read_after(part: OpenRange, start: int, options: ReadOptions) -> Iterator[TextLines]:
    """Stream the lines after a range, in small reads."""
    part.file.seek(start)
    blocks = read_line_blocks(
        _ShortReads(part.file),
        start,
        None,
        at_line_start=True,
        max_line_bytes=options.max_document_bytes,
    )
    return map(_Decoder(options.encoding, options), blocks)


class _ShortReads:
    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file

    def read(self, num_bytes: int, /) -> bytes:
        return self._file.read(min(num_bytes, _SHORT_BYTES))


class _Paragraph:
    """The lines of one document, up to the next blank line."""

    def __init__(self, lines: TextLines, number: int, options: ReadOptions) -> None:
        self.offset = lines.offsets[number]
        self.line = lines.first_line + number
        self.texts: list[str] = []
        self.num_bytes = -1  # one line end fewer than lines
        self.max_bytes = options.max_document_bytes
        self.bad: BadRow | None = None

    def append(self, lines: TextLines, number: int) -> None:
        """Add a line; an unusable line makes the document a bad row and drops its text."""
        self.num_bytes += lines.num_bytes[number] + 1
        reason: BadRowReason | conversations.DefectReason | None = None
        detail = ""
        if number in lines.bad:
            reason, detail = lines.bad[number].reason, lines.bad[number].detail
        elif self.num_bytes > self.max_bytes:
            reason, detail = "too_long", f"max_document_bytes is {self.max_bytes}"
        if reason and self.bad is None:
            self.bad = BadRow(self.line, self.offset, reason, detail)
        if self.bad:
            self.texts.clear()
        else:
            self.texts.append(lines.texts[number])


def _close(paragraph: _Paragraph | None, batch: RowBatch) -> None:
    """Append a finished paragraph to a batch; do nothing for None."""
    if paragraph is None:
        return
    batch.num_rows += 1
    if paragraph.bad:
        batch.bad.append(paragraph.bad)
    else:
        batch.add("\n".join(paragraph.texts), paragraph.offset, paragraph.num_bytes)


def _follows_text(file: pa.NativeFile, start: int, options: ReadOptions) -> bool:
    """Whether the line before the one at `start` is not blank; may read only its end."""
    end, tail = start - 1, b""
    while end > 0:
        begin = max(0, end - _SHORT_BYTES)
        file.seek(begin)
        tail = file.read(end - begin) + tail
        line = tail.rpartition(b"\n")[2]
        is_complete = b"\n" in tail or begin == 0
        # Undecodable bytes are not blank, but those of a truncated character are ignored.
        errors = "replace" if is_complete else "ignore"
        if line.decode(options.encoding, errors=errors).strip():
            return True
        if is_complete:
            return False
        end = begin
    return False


def _read_single_document(part: OpenRange, options: ReadOptions) -> RowBatch:
    """Read a file as a single document."""
    text = _open_text(part, options)
    chunks: list[bytes] = []
    num_bytes = 0
    while data := text.reader.read(READ_BYTES):
        num_bytes += len(data)
        if num_bytes <= options.max_document_bytes:
            chunks.append(data)
    batch = RowBatch(num_rows=1)
    reason: BadRowReason | None = None
    detail = f"{num_bytes} bytes, max_document_bytes is {options.max_document_bytes}"
    if num_bytes > options.max_document_bytes:
        batch.bad.append(BadRow(1, text.start, "too_long", detail))
        return batch
    data = b"".join(chunks)
    try:
        document = data.decode(text.codec).replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        detail = f"byte 0x{data[error.start]:02x} at offset {text.start + error.start}"
        detail += f" is not valid {text.codec}"
        batch.bad.append(BadRow(1, text.start, "invalid_bytes", detail))
        return batch
    reason, detail, num_bytes = check_text(document, options.max_document_bytes)
    if reason is None:
        batch.add(document, text.start, num_bytes)
    else:
        batch.bad.append(BadRow(1, text.start, reason, detail))
    return batch
