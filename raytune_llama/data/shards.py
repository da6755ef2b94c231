"""Write the shards of a token store: Arrow files of documents, in bounded memory."""

from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytune_llama.data.manifest import Shard
from raytune_llama.files import sha256_file, temporary_sibling

_BATCH_TOKENS = 1 << 20  # bounds a writer's memory; a record batch may exceed it by one call's
_BATCH_DOCUMENTS = 1 << 16


class ShardWriter:
    """Write documents to one shard; the file appears under its name when the block succeeds.

    `shard` is its entry for the manifest afterwards, or None when there was no document: then no
    file is written.
    """

    def __init__(
        self,
        path: Path,
        dtype: Literal["uint16", "uint32"],
        *,
        source: int,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> None:
        """Begin a shard; no file is made before there is a document.

        Args:
            path: Where it appears.
            dtype: Type of its ids.
            source: Index of the configured source that all documents are from.
            bos_id: Put before each document, if given.
            eos_id: Put behind each document, if given.
        """
        self.shard: Shard | None = None
        self._path = path
        self._source = source
        self._temporary = temporary_sibling(path)
        self._dtype = np.dtype(dtype)
        self._ends = (bos_id, eos_id)
        self._schema = _schema(dtype)
        self._sink: pa.OSFile | None = None
        self._writer: pa.RecordBatchFileWriter | None = None
        self._held: list[_Documents] = []
        self._held_tokens = self._held_documents = 0
        self._documents = self._tokens = self._text_bytes = 0

    def __enter__(self) -> Self:
        return self

    def write(self, ids: list[int], num_bytes: int, file: int, offset: int) -> None:
        """Append one document; see `write_documents`."""
        one = [np.array([value]) for value in (len(ids), num_bytes, offset)]
        self.write_documents(np.array(ids), one[0], one[1], file, one[2])

    def write_documents(
        self,
        ids: NDArray[np.integer],
        lengths: NDArray[np.int64],
        num_bytes: NDArray[np.int64],
        file: int,
        offsets: NDArray[np.int64],
    ) -> None:
        """Append documents of one file.

        Args:
            ids: Their token ids one after the other.
            lengths: How many each has, at least one.
            num_bytes: UTF-8 bytes of each one's text.
            file: Index of the source file.
            offsets: Where each starts in that file.
        """
        if not len(lengths):
            return
        assert lengths.min() > 0, "a document without tokens cannot be found in the flat stream"
        assert ids.max() <= np.iinfo(self._dtype).max, "an id is beyond the vocabulary"
        flat, lengths = _with_ends(ids, lengths, *self._ends, self._dtype)
        files = np.full(len(lengths), file, dtype=np.int32)
        self._held.append((flat, lengths, num_bytes, files, offsets))
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
            sha256=sha256_file(self._temporary),
            file_bytes=self._temporary.stat().st_size,
            documents=self._documents,
            tokens=self._tokens,
            text_bytes=self._text_bytes,
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
        flat, lengths, num_bytes, files, offsets = columns
        bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=bounds[1:])
        tokens = pa.LargeListArray.from_arrays(
            pa.array(bounds), pa.array(flat), type=self._schema.field("tokens").type
        )
        arrays = [tokens, pa.array(num_bytes), pa.array(files), pa.array(offsets)]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._documents += len(lengths)
        self._tokens += len(flat)
        self._text_bytes += int(num_bytes.sum())
        self._held_tokens = self._held_documents = 0


_Documents = tuple[
    NDArray[np.unsignedinteger],
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.int32],
    NDArray[np.int64],
]


def _with_ends(
    ids: NDArray[np.integer],
    lengths: NDArray[np.int64],
    bos_id: int | None,
    eos_id: int | None,
    dtype: np.dtype[np.unsignedinteger],
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
    """Put an id before and behind each document; return all ids and the new lengths."""
    before, behind = int(bos_id is not None), int(eos_id is not None)
    if not before + behind:
        return ids.astype(dtype, copy=False), lengths
    longer = lengths + before + behind
    if len(lengths) == 1:  # it may be large
        result = np.empty(longer[0], dtype=dtype)
        result[:before], result[longer[0] - behind :] = bos_id or 0, eos_id or 0
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


def _schema(dtype: str) -> pa.Schema:
    ids = pa.large_list(pa.field("item", pa.type_for_alias(dtype), nullable=False))
    columns = {"tokens": ids, "num_bytes": pa.int64(), "source": pa.int32(), "offset": pa.int64()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])
