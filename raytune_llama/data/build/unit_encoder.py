"""One work unit of building a token store: pieces of source files become shards and a record.

A unit depends on nothing but its files and the plan, so that its bytes are the same on whatever
worker, in whatever order and after however many restarts. The work directory holds

    store/train-00000.arrow ...     what becomes the store (in object storage: lies there already)
    units/00000.json                record of a finished unit: hashes and counts
    units/00000.quarantine.jsonl    its bad rows
    units/00000.attempts            a byte for each time that it was begun and not finished
    stop                            some unit has failed: the others give up
"""

import contextlib
import errno
import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pydantic

from raytune_llama.data.build.duplicates_pass import work_key
from raytune_llama.data.build.unit_reader import (
    ByteRangeRecord,
    QuarantineWriter,
    Tally,
)
from raytune_llama.data.build.units import BuildPlan, UnitStoppedError, WorkUnit
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import SPLITS, RowCounts, Shard, SplitName
from raytune_llama.data.store.shards import EncodedDocuments, ShardWriter
from raytune_llama.storage.files import sha256_file
from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

MAX_UNIT_ATTEMPTS = 3
"""A unit that ended its process this often is refused: Ray would restart it for ever."""

NUM_LENGTH_BINS = 40
"""Powers of two that the histogram of lengths knows."""


class DiskFullError(SourceError):
    """A disk is full."""


@dataclass(frozen=True, kw_only=True)
class UnitQuarantine:
    """The bad rows of a unit."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    sha256: str
    """Hash of the file."""
    file_bytes: int
    """Its size."""


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What a finished unit has written."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    key: str
    """`work_key` of the unit."""
    shards: dict[SplitName, Shard | None]
    """Its shard in each split; None when no document went there."""
    rows: RowCounts
    """What became of its rows."""
    pieces: list[ByteRangeRecord]
    """One for each piece."""
    quarantine: UnitQuarantine | None
    """Its file of bad rows; None when there are none."""
    lengths: list[int]
    """Documents by the power of two of their tokens."""


class UnitReader(Protocol):
    """What turns the rows of a unit into token ids; picklable."""

    @property
    def has_targets(self) -> bool:
        """Whether documents say which of their tokens are learned."""
        ...

    def read(
        self, unit: WorkUnit, plan: BuildPlan, tally: Tally, quarantine: QuarantineWriter
    ) -> Iterator[EncodedDocuments]:
        """Stream the documents of a unit that are kept, and account for every other row.

        Raises:
            SourceError: A file cannot be read as configured, was changed, or is something else
                than the config says.
        """
        ...


def quarantine_place(unit: WorkUnit, plan: BuildPlan) -> Place:
    """Where the bad rows of a unit are."""
    return plan.units_dir / f"{unit.index:05d}.quarantine.jsonl"


def finished_record(unit: WorkUnit, plan: BuildPlan) -> UnitRecord | None:
    """Return the record of a unit if it and the files it lists are whole."""
    place = _record_place(unit, plan)
    if not place.exists():
        return None
    try:
        record = pydantic.TypeAdapter(UnitRecord).validate_json(place.read_bytes())
    except pydantic.ValidationError:
        return None
    files: list[tuple[Place, Shard | UnitQuarantine]] = [
        (plan.store_dir / shard.name, shard) for shard in record.shards.values() if shard
    ]
    if record.quarantine:
        files.append((quarantine_place(unit, plan), record.quarantine))
    if record.key != work_key(unit, plan) or not all(_is_whole(*file) for file in files):
        return None
    return record


def _is_whole(place: Place, wanted: Shard | UnitQuarantine) -> bool:
    status = place.status()
    if status is None or status.num_bytes != wanted.file_bytes:
        return False
    # Shards are synced only when the store is published: after a power cut one may be torn. An
    # upload is never torn, and hashing it would mean to download it.
    return not place.is_local or sha256_file(place.path) == wanted.sha256


def encode_unit(unit: WorkUnit, plan: BuildPlan, reader: UnitReader) -> UnitRecord:
    """Encode a unit and write its shards and its record.

    Raises:
        SourceError: A file cannot be read as configured, was changed meanwhile, or has ended
            the process too often.
        NoSpaceError: A disk is full; what other units have done stays.
        UnitStoppedError: Another unit has failed.
    """
    attempts = plan.units_dir / f"{unit.index:05d}.attempts"
    try:
        _count_attempt(attempts, unit, plan)
        with _scratch(plan) as folder:
            record = _encode_into(folder, unit, plan, reader)
            _upload(folder, unit, plan, record)
        _record_place(unit, plan).write_json(asdict(record))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFullError(_no_space(unit, plan, error)) from error
    attempts.delete()
    return record


def _record_place(unit: WorkUnit, plan: BuildPlan) -> Place:
    return plan.units_dir / f"{unit.index:05d}.json"


def _count_attempt(attempts: Place, unit: WorkUnit, plan: BuildPlan) -> None:
    """Note in storage that a unit is begun; refuse it when it has been too often."""
    done = attempts.read_bytes() if attempts.exists() else b""
    if len(done) >= MAX_UNIT_ATTEMPTS:
        raise SourceError(
            f"{_name(unit, plan)}: encoding it ended the process {len(done)} times (out of "
            "memory, a crash of the tokenizer, or lost machines); look into the workers' logs, or "
            "leave the file out"
        )
    attempts.write_bytes(done + b".")


def _name(unit: WorkUnit, plan: BuildPlan) -> str:
    first, more = unit.byte_ranges[0], len(unit.byte_ranges) - 1
    name = f"{plan.files[first.file].place}"
    if more:
        return f"{name} and {more} files behind it"
    kind = "row groups" if plan.files[first.file].options.format == "parquet" else "bytes"
    return f"{name}, {kind} {first.start} to {first.stop}"


def _no_space(unit: WorkUnit, plan: BuildPlan, error: OSError) -> str:
    where = error.filename or plan.store_dir
    return (
        f"no space left for {where} while {_name(unit, plan)} ({unit.num_bytes:,} bytes of text) "
        "was encoded; make room and run the same command again: what is done is kept"
    )


@contextlib.contextmanager
def _scratch(plan: BuildPlan) -> Iterator[Path]:
    """Yield where shards are written: the store itself, or a local folder to upload from."""
    if plan.store_dir.is_local:
        yield plan.store_dir.path
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _encode_into(folder: Path, unit: WorkUnit, plan: BuildPlan, reader: UnitReader) -> UnitRecord:
    tally = Tally()
    lengths = np.zeros(NUM_LENGTH_BINS, dtype=np.int64)
    bad_rows = _bad_rows_file(folder, unit, plan)
    with ExitStack() as stack:
        quarantine = stack.enter_context(QuarantineWriter(bad_rows))
        writers: dict[SplitName, ShardWriter] = {
            split: stack.enter_context(
                ShardWriter(
                    folder / f"{split}-{unit.index:05d}.arrow",
                    plan.dtype,
                    source=unit.source,
                    has_targets=reader.has_targets,
                    bos_id=plan.bos_id,
                    eos_id=plan.eos_id,
                )
            )
            for split in SPLITS
        }
        for documents in reader.read(unit, plan, tally, quarantine):
            if plan.stop_file.exists():
                raise UnitStoppedError
            sides = (~documents.is_validation, documents.is_validation)
            for split, side in zip(SPLITS, sides, strict=True):
                if side.any():
                    writers[split].write_documents(documents.filter(side))
            # The power of two below: an exact one for all lengths, unlike a logarithm's.
            powers = np.frexp(documents.lengths)[1] - 1
            lengths += np.bincount(powers, minlength=NUM_LENGTH_BINS)
    tally.documents = sum(writer.shard.documents for writer in writers.values() if writer.shard)
    return UnitRecord(
        key=work_key(unit, plan),
        shards={split: writers[split].shard for split in SPLITS},
        rows=tally.counts(),
        pieces=tally.range_records,
        quarantine=_unit_quarantine(bad_rows),
        lengths=lengths.tolist(),
    )


def _bad_rows_file(folder: Path, unit: WorkUnit, plan: BuildPlan) -> Path:
    place = quarantine_place(unit, plan)
    return place.path if place.is_local else folder / place.name


def _unit_quarantine(file: Path) -> UnitQuarantine | None:
    if not file.exists():
        return None
    return UnitQuarantine(sha256=sha256_file(file), file_bytes=file.stat().st_size)


def _upload(folder: Path, unit: WorkUnit, plan: BuildPlan, record: UnitRecord) -> None:
    """Bring the files of a unit to object storage."""
    if plan.store_dir.is_local:
        return
    for shard in record.shards.values():
        if shard:
            (plan.store_dir / shard.name).upload(folder / shard.name)
    if record.quarantine:
        quarantine_place(unit, plan).upload(_bad_rows_file(folder, unit, plan))
