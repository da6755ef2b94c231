r"""Decode the lines of a text file, with their offsets; undecodable lines become bad rows.

Lines end with "\n" only, and a "\r" before it is dropped: U+2028, form feeds and the like, at which
`str.splitlines` splits, are part of the text.
"""

import contextlib
from dataclasses import dataclass
from itertools import accumulate, chain

from raytune_llama.data.readers.ranges import LineBlock
from raytune_llama.data.readers.rows import BadRow, excerpt

_PART_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class TextLines:
    """Consecutive lines, in parallel lists."""

    first_line: int
    """Number of the first line, counted from 1 at the start of the range that is read."""
    texts: list[str]
    """Lines without line ends; empty for an unusable line."""
    offsets: list[int]
    """Byte offset of each line."""
    num_bytes: list[int]
    """UTF-8 length of each text, in bytes."""
    bad: dict[int, BadRow]
    """Unusable lines, by index into the lists."""
    end: int
    """Byte offset of the end of the last line."""


def decode_lines(block: LineBlock, codec: str, first_line: int, max_line_bytes: int) -> TextLines:
    """Decode a block of lines; an undecodable line does not affect the others.

    Args:
        block: Complete lines, or one that was too long to hold.
        codec: Codec whose multi-byte characters do not contain the byte of a line end.
        first_line: Number of the first line.
        max_line_bytes: Limit above which a line becomes a bad row.
    """
    if block.overlong_bytes:
        bad = _too_long(first_line, block.offset, block.overlong_bytes, max_line_bytes)
        return TextLines(first_line, [""], [block.offset], [0], {0: bad}, block.end)
    if block.data.find(b"\n", 0, -1) < 0 and (line := _decode_one(block, codec, max_line_bytes)):
        return TextLines(first_line, [line], [block.offset], [count_bytes(line)], {}, block.end)
    raws = block.data.split(b"\n")
    if not raws[-1]:
        raws.pop()  # empty, after the last line end
    sizes = list(map(len, raws))
    offsets = list(accumulate(chain([block.offset], (size + 1 for size in sizes[:-1]))))
    text = None
    if b"\0" not in block.data and max(sizes) <= max_line_bytes:
        with contextlib.suppress(UnicodeDecodeError):
            text = block.data.decode(codec)
    if text is None:
        return _decode_each(block, offsets, codec, first_line, max_line_bytes)
    texts = text.split("\n")[: len(raws)]
    if b"\r" in block.data:
        texts = [line.removesuffix("\r") for line in texts]
        sizes = [size - raw.endswith(b"\r") for size, raw in zip(sizes, raws, strict=True)]
    if codec != "utf-8":
        sizes = [len(line.encode()) for line in texts]
    return TextLines(first_line, texts, offsets, sizes, {}, block.end)


def _decode_one(block: LineBlock, codec: str, max_line_bytes: int) -> str | None:
    """Decode a block of one line without copying it, as it may be large; None if it is bad."""
    body = memoryview(block.data)
    if block.data.endswith(b"\n"):
        body = body[:-1]
    if body[-1:] == b"\r":
        body = body[:-1]
    if len(body) > max_line_bytes or b"\0" in block.data:
        return None
    with contextlib.suppress(UnicodeDecodeError):
        return str(body, codec)
    return None


def count_bytes(text: str) -> int:
    """Return the UTF-8 length of a text in bytes, without encoding all of it at once."""
    return sum(
        len(text[start : start + _PART_CHARACTERS].encode())
        for start in range(0, len(text), _PART_CHARACTERS)
    )


def _decode_each(
    block: LineBlock, offsets: list[int], codec: str, first_line: int, max_line_bytes: int
) -> TextLines:
    raws = block.data.split(b"\n")[: len(offsets)]
    lines = TextLines(first_line, [], offsets, [], {}, block.end)
    for number, raw in enumerate(raws):
        text, bad = "", None
        line, offset = first_line + number, offsets[number]
        if len(raw) > max_line_bytes:
            bad = _too_long(line, offset, len(raw), max_line_bytes)
        else:
            try:
                text = raw.removesuffix(b"\r").decode(codec)
            except UnicodeDecodeError as error:
                bad = _not_decodable(line, offset, raw, error)
        if "\0" in text:
            bad, text = BadRow(line, offset, "nul", excerpt(text)), ""
        if bad is not None:
            lines.bad[number] = bad
        lines.texts.append(text)
        lines.num_bytes.append(len(text.encode()))
    return lines


def _too_long(line: int, offset: int, num_bytes: int, max_bytes: int) -> BadRow:
    detail = f"{num_bytes} bytes, max_document_bytes is {max_bytes}"
    return BadRow(line, offset, "too_long", detail)


def _not_decodable(line: int, offset: int, raw: bytes, error: UnicodeDecodeError) -> BadRow:
    byte = raw[error.start]
    detail = f"byte 0x{byte:02x} at offset {offset + error.start} is not valid {error.encoding}: "
    return BadRow(line, offset, "invalid_bytes", detail + excerpt(raw))
