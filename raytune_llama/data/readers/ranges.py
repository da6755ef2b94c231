r"""Lines of a byte range of a file, read once, in bounded memory, hashed on the way.

A file is cut into ranges at any byte. A range owns the lines that start in it: its reader looks
one byte back to see whether a line starts at its first byte, and reads on behind its end until
its last line is whole. So ranges of any size give the same lines, each exactly once.

The hash of a file is made of the SHA-256 of its blocks of 1 MiB, so that ranges which start at
such blocks can be hashed apart, by whoever reads them.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

HASH_BLOCK_BYTES = 1 << 20
"""Blocks that are hashed one by one; the size of a range is a multiple of it."""

READ_BYTES = 8 << 20
"""Bytes asked for at once."""

_BEHIND_BYTES = 256 << 10  # asked for at once behind a range: most lines end soon


class ByteReader(Protocol):
    """What lines are read from."""

    def read(self, num_bytes: int, /) -> bytes:
        """Return some of the next bytes, at most so many; none behind the end only."""
        ...


def content_sha256(block_digests: Iterable[str]) -> str:
    """Return the hash of a file from the hashes of its blocks, all hex."""
    return hashlib.sha256("".join(block_digests).encode()).hexdigest()


class HashingReader:
    """Reads a file from `start` on, also behind `stop`, and hashes what lies in [start, stop)."""

    closed = False  # what pyarrow asks of a file of Python's before it reads it

    def __init__(self, file: pa.NativeFile, start: int, stop: int) -> None:
        self.position = start
        self._file = file
        self._stop = stop
        self._digests: list[str] = []
        self._block = hashlib.sha256()
        self._block_bytes = 0

    def read(self, num_bytes: int = READ_BYTES, /) -> bytes:
        """Return some of the next bytes; none behind the end of the file only."""
        # Others may have read elsewhere in the same file.
        self._file.seek(self.position)
        data: bytes = self._file.read(num_bytes)
        self._hash(memoryview(data)[: max(0, self._stop - self.position)])
        self.position += len(data)
        return data

    def close(self) -> None:
        """Do nothing, as the file is for others to close; pyarrow's decompressors call this."""

    def digests(self) -> list[str]:
        """Return the hash of each block of the range; reads what was not read yet."""
        while self.position < self._stop and self.read():
            pass
        if self._block_bytes:
            self._end_block()
        return self._digests

    def _hash(self, data: memoryview) -> None:
        while data:
            part = data[: HASH_BLOCK_BYTES - self._block_bytes]
            self._block.update(part)
            self._block_bytes += len(part)
            data = data[len(part) :]
            if self._block_bytes == HASH_BLOCK_BYTES:
                self._end_block()

    def _end_block(self) -> None:
        self._digests.append(self._block.hexdigest())
        self._block = hashlib.sha256()
        self._block_bytes = 0


@dataclass(frozen=True, slots=True)
class LineBlock:
    r"""Whole lines one after the other, or one line that is too long to be held."""

    offset: int
    """Where the first one starts in the file."""
    data: bytes
    r"""The lines, each with its "\n", but perhaps the last one of the file; empty when too long."""
    overlong_bytes: int = 0
    """Length of a line that is longer than allowed, which is all of the block; else 0."""

    @property
    def end(self) -> int:
        """Offset behind the block."""
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
    """Stream the lines that start in a range, with those behind it that are needed to end them.

    Args:
        reader: Stands at `start`.
        start: Offset of the range.
        stop: Its end; None: the end of the file.
        at_line_start: Whether a line starts at `start`; else the reader skips to the next one.
        max_line_bytes: A line that is longer by more than one read comes as a block without data,
            which bounds the memory.
    """
    lines = _LineReader(reader, start, stop, max_line_bytes)
    if not at_line_start:
        lines.skip_line(only_here=True)
    return lines


class _LineReader(Iterator[LineBlock]):
    """Cuts a stream of bytes into blocks of whole lines; keeps no block that it has given."""

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
        """Drop everything up to the end of the present line; return how many bytes that were.

        Args:
            only_here: Stop at the end of the range: no line that starts in it comes behind.
        """
        skipped = 0
        while (end := self._held.find(b"\n")) < 0:
            skipped += len(self._held)
            self._drop(len(self._held))
            is_behind = self._stop is not None and self._offset >= self._stop
            if (only_here and is_behind) or not self._fill():
                return skipped
        self._drop(end + 1)
        return skipped + end + 1

    def _next_block(self) -> LineBlock | None:
        pieces, num_bytes = [self._held], len(self._held)
        while (end := pieces[-1].rfind(b"\n") + 1) == 0:
            if num_bytes > self._max:
                return self._overlong(num_bytes)
            self._held = b""
            if not self._fill(num_bytes):
                break
            pieces.append(self._held)
            num_bytes += len(self._held)
        if not num_bytes:
            return None
        data = b"".join(pieces)
        whole = num_bytes - len(pieces[-1]) + end if end else num_bytes
        offset = self._offset
        if self._stop is not None and offset + whole > self._stop:
            # The last line that starts before `stop` ends at the first line end from there on.
            whole = data.find(b"\n", self._stop - 1 - offset) + 1 or whole
        self._held = data
        self._drop(whole)
        return LineBlock(offset, data[:whole])

    def _overlong(self, num_bytes: int) -> LineBlock:
        offset = self._offset
        self._held = b""
        self._offset += num_bytes
        return LineBlock(offset, b"", num_bytes + self.skip_line())

    def _drop(self, num_bytes: int) -> None:
        self._held = self._held[num_bytes:]
        self._offset += num_bytes

    def _fill(self, pending: int = 0) -> bool:
        """Read on into the empty buffer; False at the end of the file."""
        position = self._offset + pending
        inside = self._stop is None or position < self._stop
        wanted = READ_BYTES if inside else max(_BEHIND_BYTES, pending)
        if inside and self._stop is not None:
            wanted = min(wanted, self._stop - position)
        self._held = self._reader.read(wanted)
        return bool(self._held)
