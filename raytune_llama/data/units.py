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
from hashlib import sha256
from pathlib import Path

import numpy as np
import pydantic
from numpy.typing import NDArray

from raytune_llama.data.cleaning import Cleaner
from raytune_llama.data.deduplication import DuplicateFilter, work_key
from raytune_llama.data.manifest import SPLITS, RowCounts, Shard, SplitName
from raytune_llama.data.plan import EncodePlan, Unit, UnitStoppedError
from raytune_llama.data.reading import (
    Documents,
    PieceRecord,
    QuarantineWriter,
    Tally,
    read_unit,
)
from raytune_llama.data.rows import SourceError
from raytune_llama.data.shards import ShardWriter
from raytune_llama.files import sha256_file
from raytune_llama.model.cuts import UncuttableTextError
from raytune_llama.model.encoder import IdsDifferError
from raytune_llama.model.reference import TextEncoder
from raytune_llama.storage import Place

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A unit that ended its process this often is refused: Ray would restart it for ever."""

NUM_LENGTH_BINS = 40
"""Powers of two that the histogram of lengths knows."""

_BATCH_DOCUMENTS = 8192
_BATCH_BYTES = 2 << 20


class NoSpaceError(SourceError):
    """A disk is full."""


@dataclass(frozen=True, kw_only=True)
class QuarantinePart:
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
    pieces: list[PieceRecord]
    """One for each piece."""
    quarantine: QuarantinePart | None
    """Its file of bad rows; None when there are none."""
    lengths: list[int]
    """Documents by the power of two of their tokens."""


def quarantine_place(unit: Unit, plan: EncodePlan) -> Place:
    """Where the bad rows of a unit are."""
    return plan.units / f"{unit.index:05d}.quarantine.jsonl"


def finished_record(unit: Unit, plan: EncodePlan) -> UnitRecord | None:
    """Return the record of a unit if it and the files it lists are whole."""
    place = _record_place(unit, plan)
    if not place.exists():
        return None
    try:
        record = pydantic.TypeAdapter(UnitRecord).validate_json(place.read_bytes())
    except pydantic.ValidationError:
        return None
    files: list[tuple[Place, Shard | QuarantinePart]] = [
        (plan.store / shard.name, shard) for shard in record.shards.values() if shard
    ]
    if record.quarantine:
        files.append((quarantine_place(unit, plan), record.quarantine))
    if record.key != work_key(unit, plan) or not all(_is_whole(*file) for file in files):
        return None
    return record


def _is_whole(place: Place, wanted: Shard | QuarantinePart) -> bool:
    status = place.status()
    if status is None or status.num_bytes != wanted.file_bytes:
        return False
    # Shards are synced only when the store is published: after a power cut one may be torn. An
    # upload is never torn, and hashing it would mean to download it.
    return not place.is_local or sha256_file(place.path) == wanted.sha256


def encode_unit(unit: Unit, plan: EncodePlan, encoder: TextEncoder) -> UnitRecord:
    """Encode a unit and write its shards and its record.

    Raises:
        SourceError: A file cannot be read as configured, was changed meanwhile, or has ended
            the process too often.
        NoSpaceError: A disk is full; what other units have done stays.
        UnitStoppedError: Another unit has failed.
    """
    attempts = plan.units / f"{unit.index:05d}.attempts"
    try:
        _count_attempt(attempts, unit, plan)
        with _scratch(plan) as folder:
            record = _encode_into(folder, unit, plan, encoder)
            _upload(folder, unit, plan, record)
        _record_place(unit, plan).write_json(asdict(record))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise NoSpaceError(_no_space(unit, plan, error)) from error
    attempts.delete()
    return record


def _record_place(unit: Unit, plan: EncodePlan) -> Place:
    return plan.units / f"{unit.index:05d}.json"


def _count_attempt(attempts: Place, unit: Unit, plan: EncodePlan) -> None:
    """Note in storage that a unit is begun; refuse it when it has been too often."""
    done = attempts.read_bytes() if attempts.exists() else b""
    if len(done) >= MAX_ATTEMPTS:
        raise SourceError(
            f"{_name(unit, plan)}: encoding it ended the process {len(done)} times (out of "
            "memory, a crash of the tokenizer, or lost machines); look into the workers' logs, or "
            "leave the file out"
        )
    attempts.write_bytes(done + b".")


def _name(unit: Unit, plan: EncodePlan) -> str:
    first, more = unit.pieces[0], len(unit.pieces) - 1
    name = f"{plan.files[first.file].place}"
    if more:
        return f"{name} and {more} files behind it"
    kind = "row groups" if plan.files[first.file].options.format == "parquet" else "bytes"
    return f"{name}, {kind} {first.start} to {first.stop}"


def _no_space(unit: Unit, plan: EncodePlan, error: OSError) -> str:
    where = error.filename or plan.store
    return (
        f"no space left for {where} while {_name(unit, plan)} ({unit.num_bytes:,} bytes of text) "
        "was encoded; make room and run the same command again: what is done is kept"
    )


@contextlib.contextmanager
def _scratch(plan: EncodePlan) -> Iterator[Path]:
    """Yield where shards are written: the store itself, or a local folder to upload from."""
    if plan.store.is_local:
        yield plan.store.path
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _encode_into(folder: Path, unit: Unit, plan: EncodePlan, encoder: TextEncoder) -> UnitRecord:
    tally = Tally()
    lengths = np.zeros(NUM_LENGTH_BINS, dtype=np.int64)
    bad_rows = _bad_rows_file(folder, unit, plan)
    duplicates = DuplicateFilter(unit, plan)
    with ExitStack() as stack:
        quarantine = stack.enter_context(QuarantineWriter(bad_rows))
        writers: dict[SplitName, ShardWriter] = {
            split: stack.enter_context(
                ShardWriter(
                    folder / f"{split}-{unit.index:05d}.arrow",
                    plan.dtype,
                    source=unit.source,
                    bos_id=plan.bos_id,
                    eos_id=plan.eos_id,
                )
            )
            for split in SPLITS
        }
        for documents in read_unit(unit, plan.files, tally, quarantine, Cleaner(plan.cleaning)):
            if plan.stop.exists():
                raise UnitStoppedError
            for batch in _batched(duplicates.keep(documents, tally)):
                lengths += _write_batch(batch, plan, encoder, writers, tally)
    tally.documents = sum(writer.shard.documents for writer in writers.values() if writer.shard)
    return UnitRecord(
        key=work_key(unit, plan),
        shards={split: writers[split].shard for split in SPLITS},
        rows=tally.counts(),
        pieces=tally.pieces,
        quarantine=_quarantine_part(bad_rows),
        lengths=lengths.tolist(),
    )


def _bad_rows_file(folder: Path, unit: Unit, plan: EncodePlan) -> Path:
    place = quarantine_place(unit, plan)
    return place.path if place.is_local else folder / place.name


def _quarantine_part(file: Path) -> QuarantinePart | None:
    if not file.exists():
        return None
    return QuarantinePart(sha256=sha256_file(file), file_bytes=file.stat().st_size)


def _upload(folder: Path, unit: Unit, plan: EncodePlan, record: UnitRecord) -> None:
    """Bring the files of a unit to object storage."""
    if plan.store.is_local:
        return
    for shard in record.shards.values():
        if shard:
            (plan.store / shard.name).upload(folder / shard.name)
    if record.quarantine:
        quarantine_place(unit, plan).upload(_bad_rows_file(folder, unit, plan))


def _batched(documents: Documents) -> Iterator[Documents]:
    """Cut documents so that a batch is worth a call and yet fits in memory."""
    ends = np.cumsum(documents.num_bytes)
    start = num_bytes = 0
    while start < len(documents.texts):
        full = int(np.searchsorted(ends, num_bytes + _BATCH_BYTES)) + 1
        stop = min(full, start + _BATCH_DOCUMENTS, len(documents.texts))
        yield _part(documents, start, stop)
        start, num_bytes = stop, int(ends[stop - 1])


def _part(documents: Documents, start: int, stop: int) -> Documents:
    return Documents(
        documents.file,
        documents.texts[start:stop],
        documents.offsets[start:stop],
        documents.num_bytes[start:stop],
    )


def _write_batch(
    documents: Documents,
    plan: EncodePlan,
    encoder: TextEncoder,
    writers: dict[SplitName, ShardWriter],
    tally: Tally,
) -> NDArray[np.int64]:
    """Encode and write a batch; a text that becomes no token is counted. Return the lengths."""
    encoded = _encode(documents, plan, encoder, tally)
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    ids = encoded[0] if len(encoded) == 1 else np.concatenate(encoded)
    columns = [
        np.array(column, dtype=np.int64) for column in (documents.num_bytes, documents.offsets)
    ]
    tally.skipped["no_tokens"] += int((lengths == 0).sum())
    for split, of_split in choose_sides(documents.texts, plan.validation_fraction).items():
        chosen = of_split & (lengths > 0)
        writers[split].write_documents(
            ids if chosen.all() else ids[np.repeat(chosen, lengths)],
            lengths[chosen],
            columns[0][chosen],
            documents.file,
            columns[1][chosen],
        )
    # The power of two below: an exact one for all lengths, unlike a logarithm's.
    powers = np.frexp(lengths[lengths > 0])[1] - 1
    return np.bincount(powers, minlength=NUM_LENGTH_BINS)


def _encode(
    documents: Documents, plan: EncodePlan, encoder: TextEncoder, tally: Tally
) -> list[NDArray[np.uint32]]:
    """Encode a batch; a text that is too long to encode is counted, and has no ids."""
    place = plan.files[documents.file].place
    try:
        return encoder.encode(documents.texts)
    except IdsDifferError as error:
        offset = documents.offsets[error.index]
        raise SourceError(f"{place}: byte {offset}: {error}") from error
    except UncuttableTextError:
        pass
    encoded: list[NDArray[np.uint32]] = []
    for text, offset in zip(documents.texts, documents.offsets, strict=True):
        try:
            encoded += encoder.encode([text])
        except UncuttableTextError as error:
            logger.warning("%s: byte %d: left out: %s", place, offset, error)
            tally.skipped["uncuttable"] += 1
            tally.skipped["no_tokens"] -= 1  # which the caller counts for all that have none
            encoded.append(np.empty(0, dtype=np.uint32))
    return encoded


def choose_sides(
    texts: list[str], validation_fraction: float
) -> dict[SplitName, NDArray[np.bool_]]:
    """Say which documents go to each split, by their texts alone: equal texts stay together.

    A text is for validation where the first 64 bits of its SHA-256, as a share of their range,
    are below the fraction.
    """
    if not validation_fraction:
        return {"train": np.ones(len(texts), dtype=bool)}
    bound = int(validation_fraction * 2**64).to_bytes(8, "big")
    below = (sha256(text.encode()).digest()[:8] < bound for text in texts)
    validation = np.fromiter(below, dtype=bool, count=len(texts))
    return {"train": ~validation, "validation": validation}
