"""The rows of one file, or of a range of it, whatever its format; streamed in bounded memory.

    with place.open() as file:
        for batch in read_rows(RangeOfFile(place, file, start, stop), options): ...

Nothing is repaired or dropped: what cannot be used comes as a bad row with a reason.
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
from raytune_llama.data.readers.parquet import open_parquet, read_parquet_rows
from raytune_llama.data.readers.ranges import (
    READ_BYTES,
    ByteReader,
    HashingReader,
    LineBlock,
    is_line_start,
    read_line_blocks,
)
from raytune_llama.data.readers.rows import BadRow, BadRowReason, ReadOptions, RowBatch, SourceError
from raytune_llama.storage.place import Place

_SHORT_BYTES = 256 << 10


@dataclass(frozen=True)
class OpenRange:
    """A part of a file that is open; `start` and `stop` are row groups in Parquet, else bytes."""

    place: Place
    """The file."""
    file: pa.NativeFile
    """Open for reading at any offset."""
    start: int
    """First byte or row group."""
    stop: int
    """End, not in it."""
    reader: HashingReader
    """Reads and hashes the part's bytes; stands at `start` but for Parquet."""

    def error(self, problem: str) -> SourceError:
        """Return an error that names the file."""
        return SourceError(f"{self.place}: {problem}")


def read_rows(part: OpenRange, options: ReadOptions) -> Iterator[RowBatch]:
    """Stream the rows that start in a part of a file, in their order, blank ones too.

    Raises:
        SourceError: The file is not what `options` say, or is compressed and damaged; names it.
        OSError: The file cannot be read.
    """
    if options.format == "parquet":
        parquet = open_parquet(part.file, part.place, options.text_fields)
        yield from read_parquet_rows(parquet, options, range(part.start, part.stop))
    elif options.format == "json":
        text = _open_text(part, options)
        yield from read_json_stream(text.reader, options, str(part.place), text.start)
    elif options.format == "jsonl":
        # By map and not in a loop, whose variable would keep a large line while it is encoded.
        yield from map(partial(_rows_of_json_lines, options=options), _read_lines(part, options))
    elif options.document == "line":
        yield from map(_rows_of_lines, _read_lines(part, options))
    elif options.document == "blank_line":
        yield from _read_paragraphs(part, options)
    else:
        yield _read_single_document(part, options)


@dataclass(frozen=True)
class _Text:
    """The bytes of a text file without compression and mark."""

    reader: ByteReader
    start: int
    codec: str


def _open_text(part: OpenRange, options: ReadOptions) -> _Text:
    """Undo what keeps bytes from being cut into lines; the reader stands behind the mark."""
    reader: ByteReader = part.reader
    codec, mark_bytes = options.encoding, options.bom_bytes
    if options.compression != "none":
        reader = _Decompressed(part, options)
    # JSON is scanned as characters; in UTF-16 the bytes of a line end stand in other characters.
    if codec.startswith("utf-16") or (options.format == "json" and codec != "utf-8"):
        reader, codec = TranscodingReader(reader, codec), "utf-8"
        mark_bytes = len(codecs.BOM_UTF8) if mark_bytes else 0
    start = part.start
    if start == 0:
        while start < mark_bytes and (data := reader.read(mark_bytes - start)):
            start += len(data)
    return _Text(reader, start, codec)


class _Decompressed:
    """Reads a compressed file; its end is an error when it comes too early."""

    def __init__(self, part: OpenRange, options: ReadOptions) -> None:
        self._part = part
        raw = pa.PythonFile(part.reader, mode="r")
        self._stream = pa.CompressedInputStream(raw, options.compression)

    def read(self, num_bytes: int, /) -> bytes:
        """Return some of the next bytes; none behind the end only."""
        try:
            return self._stream.read(num_bytes)
        except (OSError, pa.ArrowInvalid) as error:
            # How many rows are lost cannot be known, so that no share of bad rows would be true.
            raise self._part.error(f"damaged or cut off ({error}); fetch it again") from error


def _read_lines(part: OpenRange, options: ReadOptions) -> Iterator[TextLines]:
    """Stream the decoded lines that start in a part."""
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
    """Decodes blocks one after the other, and numbers their lines."""

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
    """Stream the paragraphs whose first line starts in a part, also where they end behind it."""
    open_paragraph: _Paragraph | None = None
    skipping = None  # whether the lines here belong to a paragraph of the part before
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
    """Say which lines end a paragraph: a line that cannot be decoded belongs to one."""
    return [number not in lines.bad and not text.strip() for number, text in enumerate(lines.texts)]


def _read_after(part: OpenRange, start: int, options: ReadOptions) -> Iterator[TextLines]:
    """Stream the lines behind a part, a little at a time."""
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
    """Lines of one document."""

    def __init__(self, lines: TextLines, number: int, options: ReadOptions) -> None:
        self.offset = lines.offsets[number]
        self.line = lines.first_line + number
        self.texts: list[str] = []
        self.num_bytes = -1  # one line end fewer than lines
        self.max_bytes = options.max_document_bytes
        self.bad: BadRow | None = None

    def append(self, lines: TextLines, number: int) -> None:
        """Add a line; one that cannot be used spoils the document, which is then not kept."""
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
    """Append a paragraph, if there is one."""
    if paragraph is None:
        return
    batch.num_rows += 1
    if paragraph.bad:
        batch.bad.append(paragraph.bad)
    else:
        batch.add("\n".join(paragraph.texts), paragraph.offset, paragraph.num_bytes)


def _follows_text(file: pa.NativeFile, start: int, options: ReadOptions) -> bool:
    """Whether the line before the one at `start` is not blank; only its end may be read."""
    end, tail = start - 1, b""
    while end > 0:
        begin = max(0, end - _SHORT_BYTES)
        file.seek(begin)
        tail = file.read(end - begin) + tail
        line = tail.rpartition(b"\n")[2]
        is_whole = b"\n" in tail or begin == 0
        # Bytes that are no text are not blank; those of a character that is cut say nothing.
        errors = "replace" if is_whole else "ignore"
        if line.decode(options.encoding, errors=errors).strip():
            return True
        if is_whole:
            return False
        end = begin
    return False


def _read_single_document(part: OpenRange, options: ReadOptions) -> RowBatch:
    """Read a file that is one document."""
    text = _open_text(part, options)
    pieces: list[bytes] = []
    num_bytes = 0
    while data := text.reader.read(READ_BYTES):
        num_bytes += len(data)
        if num_bytes <= options.max_document_bytes:
            pieces.append(data)
    batch = RowBatch(num_rows=1)
    reason: BadRowReason | None = None
    detail = f"{num_bytes} bytes, max_document_bytes is {options.max_document_bytes}"
    if num_bytes > options.max_document_bytes:
        batch.bad.append(BadRow(1, text.start, "too_long", detail))
        return batch
    data = b"".join(pieces)
    try:
        document = data.decode(text.codec).replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        detail = f"byte 0x{data[error.start]:02x} at offset {text.start + error.start}"
        detail += f" is not {text.codec}"
        batch.bad.append(BadRow(1, text.start, "invalid_bytes", detail))
        return batch
    reason, detail, num_bytes = check_text(document, options.max_document_bytes)
    if reason is None:
        batch.add(document, text.start, num_bytes)
    else:
        batch.bad.append(BadRow(1, text.start, reason, detail))
    return batch
