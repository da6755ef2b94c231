"""Parse rows from JSON Lines, and from arrays or a sequence of objects as a stream.

A line of JSON Lines can be an array of rows. When rows are read as objects, an array of messages is
one row, a conversation.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import TypeGuard

from raytune_llama.chat.conversations import describe_type
from raytune_llama.chat.formats import holds_messages
from raytune_llama.data.readers.lines import TextLines, count_bytes
from raytune_llama.data.readers.ranges import READ_BYTES, ByteReader
from raytune_llama.data.readers.rows import (
    BadRow,
    BadRowReason,
    ObjectRow,
    ReadOptions,
    RowBatch,
    SourceError,
    excerpt,
)
from raytune_llama.storage.files import KEY_DECODER, RepeatedKeys

_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")
# Where a row can begin after a broken one: on its own line, or after another object.
_NEXT_ROW = re.compile(r"\n[ \t]*(?=\{)|\}[ \t\r\n]*,[ \t\r\n]*(?=\{)")
_UNDECODED = re.compile("[\udc80-\udcff]")
_PART_CHARACTERS = 1 << 20
_BATCH_ROWS = 1024
_NEAR_END_CHARACTERS = 32  # a truncated escape or number fails at most this far from the end


def add_json_lines(batch: RowBatch, lines: TextLines, options: ReadOptions) -> None:
    """Append the rows of lines: an object or an array of rows each; a blank line is a blank row."""
    codec = "utf-8" if options.encoding.startswith("utf-16") else options.encoding
    for number, text in enumerate(lines.texts):
        offset, line = lines.offsets[number], lines.first_line + number
        batch.num_rows += 1
        if number in lines.bad:
            batch.bad.append(lines.bad[number])
        elif not text.strip(" \t\r"):
            batch.add("", offset, 0)
        else:
            try:
                row = KEY_DECODER.decode(text)
            except (ValueError, RecursionError) as error:
                detail = f"{error}: {excerpt(text)}"
                batch.bad.append(BadRow(line, offset, "invalid_json", detail))
                continue
            if not _is_array_of_rows(row, options):
                add_row(batch, row, line, offset, options)
                continue
            batch.num_rows += len(row) - 1
            for num_bytes, value in _read_elements(text, codec):
                add_row(batch, value, line, offset + num_bytes, options)


def _is_array_of_rows(row: object, options: ReadOptions) -> TypeGuard[list[object]]:
    is_objects = isinstance(row, list) and bool(row) and all(isinstance(one, dict) for one in row)
    return is_objects and (bool(options.text_fields) or not holds_messages(row))


def _read_elements(text: str, codec: str) -> Iterator[tuple[int, object]]:
    """Yield the elements of a valid array, each with the number of encoded bytes before it."""
    num_bytes = start = 0
    end = text.index("[") + 1
    while (between := _BETWEEN.match(text, end)) and text[between.end()] != "]":
        num_bytes += len(text[start : between.end()].encode(codec))
        start = between.end()
        value, end = KEY_DECODER.raw_decode(text, start)
        yield num_bytes, value


def add_row(batch: RowBatch, row: object, line: int, offset: int, options: ReadOptions) -> None:
    """Append the text of one parsed row, or a bad row if it has none; does not count the row.

    If `text_fields` is empty, the object itself is appended, or an array of messages as an object.
    """
    if not options.text_fields and holds_messages(row):
        row = {"messages" if "role" in row[0] else "conversations": row}
    if isinstance(row, dict) and not options.text_fields:
        batch.objects.append(ObjectRow(line, offset, row))
        return
    text, name = "", ""
    reason: BadRowReason | None = None
    detail = ""
    if not isinstance(row, dict):
        reason, detail = "not_an_object", f"{describe_type(row)}: {excerpt(str(row))}"
    else:
        name = next((name for name in options.text_fields if name in row), "")
        value = row.get(name)
        if not name:
            wanted = " or ".join(map(repr, options.text_fields))
            reason, detail = (
                "missing_field",
                f"no field {wanted}; fields are {excerpt(str([*row]))}",
            )
        elif isinstance(row, RepeatedKeys) and name in row.repeated:
            reason, detail = "duplicate_key", f"field {name!r} occurs more than once"
        elif value is None:
            reason, detail = "null_field", f"field {name!r} is null"
        elif not isinstance(value, str):
            reason, detail = "wrong_type", f"field {name!r} is {describe_type(value)}"
        else:
            text = value
    if reason is None:
        reason, detail, num_bytes = check_text(text, options.max_document_bytes)
        if reason is None:
            batch.add(text, offset, num_bytes)
            batch.num_alias_rows += name != options.text_fields[0]
            return
    batch.bad.append(BadRow(line, offset, reason, detail))


def check_text(text: str, max_bytes: int) -> tuple[BadRowReason | None, str, int]:
    """Return why a text is unusable (None if usable), details, and its UTF-8 length in bytes."""
    try:
        num_bytes = count_bytes(text)
    except UnicodeEncodeError as error:
        detail = f"lone surrogate at character {error.start}: {excerpt(text)}"
        return "lone_surrogate", detail, 0
    if "\0" in text:
        return "nul", excerpt(text), 0
    if num_bytes > max_bytes:
        return "too_long", f"{num_bytes} bytes, max_document_bytes is {max_bytes}", 0
    return None, "", num_bytes


def read_json_stream(
    reader: ByteReader, options: ReadOptions, name: str, offset: int
) -> Iterator[RowBatch]:
    """Stream the rows of an array, of several ones, or of a sequence of objects, in bounded memory.

    After a broken row, reading resumes where the next object can begin: on its own line, or after
    the end of an object and a comma. A file that ends within the array adds a bad row.

    Args:
        reader: Reader of UTF-8; invalid bytes make a bad row.
        options: How to read the file.
        name: Name of the file, for error messages.
        offset: Byte offset of the reader, after the byte order mark.

    Raises:
        SourceError: The file begins with neither an array nor an object.
    """
    stream = _Stream(reader, offset, options.max_document_bytes)
    stream.skip(_SPACE)
    first = stream.peek()
    if not first:
        return
    if first not in "[{":
        raise SourceError(
            f"{name}: it begins with {excerpt(stream.rest()[:40])!r}, wanted a JSON array or "
            "object; set format, or exclude the file"
        )
    is_array = first == "["
    if is_array:
        stream.advance(1)
    batch = RowBatch()
    while not (_is_array_over(stream, batch) if is_array else _is_sequence_over(stream)):
        _add_value(stream, batch, options)
        if batch.num_rows >= _BATCH_ROWS:
            yield batch
            batch = RowBatch()
    batch.num_lines = stream.line
    yield batch


def _is_sequence_over(stream: "_Stream") -> bool:
    """Advance to the next object; commas between objects are skipped."""
    stream.skip(_BETWEEN)
    return not stream.peek()


def _is_array_over(stream: "_Stream", batch: RowBatch) -> bool:
    """Advance to the next value, also in another array; if none is left, check the file's end."""
    while True:
        stream.skip(_BETWEEN)
        line, offset, following = stream.line, stream.offset, stream.peek()
        reason: BadRowReason = "truncated"
        detail = "the file ends inside its array"
        if following == "]":
            stream.advance(1)
            stream.skip(_SPACE)
            following = stream.peek()
            if following == "[":
                stream.advance(1)
                continue
            if not following:
                return True
            reason, detail = "invalid_json", f"data after the array: {excerpt(stream.rest())}"
            line, offset = stream.line, stream.offset
        elif following:
            return False
        # A row truncated by the end of the file has been reported already.
        if not (batch.bad and batch.bad[-1].reason == "truncated"):
            batch.num_rows += 1
            batch.bad.append(BadRow(line, offset, reason, detail))
        return True


def _add_value(stream: "_Stream", batch: RowBatch, options: ReadOptions) -> None:
    """Parse the value at the position of a stream, and advance past it."""
    line, offset = stream.line, stream.offset
    batch.num_rows += 1
    try:
        value, undecodable = stream.parse()
    except _BrokenRowError as error:
        batch.bad.append(BadRow(line, offset, error.reason, error.detail))
        stream.resynchronize()
        return
    if undecodable:
        detail = f"undecodable bytes: {excerpt(undecodable)}"
        batch.bad.append(BadRow(line, offset, "invalid_bytes", detail))
    else:
        add_row(batch, value, line, offset, options)


class _BrokenRowError(Exception):
    """A value that cannot be parsed."""

    def __init__(self, reason: BadRowReason, detail: str) -> None:
        super().__init__(detail)
        self.reason: BadRowReason = reason
        self.detail = detail


class _Stream:
    """A sliding window of decoded text over a file; keeps undecodable bytes as surrogates."""

    def __init__(self, reader: ByteReader, offset: int, max_value_bytes: int) -> None:
        self.line = 1
        self.offset = offset
        self._reader = reader
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._max_characters = max_value_bytes  # a character has at least one byte
        self._text = ""
        self._position = 0
        self._at_end = False

    def peek(self) -> str:
        """Return the next character; empty at the end of the file."""
        while self._position == len(self._text) and self._fill():
            pass
        return self._text[self._position : self._position + 1]

    def rest(self) -> str:
        """Return the buffered text from the current position."""
        return self._text[self._position :]

    def advance(self, num_characters: int) -> None:
        """Advance within the buffered text; drop the consumed part once it is long."""
        end = self._position + num_characters
        self.line += self._text.count("\n", self._position, end)
        for start in range(self._position, end, _PART_CHARACTERS):
            part = self._text[start : min(start + _PART_CHARACTERS, end)]
            self.offset += len(part.encode(errors="surrogateescape"))
        self._position = end
        if end > READ_BYTES:
            self._text, self._position = self._text[end:], 0

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Skip everything that a pattern matches."""
        while self.peek():
            match = pattern.match(self._text, self._position)
            if match is None or match.end() == self._position:
                return
            self.advance(match.end() - self._position)

    def parse(self) -> tuple[object, bytes]:
        """Consume one value; return it with its first undecodable bytes, empty if it has none.

        Raises:
            _BrokenRowError: The value is invalid JSON, too long, or truncated by the end of the
                file; nothing is consumed.
        """
        while True:
            try:
                value, end = KEY_DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                near_end = len(self._text) - error.pos <= _NEAR_END_CHARACTERS
                is_cut = near_end or error.msg.startswith("Unterminated string")
                if is_cut and not self._at_end:
                    self._check_length()
                    self._fill()
                    continue
                detail = f"{error.msg}: {excerpt(self.rest())}"
                raise _BrokenRowError("truncated" if is_cut else "invalid_json", detail) from error
            except RecursionError as error:
                detail = f"nested too deeply: {excerpt(self.rest())}"
                raise _BrokenRowError("invalid_json", detail) from error
            if end == len(self._text) and not self._at_end:
                self._fill()  # a number could continue
                continue
            found = _UNDECODED.search(self._text, self._position, end)
            start = found.start() if found else 0
            undecoded = self._text[start : start + 40] if found else ""
            self.advance(end - self._position)
            return value, undecoded.encode(errors="surrogateescape")

    def resynchronize(self) -> None:
        """Skip a broken row: up to where the next one can begin, or to the end of the file."""
        self.advance(1)
        while (match := _NEXT_ROW.search(self._text, self._position)) is None:
            # The separator between two objects may be cut by the end of the window.
            keep = self._text.rfind("}", max(self._position, len(self._text) - READ_BYTES))
            last = max(self._text.rfind("\n", self._position), keep)
            self.advance((last if last > 0 else len(self._text)) - self._position)
            if not self._fill():
                self.advance(len(self._text) - self._position)
                return
        self.advance(match.end() - self._position)

    def _check_length(self) -> None:
        held = len(self._text) - self._position
        if held > self._max_characters:
            detail = f"over {held} characters, max_document_bytes is {self._max_characters}"
            raise _BrokenRowError("too_long", detail)

    def _fill(self) -> bool:
        """Read more, doubling the buffer for a long value; return False at the end of the file."""
        if self._at_end:
            return False
        held = self._text[self._position :]
        data = self._reader.read(max(READ_BYTES, len(held)))
        self._at_end = not data
        self._text = held + self._decoder.decode(data, final=self._at_end)
        self._position = 0
        return True
