"""Deduplication pass: mark duplicate documents before the encoding pass, which drops them.

    counts = mark_duplicates(units, plan, read_texts, num_workers)
    kept = DuplicateFilter(unit, plan).keep(documents, tally)

This pass reads and cleans each unit exactly as the encoding pass will, but keeps only signatures,
16 to about 130 bytes per document. Reading twice costs less than encoding documents that are then
dropped, or than copying the corpus. Contents of `BuildPlan.duplicates_dir`:

    signatures/00000.arrow   signatures of a unit's documents
    signed/00000.json        key of the unit and its files' state that the signatures belong to
    dropped/00000.arrow      documents of the unit that are dropped

As with units, complete outputs of an earlier run are reused.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from raytune_llama.data.build.unit_reader import DocumentBatch, Tally, read_unit_documents
from raytune_llama.data.build.units import BuildPlan, UnitStoppedError, WorkUnit
from raytune_llama.data.filters.cleaning import Cleaner
from raytune_llama.data.filters.duplicates import (
    DuplicateCounts,
    dropped_file,
    find_duplicates,
    read_dropped,
)
from raytune_llama.data.filters.signatures import signature_file, write_signatures
from raytune_llama.data.filters.tasks import run_tasks
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import StoreError, fingerprint_of
from raytune_llama.storage.hashes import hash_bytes
from raytune_llama.storage.place import Place

TextReader = Callable[[WorkUnit, BuildPlan], Iterator[list[str]]]
"""Picklable function that streams the texts of a unit's documents, in order."""


def mark_duplicates(
    units: list[WorkUnit], plan: BuildPlan, read_texts: TextReader, num_workers: int | None
) -> DuplicateCounts | None:
    """Find the duplicate documents for `DuplicateFilter`; Ray must be initialized.

    Args:
        units: All units.
        plan: Build plan shared by all units; its work directory belongs to this job alone.
        read_texts: Reads the texts of a unit's documents as the encoding pass will.
        num_workers: Maximum number of concurrent tasks, one CPU each; None: one per CPU of the
            cluster.

    Returns:
        Counts of the duplicates found; None if deduplication is off.

    Raises:
        SourceError: A file cannot be read as configured, a disk is full, or a task crashed its
            process too often; lists the problems of all tasks.
    """
    if not plan.has_deduplication:
        return None
    folder = plan.duplicates_dir
    attempts = folder / "attempts"
    attempts.delete()  # attempts are counted per run
    try:
        sign = partial(_sign_unit, units, plan, read_texts)
        run_tasks("signatures", sign, len(units), attempts, num_workers=num_workers)
        return find_duplicates(
            _signatures(plan),
            len(units),
            plan.duplicates_config,
            _dropped(plan),
            num_workers=num_workers,
        )
    except StoreError as error:
        raise SourceError(str(error)) from error


class DuplicateFilter:
    """Filter that drops duplicates from a unit's documents, which must be passed in order."""

    def __init__(self, unit: WorkUnit, plan: BuildPlan) -> None:
        is_on = plan.has_deduplication
        self._dropped = read_dropped(_dropped(plan), unit.index) if is_on else None
        self._num_seen = 0

    def keep(self, documents: DocumentBatch, tally: Tally) -> DocumentBatch:
        """Return the documents to keep, counting dropped ones by reason in `tally`."""
        return documents.filter(self.mask(len(documents.texts), tally))

    def mask(self, num_documents: int, tally: Tally) -> list[bool]:
        """Return which of the next documents to keep, counting dropped ones as `keep` does."""
        if self._dropped is None:
            return [True] * num_documents
        first, self._num_seen = self._num_seen, self._num_seen + num_documents
        reasons = [self._dropped.reason(ordinal) for ordinal in range(first, self._num_seen)]
        tally.skipped.update(reason for reason in reasons if reason is not None)
        return [reason is None for reason in reasons]


def work_key(unit: WorkUnit, plan: BuildPlan) -> str:
    """Return a key of everything a unit's output depends on: its files and its dropped documents.

    A change in an earlier file may add or remove duplicates in this unit.
    """
    if not plan.has_deduplication:
        return unit.key
    data = dropped_file(_dropped(plan), unit.index).read_bytes()
    return fingerprint_of({"unit": unit.key, "dropped": hash_bytes(data)})


def _signatures(plan: BuildPlan) -> Place:
    return plan.duplicates_dir / "signatures"


def _dropped(plan: BuildPlan) -> Place:
    return plan.duplicates_dir / "dropped"


def _sign_unit(
    units: list[WorkUnit], plan: BuildPlan, read_texts: TextReader, index: int
) -> Mapping[str, int]:
    """Write the signatures of a unit, or reuse those of an earlier run."""
    unit = units[index]
    file = signature_file(_signatures(plan), unit.index)
    record = plan.duplicates_dir / "signed" / f"{unit.index:05d}.json"
    status = file.status()
    if status is not None and record.exists():
        found = record.read_json()
        if (found["key"], found["file_bytes"]) == (unit.key, status.num_bytes):
            return Counter(documents=found["documents"], bytes=unit.num_bytes, reused_units=1)
    try:
        texts = _until_stopped(read_texts(unit, plan), plan)
        num_documents = write_signatures(file.parent, unit.index, texts, plan.duplicates_config)
    except UnitStoppedError:
        return {}
    except SourceError:
        plan.stop_file.write_bytes(b"")
        raise
    status = file.status()
    assert status is not None, "an upload has no file"
    record.write_json({"key": unit.key, "file_bytes": status.num_bytes, "documents": num_documents})
    return Counter(documents=num_documents, bytes=unit.num_bytes)


def read_unit_texts(unit: WorkUnit, plan: BuildPlan) -> Iterator[list[str]]:
    """Stream the cleaned texts of a unit of plain-text documents; a `TextReader`.

    Raises:
        SourceError: As in `read_unit_documents`.
    """
    # The encoding pass quarantines bad rows and fails if there are too many.
    for documents in read_unit_documents(unit, plan.files, Tally(), None, Cleaner(plan.cleaning)):
        yield documents.texts


def _until_stopped(texts: Iterator[list[str]], plan: BuildPlan) -> Iterator[list[str]]:
    for batch in texts:
        if plan.stop_file.exists():
            raise UnitStoppedError
        yield batch
