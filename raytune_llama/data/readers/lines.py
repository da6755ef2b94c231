r"""Decoded lines of a text file, with their places; what cannot be decoded is told apart.

Lines end with "\n" only, and a "\r" before it is dropped: U+2028, form feeds and the like, which
`str.splitlines` cuts at, are part of the text.
"""

import contextlib
from dataclasses import dataclass
from itertools import accumulate, chain

from raytune_llama.data.readers.ranges import LineBlock
from raytune_llama.data.readers.rows import BadRow, excerpt

_PART_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class TextLines:
    """Some lines one after the other; the lists go together."""

    first_line: int
    """Number of the first one, from 1 at the start of what is read."""
    texts: list[str]
    """Without their ends; empty where a line cannot be used."""
    offsets: list[int]
    """Where each starts."""
    num_bytes: list[int]
    """UTF-8 bytes of each text."""
    bad: dict[int, BadRow]
    """The lines that cannot be used, by their place in the lists."""
    end: int
    """Offset behind the last one."""


def decode_lines(block: LineBlock, codec: str, first_line: int, max_line_bytes: int) -> TextLines:
    """Decode a block of lines; one line that is not text spoils no other.

    Args:
        block: Whole lines, or one that was too long to hold.
        codec: In which no byte of a longer character is that of a line end.
        first_line: Number of the first line.
        max_line_bytes: A longer line is not used.
    """
    if block.overlong_bytes:
        bad = _too_long(first_line, block.offset, block.overlong_bytes, max_line_bytes)
        return TextLines(first_line, [""], [block.offset], [0], {0: bad}, block.end)
    if block.data.find(b"\n", 0, -1) < 0 and (line := _decode_one(block, codec, max_line_bytes)):
        return TextLines(first_line, [line], [block.offset], [count_bytes(line)], {}, block.end)
    raws = block.data.split(b"\n")
    if not raws[-1]:
        raws.pop()  # what is behind the last line end
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
    """Decode a block of one line without a copy of it, which may be large; None where it is bad."""
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
    """Count the bytes of a text in UTF-8, a part at a time."""
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
    detail = f"byte 0x{byte:02x} at offset {offset + error.start} is not {error.encoding}: "
    return BadRow(line, offset, "invalid_bytes", detail + excerpt(raw))
