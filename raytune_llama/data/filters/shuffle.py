"""Shuffle files: rows of 64-bit integers, sorted by reader, from many tasks to many others.

Each task writes one file, and each reader reads its own range of every file. A file holds, as
little-endian 64-bit integers, the first row of each reader and the number of rows; then the rows,
column by column per reader; then its counts as JSON and the length of that. (An Arrow file with a
record batch per reader takes ten times as long to open, which a shuffle does most of the time.)
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytune_llama.storage.place import Place

Uint64Array = NDArray[np.uint64]
"""An array of the 64-bit integers that are shuffled."""

_STORED = np.dtype("<u8")
_NUM_THREADS = 16  # to read files: in object storage, each takes two round trips


@dataclass(frozen=True)
class ShuffleRows:
    """Rows that a task sends to readers."""

    columns: tuple[Uint64Array, ...]
    """Columns of equal length."""
    reader: NDArray[np.int64]
    """Reader of each row; rows of the same reader keep their order."""
    num_readers: int
    """Number of readers."""
    counts: dict[str, int]
    """Counts to report, by name."""


def write_shuffle_rows(file: Place, find: Callable[[], ShuffleRows]) -> dict[str, int]:
    """Compute and write the rows of a task unless the file exists; return their counts."""
    if file.exists():
        return _read_counts(file)
    rows = find()
    with upload_on_success(file) as path:
        _write_rows(path, rows)
    return rows.counts


def read_shuffle_rows(
    files: Sequence[Place], reader: int, num_readers: int, num_columns: int
) -> tuple[Uint64Array, ...]:
    """Read the rows of one reader from several files, in file order.

    Args:
        files: Files written by `write_shuffle_rows`.
        reader: Index of the reader.
        num_readers: Number of readers of the files.
        num_columns: Number of columns of the files.
    """
    header_bytes = (num_readers + 1) * _STORED.itemsize

    def read(file: Place) -> Uint64Array:
        with file.open() as source:
            start, stop = _numbers(source, reader * _STORED.itemsize, 2).tolist()
            begin = header_bytes + start * num_columns * _STORED.itemsize
            numbers = _numbers(source, begin, (stop - start) * num_columns)
        return numbers.reshape(num_columns, -1)

    if all(file.is_local for file in files):
        parts = list(map(read, files))
    else:
        with ThreadPoolExecutor(_NUM_THREADS) as threads:
            parts = list(threads.map(read, files))
    return tuple(np.concatenate(parts, axis=1))


@contextlib.contextmanager
def upload_on_success(file: Place) -> Iterator[Path]:
    """Yield a local path to write to; upload the file when the block succeeds."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, file.name)
        yield path
        file.upload(path)


def _write_rows(path: Path, rows: ShuffleRows) -> None:
    # Numpy sorts 16-bit integers by radix, in linear time.
    small = np.uint16 if rows.num_readers <= 1 << 16 else np.uint32
    order = np.argsort(rows.reader.astype(small), kind="stable")
    bounds = np.searchsorted(rows.reader[order], np.arange(rows.num_readers + 1))
    counts = json.dumps(rows.counts, sort_keys=True).encode()
    with path.open("wb") as file:
        file.write(bounds.astype(_STORED).data)
        for start, stop in pairwise(bounds.tolist()):
            for column in rows.columns:
                file.write(column[order[start:stop]].astype(_STORED, copy=False).data)
        file.write(counts + len(counts).to_bytes(_STORED.itemsize, "little"))


def _read_counts(file: Place) -> dict[str, int]:
    with file.open() as source:
        end = source.size() - _STORED.itemsize
        num_bytes = int(_numbers(source, end, 1)[0])
        source.seek(end - num_bytes)
        return json.loads(source.read(num_bytes))


def _numbers(source: pa.NativeFile, begin: int, count: int) -> Uint64Array:
    if not count:
        return np.empty(0, dtype=np.uint64)
    source.seek(begin)
    data = source.read(count * _STORED.itemsize)
    assert len(data) == count * _STORED.itemsize, "an existing file is complete"
    return np.frombuffer(data, dtype=_STORED).astype(np.uint64, copy=False)
