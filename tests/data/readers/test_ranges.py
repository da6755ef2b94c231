"""Promise: lines are the same for any cut of a file into ranges, and a file is hashed once."""

import random
from collections.abc import Iterator

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from raytune_llama.data.readers.ranges import (
    HASH_BLOCK_BYTES,
    HashingReader,
    content_hash,
    is_line_start,
    read_line_blocks,
)
from raytune_llama.storage.hashes import hash_bytes

DATA = st.lists(st.sampled_from([b"a", b"\xe4\xb8\xad", b"\r", b"\n", b"\n\n", b"bc"])).map(
    b"".join
)


class Trickle:
    """Returns a few bytes at a time, whatever is asked for."""

    def __init__(self, data: bytes, position: int, num_bytes: int) -> None:
        self._data = data
        self._position = position
        self._num_bytes = num_bytes
        self.num_read = 0

    def read(self, num_bytes: int, /) -> bytes:
        end = self._position + min(num_bytes, self._num_bytes)
        self.num_read += min(num_bytes, self._num_bytes)
        data = self._data[self._position : end]
        self._position += len(data)
        return data


def cut(num_bytes: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_bytes, size):
        yield start, min(start + size, num_bytes)


@given(data=DATA, size=st.integers(1, 12), read=st.integers(1, 9))
def test_line_blocks_any_ranges_give_every_line_once_at_its_offset(
    data: bytes, size: int, read: int
) -> None:
    found: dict[int, bytes] = {}
    for start, stop in cut(len(data), size):
        blocks = read_line_blocks(
            Trickle(data, start, read),
            start,
            stop,
            at_line_start=is_line_start(pa.BufferReader(data), start),
            max_line_bytes=1000,
        )
        for block in blocks:
            offset = block.offset
            for line in block.data.removesuffix(b"\n").split(b"\n"):
                assert start <= offset < stop
                assert offset not in found
                found[offset] = line
                offset += len(line) + 1
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    assert [found[offset] for offset in sorted(found)] == lines
    offsets = [sum(len(line) + 1 for line in lines[:number]) for number in range(len(lines))]
    assert sorted(found) == offsets


@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    limit=st.integers(1, 20),
    read=st.integers(1, 9),
)
def test_line_blocks_long_line_is_told_by_its_length_and_spoils_no_other(
    lengths: list[int], limit: int, read: int
) -> None:
    data = b"".join(b"x" * length + b"\n" for length in lengths)
    got: list[int] = []
    for block in read_line_blocks(
        Trickle(data, 0, read), 0, len(data), at_line_start=True, max_line_bytes=limit
    ):
        if block.overlong_bytes:
            assert block.overlong_bytes - 1 > limit
            got.append(block.overlong_bytes - 1)
        else:
            assert len(block.data) <= limit + 2 * read
            got.extend(len(line) for line in block.data.splitlines())
    assert got == lengths


@given(num_bytes=st.integers(0, 3 * HASH_BLOCK_BYTES), num_read=st.integers(0, HASH_BLOCK_BYTES))
def test_hashed_ranges_together_hash_what_one_range_hashes(num_bytes: int, num_read: int) -> None:
    data = random.Random(num_bytes).randbytes(num_bytes)
    whole = HashingReader(pa.BufferReader(data), 0, num_bytes).block_hashes()
    parts: list[str] = []
    for start, stop in cut(num_bytes, 2 * HASH_BLOCK_BYTES):
        part = HashingReader(pa.BufferReader(data), start, stop)
        part.read(num_read)
        parts += part.block_hashes()
    assert parts == whole
    blocks = [data[start:stop] for start, stop in cut(num_bytes, HASH_BLOCK_BYTES)]
    wanted = [hash_bytes(block) for block in blocks]
    assert content_hash(whole) == hash_bytes("".join(wanted).encode())


def test_line_blocks_range_within_a_line_reads_no_further_than_its_end() -> None:
    data = b"x" * 1000
    reader = Trickle(data, 100, 30)
    blocks = read_line_blocks(reader, 100, 200, at_line_start=False, max_line_bytes=10_000)
    assert list(blocks) == []
    assert len(reader.read(30)) == 30
    assert reader.num_read <= 150
