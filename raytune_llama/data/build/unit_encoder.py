"""Encode one work unit of a token store: byte ranges of source files to shards and a record.

The output of a unit depends only on its files and the plan, so its bytes are the same on any
worker, in any order and after any number of restarts. The work directory holds

    store/train-00000.arrow ...     shards of the future store (object storage: written in place)
    units/00000.json                record of a finished unit: hashes and counts
    units/00000.quarantine.jsonl    bad rows of the unit
    units/00000.attempts            one byte per attempt that did not finish
    stop                            exists if a unit has failed: the others stop
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
from raytune_llama.storage.hashes import hash_file
from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

MAX_UNIT_ATTEMPTS = 3
"""Maximum number of attempts per unit; without it Ray would restart a crashing unit forever."""

NUM_LENGTH_BINS = 40
"""Number of bins, one per power of two, in the histogram of document lengths."""


class DiskFullError(SourceError):
    """No space is left on a disk; running the same command again resumes."""


@dataclass(frozen=True, kw_only=True)
class UnitQuarantine:
    """File with the bad rows of a unit."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    hash: str
    """Hash of the file; see `storage.hashes`."""
    file_bytes: int
    """File size in bytes."""


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """Files and counts of a finished unit."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    key: str
    """`work_key` of the unit."""
    shards: dict[SplitName, Shard | None]
    """Shard of the unit per split; None if the split got no document."""
    rows: RowCounts
    """Row counts by outcome."""
    pieces: list[ByteRangeRecord]
    """One record per byte range of the unit, in its order."""
    quarantine: UnitQuarantine | None
    """File of bad rows; None if there are none."""
    lengths: list[int]
    """Histogram of document lengths: bin n counts documents of 2**n to 2**(n + 1) - 1 tokens."""


class UnitReader(Protocol):
    """Picklable reader that turns the rows of a unit into token ids."""

    @property
    def has_targets(self) -> bool:
        """Whether documents come with a loss mask over their tokens."""
        ...

    def read(
        self, unit: WorkUnit, plan: BuildPlan, tally: Tally, quarantine: QuarantineWriter
    ) -> Iterator[EncodedDocuments]:
        """Stream the kept documents of a unit, counting every other row in `tally`.

        Raises:
            SourceError: A file cannot be read as configured, was changed during the read, or does
                not have the configured format.
        """
        ...


def quarantine_place(unit: WorkUnit, plan: BuildPlan) -> Place:
    """Return the location of the file with a unit's bad rows."""
    return plan.units_dir / f"{unit.index:05d}.quarantine.jsonl"


def finished_record(unit: WorkUnit, plan: BuildPlan) -> UnitRecord | None:
    """Return the record of a finished unit; None if it or a file it lists is missing or damaged."""
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
    # Shards are synced only when the store is published, so a power cut may leave a torn one. An
    # upload is atomic, and hashing it would need a download.
    return not place.is_local or hash_file(place.path) == wanted.hash


def encode_unit(unit: WorkUnit, plan: BuildPlan, reader: UnitReader) -> UnitRecord:
    """Encode a unit and write its shards and its record.

    Raises:
        SourceError: A file cannot be read as configured, was changed during the read, or has
            crashed the process too often.
        DiskFullError: A disk is full; finished units are kept.
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
    """Record the start of an attempt in storage; raise SourceError after too many attempts."""
    done = attempts.read_bytes() if attempts.exists() else b""
    if len(done) >= MAX_UNIT_ATTEMPTS:
        raise SourceError(
            f"{_name(unit, plan)}: encoding it crashed the process {len(done)} times (out of "
            "memory, a tokenizer crash, or lost nodes); check the workers' logs, or remove the "
            "file from the sources"
        )
    attempts.write_bytes(done + b".")


def _name(unit: WorkUnit, plan: BuildPlan) -> str:
    first, more = unit.byte_ranges[0], len(unit.byte_ranges) - 1
    name = f"{plan.files[first.file].place}"
    if more:
        return f"{name} and {more} more files"
    kind = "row groups" if plan.files[first.file].options.is_table else "bytes"
    return f"{name}, {kind} {first.start} to {first.stop}"


def _no_space(unit: WorkUnit, plan: BuildPlan, error: OSError) -> str:
    where = error.filename or plan.store_dir
    return (
        f"no space left for {where} while encoding {_name(unit, plan)} ({unit.num_bytes:,} bytes "
        "of text); free space and run the same command to resume: finished work is kept"
    )


@contextlib.contextmanager
def _scratch(plan: BuildPlan) -> Iterator[Path]:
    """Yield the directory to write shards to: the store, or a temporary one to upload from."""
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
            # floor(log2(length)), exact for all lengths, unlike np.log2.
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
    return UnitQuarantine(hash=hash_file(file), file_bytes=file.stat().st_size)


def _upload(folder: Path, unit: WorkUnit, plan: BuildPlan, record: UnitRecord) -> None:
    """Upload the files of a unit to object storage; no-op for a local store."""
    if plan.store_dir.is_local:
        return
    for shard in record.shards.values():
        if shard:
            (plan.store_dir / shard.name).upload(folder / shard.name)
    if record.quarantine:
        quarantine_place(unit, plan).upload(_bad_rows_file(folder, unit, plan))
