"""Duplicates left out of a store: one more pass over the corpus, before the one that encodes.

    counts = mark_duplicates(units, plan, num_workers)
    kept = DuplicateFilter(unit, plan).keep(documents, tally)

The first pass reads and cleans each unit as the second one will, and keeps no text, but signatures
of 16 to some 130 bytes a document. Reading twice costs less than an encoding that is thrown away,
and than a copy of the corpus. What lies in `BuildPlan.duplicates_dir`:

    signatures/00000.arrow   the signatures of a unit
    signed/00000.json        which unit, and which state of its files, they are of
    dropped/00000.arrow      which of its documents are left out

As with units, what is there and whole is not made again.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
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
from raytune_llama.storage.place import Place


def mark_duplicates(
    units: list[WorkUnit], plan: BuildPlan, num_workers: int | None
) -> DuplicateCounts | None:
    """Find the documents that are left out, for `DuplicateFilter`; Ray must be initialised.

    Args:
        units: All units.
        plan: What they have in common; `plan.work` is this job's alone.
        num_workers: Tasks at a time, a CPU each; None: as many as the cluster has CPUs.

    Returns:
        What was found; None where no duplicates are looked for.

    Raises:
        SourceError: A file cannot be read as configured, a disk is full, or a task ended its
            process too often; the problems of all tasks.
    """
    if not plan.has_deduplication:
        return None
    folder = plan.duplicates_dir
    attempts = folder / "attempts"
    attempts.delete()  # a new run is a new chance
    try:
        sign = partial(_sign_unit, units, plan)
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
    """Takes the documents of a unit, in their order, without those that are duplicates."""

    def __init__(self, unit: WorkUnit, plan: BuildPlan) -> None:
        is_on = plan.has_deduplication
        self._dropped = read_dropped(_dropped(plan), unit.index) if is_on else None
        self._num_seen = 0

    def keep(self, documents: DocumentBatch, tally: Tally) -> DocumentBatch:
        """Return the documents that are kept; the others are counted by reason."""
        if self._dropped is None:
            return documents
        first, self._num_seen = self._num_seen, self._num_seen + len(documents.texts)
        reasons = [self._dropped.reason(ordinal) for ordinal in range(first, self._num_seen)]
        tally.skipped.update(reason for reason in reasons if reason is not None)
        return documents.filter([reason is None for reason in reasons])


def work_key(unit: WorkUnit, plan: BuildPlan) -> str:
    """Identify what a unit becomes: its files' state, and which of its documents are left out.

    An earlier file that has changed may bring back, or take away, documents of this one.
    """
    if not plan.has_deduplication:
        return unit.key
    data = dropped_file(_dropped(plan), unit.index).read_bytes()
    return fingerprint_of({"unit": unit.key, "dropped": hashlib.sha256(data).hexdigest()})


def _signatures(plan: BuildPlan) -> Place:
    return plan.duplicates_dir / "signatures"


def _dropped(plan: BuildPlan) -> Place:
    return plan.duplicates_dir / "dropped"


def _sign_unit(units: list[WorkUnit], plan: BuildPlan, index: int) -> Mapping[str, int]:
    """Write the signatures of a unit, unless they are there."""
    unit = units[index]
    file = signature_file(_signatures(plan), unit.index)
    record = plan.duplicates_dir / "signed" / f"{unit.index:05d}.json"
    status = file.status()
    if status is not None and record.exists():
        found = record.read_json()
        if (found["key"], found["file_bytes"]) == (unit.key, status.num_bytes):
            return Counter(documents=found["documents"], bytes=unit.num_bytes, reused_units=1)
    try:
        texts = _texts(unit, plan)
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


def _texts(unit: WorkUnit, plan: BuildPlan) -> Iterator[list[str]]:
    # Bad rows are for the pass that encodes to write down, and to refuse.
    for documents in read_unit_documents(unit, plan.files, Tally(), None, Cleaner(plan.cleaning)):
        if plan.stop_file.exists():
            raise UnitStoppedError
        yield documents.texts
