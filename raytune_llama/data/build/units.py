"""How a corpus is cut into units of work, ranges of large files and runs of small ones.

A unit becomes at most one shard in each split. Units depend on the files and on `range_bytes`
alone; the documents and their order depend on neither.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raytune_llama.data.filters.cleaning import CleaningConfig
from raytune_llama.data.filters.signatures import DuplicatesConfig
from raytune_llama.data.readers.ranges import HASH_BLOCK_BYTES
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.store.manifest import fingerprint_of
from raytune_llama.storage.place import Place


class UnitStoppedError(Exception):
    """A unit gave up because another one has failed."""


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What all units have in common."""

    work_dir: Place
    """The work directory, on storage that all nodes share."""
    store_dir: Place
    """Where the shards are collected."""
    files: list[SourceFile]
    """All source files."""
    bos_id: int | None
    """Id before each document, if any."""
    eos_id: int | None
    """Id behind each document, if any."""
    dtype: Literal["uint16", "uint32"]
    """Type of the ids in the shards."""
    validation_fraction: float
    """Share of the documents that go to the validation split."""
    cleaning: CleaningConfig = field(default_factory=CleaningConfig)
    """What is done to texts before they are encoded."""
    duplicates_config: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Which documents are left out for others."""

    @property
    def has_deduplication(self) -> bool:
        """Whether any are looked for."""
        return bool(self.duplicates_config.fingerprint_inputs)

    @property
    def duplicates_dir(self) -> Place:
        """Where it is found out which documents are left out for others."""
        return self.work_dir / "duplicates"

    @property
    def units_dir(self) -> Place:
        """Where the records of units are."""
        return self.work_dir / "units"

    @property
    def stop_file(self) -> Place:
        """Exists when some unit has failed."""
        return self.work_dir / "stop"


@dataclass(frozen=True)
class ByteRange:
    """A part of a file that one unit reads."""

    file: int
    """Index among the source files."""
    start: int
    """First byte; for Parquet, first row group."""
    stop: int
    """End, not in it."""
    hash_start: int
    """First byte that the unit hashes: those of the piece, but for Parquet a share of the file."""
    hash_stop: int
    """End, not in it."""


@dataclass(frozen=True)
class WorkUnit:
    """Pieces of one source that are read one after the other."""

    index: int
    """Its place in the order of the store."""
    source: int
    """Index of the configured source."""
    byte_ranges: tuple[ByteRange, ...]
    """In source order."""
    num_bytes: int
    """Bytes to read, for progress."""
    key: str = field(compare=False)
    """Identifies the unit and the state of its files, to recognise its finished work."""


def plan_units(files: list[SourceFile], range_bytes: int) -> list[WorkUnit]:
    """Cut files into units of about `range_bytes`, a multiple of `HASH_BLOCK_BYTES`."""
    assert range_bytes % HASH_BLOCK_BYTES == 0
    units: list[WorkUnit] = []
    held: list[ByteRange] = []
    for index, file in enumerate(files):
        pieces = list(_byte_ranges(index, file, range_bytes))
        is_large = len(pieces) > 1 or file.status.num_bytes >= range_bytes
        others = held and files[held[0].file].source != file.source
        if held and (is_large or others or _num_bytes(held) >= range_bytes):
            units.append(_work_unit(len(units), held, files))
            held = []
        if is_large:
            units += [_work_unit(len(units) + n, [piece], files) for n, piece in enumerate(pieces)]
        else:
            held += pieces
    if held:
        units.append(_work_unit(len(units), held, files))
    return units


def _num_bytes(pieces: list[ByteRange]) -> int:
    return sum(piece.hash_stop - piece.hash_start for piece in pieces)


def _work_unit(index: int, pieces: list[ByteRange], files: list[SourceFile]) -> WorkUnit:
    parts: list[dict[str, Any]] = [
        {
            "piece": asdict(piece),
            "name": files[piece.file].name,
            "version": files[piece.file].status.version,
            "options": asdict(files[piece.file].options),
        }
        for piece in pieces
    ]
    source = files[pieces[0].file].source
    key = fingerprint_of({"index": index, "source": source, "parts": parts})
    return WorkUnit(index, source, tuple(pieces), _num_bytes(pieces), key)


def _byte_ranges(index: int, file: SourceFile, range_bytes: int) -> Iterator[ByteRange]:
    num_bytes = file.status.num_bytes
    if file.options.format == "parquet":
        yield from _parquet_ranges(index, file, range_bytes)
    elif file.options.is_splittable:
        for start in range(0, max(1, num_bytes), range_bytes):
            stop = min(start + range_bytes, num_bytes)
            yield ByteRange(index, start, stop, start, stop)
    else:
        yield ByteRange(index, 0, num_bytes, 0, num_bytes)


def _parquet_ranges(index: int, file: SourceFile, range_bytes: int) -> Iterator[ByteRange]:
    """Group row groups; share the bytes of the file among the groups to be hashed."""
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
