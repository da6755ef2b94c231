"""Files of 64-bit numbers, sorted by who reads them: how rows get from many tasks to many others.

Each task writes one file, and each reader takes its own stretch of every file. A file holds, as
little-endian 64-bit numbers, the first row of each reader and the number of rows; then the rows,
for each reader column after column; then its counts as JSON and the length of that. (An Arrow file
with a record batch a reader takes ten times as long to open, which is what a shuffle does most.)
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
"""Whatever is shuffled."""

_STORED = np.dtype("<u8")
_NUM_THREADS = 16  # that read files: in object storage, each takes two round trips


@dataclass(frozen=True)
class ShuffleRows:
    """What a task found."""

    columns: tuple[Uint64Array, ...]
    """Of equal length."""
    reader: NDArray[np.int64]
    """The reader of each row; rows of the same keep their order."""
    num_readers: int
    """How many readers there are."""
    counts: dict[str, int]
    """What there is to tell about it."""


def write_shuffle_rows(file: Place, find: Callable[[], ShuffleRows]) -> dict[str, int]:
    """Write what a task finds, if it is not there yet; return its counts."""
    if file.exists():
        return _read_counts(file)
    rows = find()
    with upload_on_success(file) as path:
        _write_rows(path, rows)
    return rows.counts


def read_shuffle_rows(
    files: Sequence[Place], reader: int, num_readers: int, num_columns: int
) -> tuple[Uint64Array, ...]:
    """Read what some files have for a reader, one file after the other.

    Args:
        files: The files.
        reader: Which stretch of them.
        num_readers: How many stretches they have.
        num_columns: How many columns they have.
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
    """Yield a path to write to; the file appears at its place when the block has succeeded."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, file.name)
        yield path
        file.upload(path)


def _write_rows(path: Path, rows: ShuffleRows) -> None:
    # Small integers are sorted by their digits, in linear time.
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
    assert len(data) == count * _STORED.itemsize, "a file is whole where it is there"
    return np.frombuffer(data, dtype=_STORED).astype(np.uint64, copy=False)
