"""Plan the work units of a corpus: byte ranges of large files, and groups of small files.

A unit produces at most one shard per split. Units depend only on the files and on `range_bytes`;
the documents and their order do not depend on how the units are cut.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raytune_llama.data.filters.config import CleaningConfig, DuplicatesConfig
from raytune_llama.data.readers.ranges import HASH_BLOCK_BYTES
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.store.manifest import fingerprint_of
from raytune_llama.storage.place import Place


class UnitStoppedError(Exception):
    """A unit was stopped because another one has failed."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """Settings and locations shared by all units of a build."""

    work_dir: Place
    """Work directory, on storage shared by all nodes."""
    store_dir: Place
    """Directory in which the shards are collected."""
    files: list[SourceFile]
    """All source files."""
    bos_id: int | None
    """Id put before each document; None: no id."""
    eos_id: int | None
    """Id put after each document; None: no id."""
    dtype: Literal["uint16", "uint32"]
    """Dtype of the ids in the shards."""
    validation_fraction: float
    """Fraction of documents that go to the validation split."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    """Text normalization and document filters, applied before encoding."""
    duplicates_config: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Deduplication settings."""

    @property
    def has_deduplication(self) -> bool:
        """Whether duplicate documents are dropped."""
        return bool(self.duplicates_config.fingerprint_inputs)

    @property
    def duplicates_dir(self) -> Place:
        """Directory of the deduplication pass."""
        return self.work_dir / "duplicates"

    @property
    def units_dir(self) -> Place:
        """Directory of the unit records."""
        return self.work_dir / "units"

    @property
    def stop_file(self) -> Place:
        """File that exists once a unit has failed."""
        return self.work_dir / "stop"


@dataclass(frozen=True)
class ByteRange:
    """Range of a file that one unit reads."""

    file: int
    """Index of the source file."""
    start: int
    """First byte; for tables, first row group or Arrow record batch."""
    stop: int
    """End, exclusive; bytes, or row groups for tables."""
    hash_start: int
    """First byte to hash; differs from `start` for tables, whose ranges share the file's bytes."""
    hash_stop: int
    """End of the bytes to hash, exclusive."""


@dataclass(frozen=True)
class WorkUnit:
    """Consecutive byte ranges of one source, encoded by one task."""

    index: int
    """Position of the unit in store order."""
    source: int
    """Index of the configured source."""
    byte_ranges: tuple[ByteRange, ...]
    """Byte ranges in source order."""
    num_bytes: int
    """Number of bytes to read, for progress."""
    key: str = field(compare=False)
    """Hash of the unit and of its files' state, to recognize finished work."""


def plan_units(files: list[SourceFile], range_bytes: int) -> list[WorkUnit]:
    """Split files into units of about `range_bytes`, a multiple of `HASH_BLOCK_BYTES`."""
    assert range_bytes % HASH_BLOCK_BYTES == 0
    units: list[WorkUnit] = []
    held: list[ByteRange] = []
    for index, file in enumerate(files):
        ranges = list(_byte_ranges(index, file, range_bytes))
        is_large = len(ranges) > 1 or file.status.num_bytes >= range_bytes
        others = held and files[held[0].file].source != file.source
        if held and (is_large or others or _num_bytes(held) >= range_bytes):
            units.append(_work_unit(len(units), held, files))
            held = []
        if is_large:
            units += [_work_unit(len(units) + n, [each], files) for n, each in enumerate(ranges)]
        else:
            held += ranges
    if held:
        units.append(_work_unit(len(units), held, files))
    return units


def _num_bytes(ranges: list[ByteRange]) -> int:
    return sum(each.hash_stop - each.hash_start for each in ranges)


def _work_unit(index: int, ranges: list[ByteRange], files: list[SourceFile]) -> WorkUnit:
    parts: list[dict[str, Any]] = [
        {
            "piece": asdict(each),
            "name": files[each.file].name,
            "version": files[each.file].status.version,
            "options": asdict(files[each.file].options),
        }
        for each in ranges
    ]
    source = files[ranges[0].file].source
    key = fingerprint_of({"index": index, "source": source, "parts": parts})
    return WorkUnit(index, source, tuple(ranges), _num_bytes(ranges), key)


def _byte_ranges(index: int, file: SourceFile, range_bytes: int) -> Iterator[ByteRange]:
    num_bytes = file.status.num_bytes
    if file.options.is_table:
        yield from _table_ranges(index, file, range_bytes)
    elif file.options.is_splittable:
        for start in range(0, max(1, num_bytes), range_bytes):
            stop = min(start + range_bytes, num_bytes)
            yield ByteRange(index, start, stop, start, stop)
    else:
        yield ByteRange(index, 0, num_bytes, 0, num_bytes)


def _table_ranges(index: int, file: SourceFile, range_bytes: int) -> Iterator[ByteRange]:
    """Batch row groups into ranges, and divide the file's bytes among them for hashing."""
    groups: list[range] = []
    start = held = 0
    for number, size in enumerate(file.row_group_bytes):
        held += size
        if held >= range_bytes:
            groups.append(range(start, number + 1))
            start, held = number + 1, 0
    if held or not groups:
        groups.append(range(start, len(file.row_group_bytes)))
    num_bytes = file.status.num_bytes
    num_blocks = -(-num_bytes // HASH_BLOCK_BYTES)
    bounds = [
        min(num_bytes, num_blocks * number // len(groups) * HASH_BLOCK_BYTES)
        for number in range(len(groups) + 1)
    ]
    bounds[-1] = num_bytes
    for number, group in enumerate(groups):
        yield ByteRange(index, group.start, group.stop, bounds[number], bounds[number + 1])
