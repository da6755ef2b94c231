r"""Read the lines of a byte range of a file once, in bounded memory, hashing the bytes as well.

A file is split into ranges at any byte. A range owns the lines that start in it: its reader looks
one byte back to see whether a line starts at its first byte, and continues past its end until its
last line is complete. So ranges of any size give the same lines, each exactly once.

The hash of a file is computed from the hashes of its 1 MiB blocks, so that ranges aligned to these
blocks can be hashed independently, by their readers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from raytune_llama.storage.hashes import Hasher, hash_bytes

HASH_BLOCK_BYTES = 1 << 20
"""Size of a hashed block; range sizes are multiples of it."""

READ_BYTES = 8 << 20
"""Bytes requested per read."""

_PAST_END_BYTES = 256 << 10  # per read past the end of a range: most lines end soon


class ByteReader(Protocol):
    """Source of bytes from which lines are read."""

    def read(self, num_bytes: int, /) -> bytes:
        """Return up to `num_bytes` of the next bytes; empty only at the end of the file."""
        ...


def content_hash(block_hashes: Iterable[str], like: str | None = None) -> str:
    """Return the hash of a file from the hashes of its blocks; see `storage.hashes`."""
    return hash_bytes("".join(block_hashes).encode(), like)


class HashingReader:
    """Reader from `start` to the end of the file that hashes the bytes in [start, stop)."""

    closed = False  # pyarrow checks this before it reads a Python file object

    def __init__(self, file: pa.NativeFile, start: int, stop: int, like: str | None = None) -> None:
        """Prepare to read.

        Args:
            file: File to read; others may read elsewhere in it.
            start: First byte.
            stop: End of the bytes to hash, exclusive.
            like: Recorded hash whose algorithm to use; see `storage.hashes`.
        """
        self.position = start
        self._file = file
        self._stop = stop
        self._like = like
        self._hashes: list[str] = []
        self._block = Hasher(like)
        self._block_bytes = 0

    def read(self, num_bytes: int = READ_BYTES, /) -> bytes:
        """Return up to `num_bytes` of the next bytes; empty only at the end of the file."""
        # Others may have read elsewhere in the same file.
        self._file.seek(self.position)
        data: bytes = self._file.read(num_bytes)
        self._hash(memoryview(data)[: max(0, self._stop - self.position)])
        self.position += len(data)
        return data

    def close(self) -> None:
        """Do nothing: the file's owner closes it, but pyarrow's decompressors call this."""

    def block_hashes(self) -> list[str]:
        """Return the hash of each block of the range, after reading the rest of the range."""
        while self.position < self._stop and self.read():
            pass
        if self._block_bytes:
            self._end_block()
        return self._hashes

    def _hash(self, data: memoryview) -> None:
        while data:
            part = data[: HASH_BLOCK_BYTES - self._block_bytes]
            self._block.update(part)
            self._block_bytes += len(part)
            data = data[len(part) :]
            if self._block_bytes == HASH_BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        self._hashes.append(self._block.finish())
        self._block = Hasher(self._like)
        self._block_bytes = 0


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Consecutive complete lines, or one line that is too long to hold."""

    offset: int
    """Byte offset of the first line in the file."""
    data: bytes
    r"""The lines, each with its "\n" except perhaps the last of the file; empty if overlong."""
    overlong_bytes: int = 0
    """Length of the one line of the block if it exceeds the limit, in bytes; else 0."""

    @property
    def end(self) -> int:
        """Byte offset of the end of the block."""
        return self.offset + (len(self.data) or self.overlong_bytes)


def is_line_start(file: pa.NativeFile, start: int) -> bool:
    r"""Whether a line starts at an offset: the byte before it is "\n", or there is none."""
    if start == 0:
        return True
    file.seek(start - 1)
    return file.read(1) == b"\n"


def read_line_blocks(
    reader: ByteReader, start: int, stop: int | None, *, at_line_start: bool, max_line_bytes: int
) -> Iterator[LineBlock]:
    """Stream the lines that start in a range, reading past its end to complete the last one.

    Args:
        reader: Reader positioned at `start`.
        start: Byte offset of the range.
        stop: End of the range, exclusive; None: the end of the file.
        at_line_start: Whether a line starts at `start`; if not, its rest is skipped.
        max_line_bytes: Limit on the line length, which bounds memory: a line that exceeds it by
            more than one read is yielded as a block without data.
    """
    lines = _LineReader(reader, start, stop, max_line_bytes)
    if not at_line_start:
        lines.skip_line(only_here=True)
    return lines


class _LineReader(Iterator[LineBlock]):
    """Splits a stream of bytes into blocks of complete lines; keeps no yielded block."""

    def __init__(
        self, reader: ByteReader, start: int, stop: int | None, max_line_bytes: int
    ) -> None:
        self._reader = reader
        self._stop = stop
        self._max = max_line_bytes
        self._offset = start  # of the first byte of `_held`
        self._held = b""

    def __next__(self) -> LineBlock:
        if self._stop is not None and self._offset >= self._stop:
            raise StopIteration
        block = self._next_block()
        if block is None:
            raise StopIteration
        return block

    def skip_line(self, *, only_here: bool = False) -> int:
        """Drop everything up to the end of the current line; return the number of bytes dropped.

        Args:
            only_here: Stop at the end of the range, after which none of its lines starts.
        """
        skipped = 0
        while (end := self._held.find(b"\n")) < 0:
            skipped += len(self._held)
            self._drop(len(self._held))
            is_past_end = self._stop is not None and self._offset >= self._stop
            if (only_here and is_past_end) or not self._fill():
                return skipped
        self._drop(end + 1)
        return skipped + end + 1

    def _next_block(self) -> LineBlock | None:
        parts, num_bytes = [self._held], len(self._held)
        while (end := parts[-1].rfind(b"\n") + 1) == 0:
            if num_bytes > self._max:
                return self._overlong(num_bytes)
            self._held = b""
            if not self._fill(num_bytes):
                break
            parts.append(self._held)
            num_bytes += len(self._held)
        if not num_bytes:
            return None
        data = b"".join(parts)
        length = num_bytes - len(parts[-1]) + end if end else num_bytes
        offset = self._offset
        if self._stop is not None and offset + length > self._stop:
            # The last line that starts before `stop` ends at the first line end at or after it.
            length = data.find(b"\n", self._stop - 1 - offset) + 1 or length
        self._held = data
        self._drop(length)
        return LineBlock(offset, data[:length])

    def _overlong(self, num_bytes: int) -> LineBlock:
        offset = self._offset
        self._held = b""
        self._offset += num_bytes
        return LineBlock(offset, b"", num_bytes + self.skip_line())

    def _drop(self, num_bytes: int) -> None:
        self._held = self._held[num_bytes:]
        self._offset += num_bytes

    def _fill(self, pending: int = 0) -> bool:
        """Read more into the empty buffer; return False at the end of the file."""
        position = self._offset + pending
        inside = self._stop is None or position < self._stop
        wanted = READ_BYTES if inside else max(_PAST_END_BYTES, pending)
        if inside and self._stop is not None:
            wanted = min(wanted, self._stop - position)
        self._held = self._reader.read(wanted)
        return bool(self._held)
