"""Steps of the search for duplicates: a task reads files of earlier steps and writes one.

A document's id is `unit << 32 | its index in the unit`, so that ids are in source order. The
signature files are split into chunks of documents, and equal hashes are sent to one partition:

    texts/rows     per chunk       hashes of its texts, for each partition of hashes
    texts/matched  per partition   documents with the text of an earlier one, for each chunk
    bands/rows     per chunk       hashes of its bands, for each partition of hashes
    bands/matched  per partition   similar pairs, for each chunk
    pairs/N/small, pairs/N/large  per chunk   round N of joining pairs to groups

A file has a range of rows per reader (`shuffle.py`). A chunk resolves what it can alone, and sends
only the first document of each hash: a hash that all documents share arrives once per chunk.

Pairs (later, earlier) are joined by small-star and large-star steps (Kiveris et al., Connected
Components in MapReduce and Beyond, SoCC 2014), until each document is the later one of at most one
pair. A step outputs no more pairs than it reads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytune_llama.data.filters.config import DuplicatesConfig
from raytune_llama.data.filters.shuffle import (
    ShuffleRows,
    Uint64Array,
    read_shuffle_rows,
    write_shuffle_rows,
)
from raytune_llama.data.filters.signatures import signature_file, signature_schema
from raytune_llama.storage.place import Place

UNIT_BITS = 32
"""Bits of a document's id that are its index in the unit."""


@dataclass(frozen=True)
class Chunk:
    """A range of documents that one task reads: several units, or a part of one."""

    first_unit: int
    """First unit."""
    stop_unit: int
    """End of the units, exclusive."""
    first_batch: int
    """First record batch to read from each unit."""
    stop_batch: int
    """End of the record batches, exclusive; a unit may have fewer."""


@dataclass(frozen=True, kw_only=True)
class DeduplicationPlan:
    """Plan of a search for duplicates, shared by all its tasks."""

    signatures: Place
    """Folder of the signature files."""
    work: Place
    """Folder of the files of the steps."""
    config: DuplicatesConfig
    """What to look for."""
    batch_documents: int
    """Rows of every record batch of a signature file but its last."""
    chunks: tuple[Chunk, ...]
    """Chunks in source order; every document is in exactly one."""
    num_partitions: int
    """Number of partitions of hashes."""

    def file(self, step: str, index: int) -> Place:
        """Return the path of the file that a step writes for a chunk or partition."""
        return self.work / f"{step}/{index:06d}.rows"

    def num_files(self, step: str) -> int:
        """Return the number of files that a step writes."""
        return self.num_partitions if step.endswith("matched") else len(self.chunks)

    def read_all(self, step: str, reader: int, num_columns: int) -> tuple[Uint64Array, ...]:
        """Read the rows for a partition or chunk from all files of a step."""
        files = [self.file(step, index) for index in range(self.num_files(step))]
        return read_shuffle_rows(files, reader, self._num_readers(step), num_columns)

    def read_own(self, step: str, index: int, num_columns: int) -> tuple[Uint64Array, ...]:
        """Read the rows that a chunk has resolved alone, those of the last reader of its file."""
        num_readers = self._num_readers(step)
        return read_shuffle_rows(
            [self.file(step, index)], num_readers - 1, num_readers, num_columns
        )

    def _num_readers(self, step: str) -> int:
        return self.num_partitions + 1 if step.endswith("rows") else len(self.chunks)

    def chunk_of(self, documents: Uint64Array) -> NDArray[np.int64]:
        """Return the chunk of each document."""
        firsts = [
            (chunk.first_unit << UNIT_BITS) + chunk.first_batch * self.batch_documents
            for chunk in self.chunks
        ]
        return np.searchsorted(np.array(firsts, np.uint64), documents, side="right") - 1

    def partition_of(self, hashes: Uint64Array) -> NDArray[np.int64]:
        """Return the partition of each hash, by its high bits."""
        return (((hashes >> 32) * np.uint64(self.num_partitions)) >> 32).astype(np.int64)


def send_texts(plan: DeduplicationPlan, index: int) -> ShuffleRows:
    """Send the text hashes of a chunk to their partitions, each hash once.

    The last reader is the chunk itself, for documents whose text occurred earlier in the chunk.
    """
    documents, hashes = _read_chunk(plan, index, "hash")
    order, is_repeated = _repeated((hashes[:, 0], hashes[:, 1]))
    documents, hashes = documents[order], hashes[order]
    reader = np.where(is_repeated, plan.num_partitions, plan.partition_of(hashes[:, 0]))
    counts = {"documents": len(documents), "exact_duplicates": int(is_repeated.sum())}
    columns = (documents, hashes[:, 0], hashes[:, 1])
    return ShuffleRows(columns, reader, plan.num_partitions + 1, counts)


def match_texts(plan: DeduplicationPlan, index: int) -> ShuffleRows:
    """Find the documents of a partition whose text occurred in an earlier chunk."""
    documents, high, low = plan.read_all("texts/rows", index, 3)
    # The files are in source order, and so are the documents of a hash, as sorting is stable.
    order, is_repeated = _repeated((high, low))
    later = np.sort(documents[order][is_repeated])
    counts = {"exact_duplicates": len(later)}
    return ShuffleRows((later,), plan.chunk_of(later), len(plan.chunks), counts)


def exact_duplicates(plan: DeduplicationPlan, index: int) -> Uint64Array:
    """Return the documents of a chunk whose text occurred before, ascending."""
    if not plan.config.exact:
        return np.empty(0, dtype=np.uint64)
    own = plan.read_own("texts/rows", index, 3)[0]
    (sent,) = plan.read_all("texts/matched", index, 1)
    return np.sort(np.concatenate([own, sent]))


def send_bands(plan: DeduplicationPlan, index: int) -> ShuffleRows:
    """Send the band hashes of a chunk to their partitions, each hash once.

    Exact duplicates are skipped: they follow the first document of their text. The last reader is
    the chunk itself, for the pairs that it has found.
    """
    documents, bands = _read_chunk(plan, index, "bands")
    num_documents = len(documents)
    is_left = ~np.isin(documents, exact_duplicates(plan, index), assume_unique=True)
    documents, bands = documents[is_left], bands[is_left]
    sent: list[tuple[Uint64Array, Uint64Array]] = []
    pairs: list[tuple[Uint64Array, Uint64Array]] = []
    for hashes in bands.T:
        order, is_repeated = _repeated((hashes,))
        sent.append((documents[order][~is_repeated], hashes[order][~is_repeated]))
        pairs.append(_pairs(documents[order], is_repeated))
    later, earlier = join_pairs(*map(np.concatenate, zip(*pairs, strict=True)))
    documents, hashes = map(np.concatenate, zip(*sent, strict=True))
    readers = [plan.partition_of(hashes), np.full(len(later), plan.num_partitions)]
    columns = (np.concatenate([documents, later]), np.concatenate([hashes, earlier]))
    counts = {"documents": num_documents, "pairs": len(later)}
    return ShuffleRows(columns, np.concatenate(readers), plan.num_partitions + 1, counts)


def match_bands(plan: DeduplicationPlan, index: int) -> ShuffleRows:
    """Find the pairs of documents that share a band in a partition."""
    documents, hashes = plan.read_all("bands/rows", index, 2)
    order, is_repeated = _repeated((hashes,))
    later, earlier = join_pairs(*_pairs(documents[order], is_repeated))
    counts = {"pairs": len(later)}
    return ShuffleRows((later, earlier), plan.chunk_of(later), len(plan.chunks), counts)


def join_small(plan: DeduplicationPlan, index: int, *, number: int) -> ShuffleRows:
    """Join the pairs whose later document is in a chunk, and send each pair to both documents.

    `branched` counts the documents with more than one earlier neighbor. If there are none, each
    group is a tree, and its root the only document that is not the later one of a pair.
    """
    if number == 0:
        own = plan.read_own("bands/rows", index, 2)
        sent = plan.read_all("bands/matched", index, 2)
        later, earlier = map(np.concatenate, zip(own, sent, strict=True))
    else:
        later, earlier = plan.read_all(f"pairs/{number - 1}/large", index, 2)
    later, earlier = _distinct(later, earlier)
    counts = {"branched": len(later) - int(_is_first(later).sum())}
    later, earlier = join_pairs(later, earlier)
    nodes = np.concatenate([later, earlier])
    neighbors = np.concatenate([earlier, later])
    return ShuffleRows((nodes, neighbors), plan.chunk_of(nodes), len(plan.chunks), counts)


def join_large(plan: DeduplicationPlan, index: int, *, number: int) -> ShuffleRows:
    """Link the later neighbors of each document of a chunk to its earliest one."""
    nodes, neighbors = plan.read_all(f"pairs/{number}/small", index, 2)
    later, earlier = _large_star(nodes, neighbors)
    counts = {"pairs": len(later)}
    return ShuffleRows((later, earlier), plan.chunk_of(later), len(plan.chunks), counts)


def near_duplicates(plan: DeduplicationPlan, index: int, last_step: str | None) -> Uint64Array:
    """Return the documents of a chunk that are similar to an earlier one, ascending.

    Args:
        plan: Plan of the search.
        index: Index of the chunk.
        last_step: The last small step, which found no branch; None: near duplicates are off.
    """
    if last_step is None:
        return np.empty(0, dtype=np.uint64)
    nodes, neighbors = plan.read_all(last_step, index, 2)
    return np.unique(nodes[nodes > neighbors])


def join_pairs(later: Uint64Array, earlier: Uint64Array) -> tuple[Uint64Array, Uint64Array]:
    """Link each document of some pairs to the first of its group, and only to that.

    Args:
        later: [P] Later document of each pair.
        earlier: [P] Earlier document of each pair.

    Returns:
        Distinct pairs, ascending.
    """
    later, earlier = _distinct(later, earlier)
    while True:
        before = later, earlier
        later, earlier = _small_star(later, earlier)
        nodes, neighbors = np.concatenate([later, earlier]), np.concatenate([earlier, later])
        later, earlier = _distinct(*_large_star(nodes, neighbors))
        if all(map(np.array_equal, before, (later, earlier))):
            return later, earlier


def run_step(
    plan: DeduplicationPlan,
    step: str,
    find: Callable[[DeduplicationPlan, int], ShuffleRows],
    index: int,
) -> dict[str, int]:
    """Write one file of a step unless it exists; its bytes depend only on its inputs.

    Returns:
        The counts of the file.
    """
    return write_shuffle_rows(plan.file(step, index), partial(find, plan, index))


def _read_chunk(
    plan: DeduplicationPlan, index: int, column: str
) -> tuple[Uint64Array, Uint64Array]:
    """Return the documents of a chunk, [D], and the 64-bit integers of a column, [D, N]."""
    chunk = plan.chunks[index]
    schema = signature_schema(plan.config)
    place = schema.get_field_index(column)
    kind = schema.field(column).type
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else kind.byte_width // 8
    options = pa.ipc.IpcReadOptions(included_fields=[place])
    documents = [np.empty(0, dtype=np.uint64)]
    numbers = [np.empty((0, width), dtype=np.uint64)]
    for unit in range(chunk.first_unit, chunk.stop_unit):
        with signature_file(plan.signatures, unit).open() as source:
            reader = pa.ipc.open_file(source, options=options)
            stop = min(chunk.stop_batch, reader.num_record_batches)
            batches = [reader.get_batch(number) for number in range(chunk.first_batch, stop)]
        first = (unit << UNIT_BITS) + chunk.first_batch * plan.batch_documents
        num_rows = sum(batch.num_rows for batch in batches)
        documents.append(np.arange(first, first + num_rows, dtype=np.uint64))
        numbers += [_as_numbers(batch.column(0), width) for batch in batches]
    return np.concatenate(documents), np.concatenate(numbers)


def _as_numbers(column: pa.Array, width: int) -> Uint64Array:
    """View values of fixed size as `width` 64-bit integers each, [D, N]."""
    if isinstance(column, pa.FixedSizeListArray):
        return column.flatten().to_numpy().reshape(-1, width)
    data = np.frombuffer(column.buffers()[1], dtype=np.uint64)
    return data.reshape(-1, width)[column.offset :][: len(column)]


def _repeated(keys: tuple[Uint64Array, ...]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Sort rows by their keys (stable), and mark all but the first of equal ones."""
    order = np.lexsort(keys)
    is_repeated = np.zeros(len(order), dtype=np.bool_)
    is_repeated[1:] = True
    for key in keys:
        values = key[order]
        is_repeated[1:] &= values[1:] == values[:-1]
    return order, is_repeated


def _pairs(
    documents: Uint64Array, is_repeated: NDArray[np.bool_]
) -> tuple[Uint64Array, Uint64Array]:
    """Pair each repeated document with the last one before it that is not repeated."""
    firsts = documents[~is_repeated]
    places = np.cumsum(~is_repeated) - 1
    return documents[is_repeated], firsts[places[is_repeated]]


def _distinct(later: Uint64Array, earlier: Uint64Array) -> tuple[Uint64Array, Uint64Array]:
    order, is_repeated = _repeated((earlier, later))
    order = order[~is_repeated]
    return later[order], earlier[order]


def _is_first(values: Uint64Array) -> NDArray[np.bool_]:
    """Mark the first of each run of equal values."""
    is_first = np.ones(len(values), dtype=np.bool_)
    is_first[1:] = values[1:] != values[:-1]
    return is_first


def _small_star(later: Uint64Array, earlier: Uint64Array) -> tuple[Uint64Array, Uint64Array]:
    """Link each document and its earlier neighbors to the earliest of them; needs sorted pairs."""
    is_first = _is_first(later)
    least = earlier[is_first][np.cumsum(is_first) - 1]
    rest = ~is_first
    return (
        np.concatenate([later[is_first], earlier[rest]]),
        np.concatenate([earlier[is_first], least[rest]]),
    )


def _large_star(nodes: Uint64Array, neighbors: Uint64Array) -> tuple[Uint64Array, Uint64Array]:
    """Link the later neighbors of each node to the earliest of it and its neighbors."""
    order = np.argsort(nodes, kind="stable")
    nodes, neighbors = nodes[order], neighbors[order]
    is_first = _is_first(nodes)
    starts = np.flatnonzero(is_first)
    least = np.minimum(nodes[starts], np.minimum.reduceat(neighbors, starts))
    is_later = neighbors > nodes
    return neighbors[is_later], least[np.cumsum(is_first) - 1][is_later]
