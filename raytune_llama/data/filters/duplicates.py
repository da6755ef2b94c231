"""Find the documents of a store that duplicate an earlier one, on Ray Data, in bounded memory.

    counts = find_duplicates(signatures, num_units, config, dropped)
    marks = read_dropped(dropped, unit)
    reason = marks.reason(ordinal)

Tasks exchange documents through files, in the steps of `duplicate_steps.py`; a task holds one chunk
or one partition, and the driver holds the plan and counts. Each file is a function of its inputs
alone, so that the result is the same for any number of workers, and a restarted job computes only
the missing files. (Ray Data's own keyed shuffle restarts from scratch after a crash, and calls a
function per group, or splits groups at block boundaries.) One thing is not bounded by
`ShuffleSizes`: one task holds an entire group of similar documents, about 100 bytes per document.
"""

import functools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, groupby
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pydantic
from numpy.typing import NDArray

from raytune_llama.data.filters.config import DuplicatesConfig
from raytune_llama.data.filters.duplicate_steps import (
    UNIT_BITS,
    Chunk,
    DeduplicationPlan,
    exact_duplicates,
    join_large,
    join_small,
    match_bands,
    match_texts,
    near_duplicates,
    run_step,
    send_bands,
    send_texts,
)
from raytune_llama.data.filters.shuffle import ShuffleRows, Uint64Array, upload_on_success
from raytune_llama.data.filters.signatures import HASH_BYTES, read_batch_layout, signature_file
from raytune_llama.data.filters.tasks import run_tasks
from raytune_llama.data.store.manifest import MANIFEST_NAME, StoreError, fingerprint_of
from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

DUPLICATE_REASONS: Final = ("exact_duplicate", "near_duplicate")
"""Why a document is dropped: an earlier document has the same text, or is similar."""

_NUM_THREADS = 32  # to open files: in object storage, each takes some round trips
_VERSION = 1  # of the intermediate files, which remain after a crash


@dataclass(frozen=True, kw_only=True)
class ShuffleSizes:
    """Sizes that bound the memory of a task; the result does not depend on them."""

    chunk_batches: int = 16
    """Record batches of signatures per chunk: 2**18 documents, which with 14 bands take 200 MB
    while they are sorted."""
    partition_rows: int = 1 << 22
    """Average number of hashes per partition; they take 200 MB while they are sorted."""


_DEFAULT_SIZES = ShuffleSizes()

TaskRunner = Callable[[str, Callable[[int], Mapping[str, int]], int, Place], Counter[str]]
"""`run_tasks` or an equivalent: name, task, number of tasks, folder for attempts."""


@dataclass(frozen=True, kw_only=True)
class DuplicateCounts:
    """Counts of a finished search for duplicates."""

    documents: int
    """Number of documents with a signature."""
    dropped: dict[str, int]
    """Number of dropped documents by reason."""


@dataclass(frozen=True)
class DroppedDocuments:
    """The dropped documents of a unit."""

    reason_codes: bytes
    """One code per document up to the last dropped one: 0, or 1 + the index of its reason."""

    def reason(self, ordinal: int) -> str | None:
        """Return why a document is dropped, or None if it is kept.

        Args:
            ordinal: Index of the document among those with signatures, from 0.
        """
        mark = self.reason_codes[ordinal] if ordinal < len(self.reason_codes) else 0
        return DUPLICATE_REASONS[mark - 1] if mark else None


def find_duplicates(
    signatures: Place,
    num_units: int,
    config: DuplicatesConfig,
    dropped: Place,
    *,
    num_workers: int | None = None,
    sizes: ShuffleSizes = _DEFAULT_SIZES,
) -> DuplicateCounts:
    """Find the documents to drop, and write a file of them per unit.

    Ray must be initialized. If the result for these signatures exists, only its counts are read.

    Args:
        signatures: Folder to which `write_signatures` has written the files of all units.
        num_units: Number of units.
        config: What to look for, the same as for the signatures.
        dropped: Dedicated folder on storage that all nodes share. Until the search is done, it also
            holds the intermediate files: 24 bytes per document, and 16 per document and band.
        num_workers: Concurrent tasks, with one CPU each; None: one per CPU of the cluster.
        sizes: Sizes that bound the memory of a task.

    Raises:
        StoreError: A signature file is missing or was made with other settings, a disk is full, or
            the process of a task died too often.
    """
    run = partial(run_tasks, num_workers=num_workers)
    return find_duplicates_with(run, signatures, num_units, config, dropped, sizes=sizes)


def find_duplicates_with(
    run: TaskRunner,
    signatures: Place,
    num_units: int,
    config: DuplicatesConfig,
    dropped: Place,
    *,
    sizes: ShuffleSizes = _DEFAULT_SIZES,
) -> DuplicateCounts:
    """Like `find_duplicates`, with any task runner, so that Ray is not required."""
    assert num_units > 0, "no documents to compare"
    statuses = _statuses(signatures, num_units)
    inputs = {"version": _VERSION, "duplicates": config.fingerprint_inputs, "sizes": asdict(sizes)}
    fingerprint = fingerprint_of({**inputs, "signatures": statuses})
    work = dropped / f"work-{fingerprint[:12]}"
    manifest = dropped / MANIFEST_NAME
    if manifest.exists() and (found := manifest.read_json())["fingerprint"] == fingerprint:
        work.delete()
        return pydantic.TypeAdapter(DuplicateCounts).validate_python(found["counts"])
    plan = _plan(signatures, work, config, [status[0] for status in statuses.values()], sizes)
    _prepare_folder(dropped, work)
    logger.info(
        "duplicates: %d units in %d chunks, %d partitions",
        num_units,
        len(plan.chunks),
        plan.num_partitions,
    )
    counts = _find(run, plan, dropped)
    manifest.write_json({"fingerprint": fingerprint, "inputs": inputs, "counts": asdict(counts)})
    work.delete()
    logger.info("duplicates: %d documents, dropped: %s", counts.documents, counts.dropped)
    return counts


def dropped_file(dropped: Place, unit: int) -> Place:
    """Return the path of the file with the dropped documents of a unit."""
    return dropped / f"{unit:05d}.arrow"


def read_dropped(dropped: Place, unit: int) -> DroppedDocuments:
    """Read which documents of a unit are dropped."""
    with dropped_file(dropped, unit).open() as source:
        table = pa.ipc.open_file(source).read_all()
    ordinals = table.column("ordinal").to_numpy()
    marks = np.zeros(int(ordinals[-1]) + 1 if len(ordinals) else 0, dtype=np.uint8)
    marks[ordinals] = table.column("reason").to_numpy() + 1
    return DroppedDocuments(marks.tobytes())


def _statuses(signatures: Place, num_units: int) -> dict[str, list[Any]]:
    """Return size and version of each signature file, in unit order."""
    found = {place.name: status for place, status in signatures.files().items()}
    names = [signature_file(signatures, unit).name for unit in range(num_units)]
    missing = [name for name in names if name not in found]
    if missing:
        raise StoreError(
            f"{signatures}: {len(missing)} of {num_units} signature files are missing, first "
            f"{missing[0]}; run again to write them"
        )
    return {name: [found[name].num_bytes, found[name].version] for name in names}


def _prepare_folder(dropped: Place, work: Place) -> None:
    """Prepare the folder: delete leftovers of other signatures, keep those of the current ones."""
    marker = work / "begun"
    if not marker.exists():
        for place in [*dropped.files(), *dropped.folders()]:
            if _OWN_NAMES.fullmatch(place.name):
                place.delete()
        marker.write_bytes(b"")
    # A new run resets the attempt counts.
    (work / "attempts").delete()


def _plan(
    signatures: Place,
    work: Place,
    config: DuplicatesConfig,
    file_bytes: Sequence[int],
    sizes: ShuffleSizes,
) -> DeduplicationPlan:
    """Split documents into chunks and hashes into partitions, from the headers of the files."""
    files = [signature_file(signatures, unit) for unit in range(len(file_bytes))]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        num_batches, batch_documents = zip(
            *threads.map(partial(read_batch_layout, config=config), files), strict=True
        )
    if len(set(batch_documents)) > 1:
        raise StoreError(
            f"{signatures}: the files differ in batch_documents; delete them and run again"
        )
    document_bytes = HASH_BYTES * config.exact + 8 * (config.near.bands if config.near else 0)
    num_documents = [
        min(batches * batch_documents[0], num_bytes // document_bytes)
        for batches, num_bytes in zip(num_batches, file_bytes, strict=True)
    ]
    num_hashes = sum(num_documents) * (config.near.bands if config.near else 1)
    return DeduplicationPlan(
        signatures=signatures,
        work=work,
        config=config,
        batch_documents=batch_documents[0],
        chunks=_chunks(num_documents, batch_documents[0], sizes.chunk_batches),
        num_partitions=num_hashes // sizes.partition_rows + 1,
    )


def _chunks(
    num_documents: Sequence[int], batch_documents: int, chunk_batches: int
) -> tuple[Chunk, ...]:
    """Group small units, and split large ones.

    Args:
        num_documents: Upper bound on the documents of each unit.
        batch_documents: Documents per record batch.
        chunk_batches: Record batches per chunk.
    """
    limit = chunk_batches * batch_documents
    chunks: list[Chunk] = []
    first, filled = 0, 0
    for unit, number in enumerate(num_documents):
        if unit > first and filled + number > limit:
            chunks.append(Chunk(first, unit, 0, chunk_batches))
            first, filled = unit, 0
        filled += number
        if number > limit:
            starts = range(0, -(-number // batch_documents), chunk_batches)
            chunks += [Chunk(unit, unit + 1, start, start + chunk_batches) for start in starts]
            first, filled = unit + 1, 0
    if first < len(num_documents):
        chunks.append(Chunk(first, len(num_documents), 0, chunk_batches))
    return tuple(chunks)


def _find(run: TaskRunner, plan: DeduplicationPlan, dropped: Place) -> DuplicateCounts:
    """Run all steps, one after the other."""
    counts: dict[str, Counter[str]] = {}
    attempts = plan.work / "attempts"

    def make(step: str, find: Callable[[DeduplicationPlan, int], ShuffleRows]) -> Counter[str]:
        make_file = partial(run_step, plan, step, find)
        counts[step] = run(step, make_file, plan.num_files(step), attempts)
        return counts[step]

    if plan.config.exact:
        make("texts/rows", send_texts)
        make("texts/matched", match_texts)
    last_step: str | None = None
    if plan.config.near:
        make("bands/rows", send_bands)
        make("bands/matched", match_bands)
        for number in count():
            last_step = f"pairs/{number}/small"
            if not make(last_step, partial(join_small, number=number))["branched"]:
                break
            make(f"pairs/{number}/large", partial(join_large, number=number))
    groups = _group_by_unit(plan.chunks)
    write = partial(_write_dropped, plan, dropped, last_step, groups)
    found = run("dropped", write, len(groups), attempts)
    return DuplicateCounts(
        documents=next(iter(counts.values()))["documents"],
        dropped={reason: found[reason] for reason in DUPLICATE_REASONS},
    )


def _group_by_unit(chunks: Sequence[Chunk]) -> list[list[int]]:
    """Group the chunks that are parts of one unit, so that one task writes the unit's file."""
    places = groupby(range(len(chunks)), key=lambda index: chunks[index].first_unit)
    return [list(group) for _, group in places]


def _write_dropped(
    plan: DeduplicationPlan,
    dropped: Place,
    last_step: str | None,
    groups: list[list[int]],
    index: int,
) -> dict[str, int]:
    """Write the files of the units in one group of chunks."""
    chunks = [plan.chunks[chunk] for chunk in groups[index]]
    counts: Counter[str] = Counter()
    # Many units in one chunk, or one unit in many chunks: each chunk is read once.
    marked = functools.lru_cache(maxsize=1)(partial(_marked, plan, last_step))
    for unit in range(chunks[0].first_unit, chunks[0].stop_unit):
        file = dropped_file(dropped, unit)
        with upload_on_success(file) as path, pa.ipc.new_file(str(path), _DROPPED_SCHEMA) as writer:
            for chunk in groups[index]:
                documents, marks = marked(chunk)
                start, stop = np.searchsorted(
                    documents, np.array([unit, unit + 1], np.uint64) << UNIT_BITS
                )
                ordinals = documents[start:stop] & ((1 << UNIT_BITS) - 1)
                columns = [pa.array(ordinals.astype(np.int64)), pa.array(marks[start:stop])]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_DROPPED_SCHEMA))
                totals = np.bincount(marks[start:stop], minlength=len(DUPLICATE_REASONS))
                counts.update(dict(zip(DUPLICATE_REASONS, totals.tolist(), strict=True)))
    return dict(counts)


def _marked(
    plan: DeduplicationPlan, last_step: str | None, chunk: int
) -> tuple[Uint64Array, NDArray[np.uint8]]:
    """Return the dropped documents of a chunk, ascending, and the index of each one's reason."""
    exact = exact_duplicates(plan, chunk)
    near = near_duplicates(plan, chunk, last_step)
    documents = np.concatenate([exact, near])
    order = np.argsort(documents)
    return documents[order], (order >= len(exact)).astype(np.uint8)


_DROPPED_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("reason", pa.uint8(), nullable=False),
    ],
    metadata={"reasons": json.dumps(DUPLICATE_REASONS)},
)

_OWN_NAMES = re.compile(r"work-[0-9a-f]{12}|\d{5,}\.arrow|" + re.escape(MANIFEST_NAME))
