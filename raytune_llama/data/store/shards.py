"""Write the shards of a token store: Arrow files of documents, in bounded memory."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytune_llama.data.store.manifest import Shard
from raytune_llama.storage.files import temporary_sibling
from raytune_llama.storage.hashes import hash_file

_BATCH_TOKENS = 1 << 20  # bounds a writer's memory; a record batch may exceed it by one call's
_BATCH_DOCUMENTS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class EncodedDocuments:
    """Documents of one file as token ids, in parallel arrays."""

    file: int
    """Index of the source file."""
    ids: NDArray[np.integer]
    """Concatenated token ids of all documents."""
    lengths: NDArray[np.int64]
    """Number of tokens per document, at least 1."""
    num_bytes: NDArray[np.int64]
    """Size of each document's text in UTF-8 bytes."""
    offsets: NDArray[np.int64]
    """Offset of each document in the file: bytes, or rows for tables."""
    is_validation: NDArray[np.bool_]
    """Whether each document goes to the validation split."""
    targets: NDArray[np.bool_] | None = None
    """Loss mask over `ids`, true for targets; None: all are targets."""

    def filter(self, mask: NDArray[np.bool_]) -> "EncodedDocuments":
        """Return the documents for which `mask` is true; it has one value per document."""
        if mask.all():
            return self
        of_ids = np.repeat(mask, self.lengths)
        return EncodedDocuments(
            self.file,
            self.ids[of_ids],
            self.lengths[mask],
            self.num_bytes[mask],
            self.offsets[mask],
            self.is_validation[mask],
            None if self.targets is None else self.targets[of_ids],
        )


class ShardWriter:
    """Context manager that writes one shard; the file is renamed into place on success.

    Afterwards `shard` is its manifest entry, or None if no document, and so no file, was written.
    """

    def __init__(
        self,
        path: Path,
        dtype: Literal["uint16", "uint32"],
        *,
        source: int,
        bos_id: int | None = None,
        eos_id: int | None = None,
        has_targets: bool = False,
    ) -> None:
        """Prepare a shard; no file is created before the first documents are flushed.

        Args:
            path: Final path of the shard.
            dtype: Dtype of the ids.
            source: Index of the configured source of all documents.
            bos_id: Id to put before each document; None: no id.
            eos_id: Id to put after each document; None: no id.
            has_targets: Whether documents come with a loss mask.
        """
        self.shard: Shard | None = None
        self._path = path
        self._source = source
        self._temporary = temporary_sibling(path)
        self._dtype = np.dtype(dtype)
        self._ends = (bos_id, eos_id)
        self._has_targets = has_targets
        self._schema = _schema(dtype, has_targets=has_targets)
        self._sink: pa.OSFile | None = None
        self._writer: pa.RecordBatchFileWriter | None = None
        self._held: list[list[NDArray[Any]]] = []
        self._held_tokens = self._held_documents = 0
        self._documents = self._tokens = self._text_bytes = self._targets = 0

    def __enter__(self) -> Self:
        return self

    def write(self, ids: list[int], num_bytes: int, file: int, offset: int) -> None:
        """Append one document; see `write_documents`."""
        lengths, sizes, offsets = (np.array([v]) for v in (len(ids), num_bytes, offset))
        no = np.zeros(1, dtype=np.bool_)
        self.write_documents(EncodedDocuments(file, np.array(ids), lengths, sizes, offsets, no))

    def write_documents(self, documents: "EncodedDocuments") -> None:
        """Append documents of one file; `is_validation` is ignored."""
        if not len(documents.lengths):
            return
        ids, lengths, dtype = documents.ids, documents.lengths, self._dtype
        assert lengths.min() > 0, "a document without tokens cannot be found in the flat stream"
        assert ids.max() <= np.iinfo(dtype).max, "an id exceeds the dtype"
        assert (documents.targets is not None) == self._has_targets
        flat, longer = _with_ends(ids, lengths, *self._ends, dtype)
        columns = [flat, longer, documents.num_bytes]
        columns += [np.full(len(lengths), documents.file, dtype=np.int32), documents.offsets]
        if documents.targets is not None:
            assert self._ends == (None, None), "a loss mask does not cover BOS and EOS"
            columns.append(documents.targets.view(np.uint8))
        self._held.append(columns)
        self._held_tokens += len(flat)
        self._held_documents += len(lengths)
        if self._held_tokens >= _BATCH_TOKENS or self._held_documents >= _BATCH_DOCUMENTS:
            self._flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self._held:
            self._flush()
        if self._writer is None or self._sink is None:
            return
        if kind is not None:
            self._sink.close()
            self._temporary.unlink()
            return
        self._writer.close()
        self._sink.close()
        self.shard = Shard(
            name=self._path.name,
            source=self._source,
            hash=hash_file(self._temporary),
            file_bytes=self._temporary.stat().st_size,
            documents=self._documents,
            tokens=self._tokens,
            text_bytes=self._text_bytes,
            targets=self._targets if self._has_targets else None,
        )
        self._temporary.replace(self._path)

    def _flush(self) -> None:
        if self._writer is None:
            self._sink = pa.OSFile(str(self._temporary), "wb")
            self._writer = pa.ipc.new_file(self._sink, self._schema)
        columns = [
            column[0] if len(column) == 1 else np.concatenate(column)
            for column in zip(*self._held, strict=True)
        ]
        self._held = []
        flat, lengths, num_bytes, files, offsets = columns[:5]
        bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=bounds[1:])
        tokens = pa.LargeListArray.from_arrays(
            pa.array(bounds), pa.array(flat), type=self._schema.field("tokens").type
        )
        arrays = [tokens, pa.array(num_bytes), pa.array(files), pa.array(offsets)]
        if self._has_targets:
            mask, kind = pa.array(columns[5]), self._schema.field("targets").type
            arrays.append(pa.LargeListArray.from_arrays(pa.array(bounds), mask, type=kind))
            self._targets += int(columns[5].sum())
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._documents += len(lengths)
        self._tokens += len(flat)
        self._text_bytes += int(num_bytes.sum())
        self._held_tokens = self._held_documents = 0


def _with_ends(
    ids: NDArray[np.integer],
    lengths: NDArray[np.int64],
    bos_id: int | None,
    eos_id: int | None,
    dtype: np.dtype[np.unsignedinteger],
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
    """Add BOS and EOS, if given, to each document; return all ids and the new lengths."""
    before, after = int(bos_id is not None), int(eos_id is not None)
    if not before + after:
        return ids.astype(dtype, copy=False), lengths
    longer = lengths + before + after
    if len(lengths) == 1:  # a single document may be large
        result = np.empty(longer[0], dtype=dtype)
        result[:before], result[longer[0] - after :] = bos_id or 0, eos_id or 0
        result[before : before + lengths[0]] = ids
        return result, longer
    stops = np.cumsum(longer)
    is_end = np.zeros(stops[-1], dtype=bool)
    result = np.empty(stops[-1], dtype=dtype)
    if bos_id is not None:
        is_end[stops - longer] = True
        result[stops - longer] = bos_id
    if eos_id is not None:
        is_end[stops - 1] = True
        result[stops - 1] = eos_id
    result[~is_end] = ids
    return result, longer


def _schema(dtype: str, *, has_targets: bool) -> pa.Schema:
    ids = pa.large_list(pa.field("item", pa.type_for_alias(dtype), nullable=False))
    columns = {"tokens": ids, "num_bytes": pa.int64(), "source": pa.int32(), "offset": pa.int64()}
    if has_targets:  # one byte per token: Arrow's bit-packed booleans have no zero-copy view
        columns["targets"] = pa.large_list(pa.field("item", pa.uint8(), nullable=False))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])
