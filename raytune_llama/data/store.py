"""The token store: a directory of memory-mapped Arrow shards and a manifest that proves them.

    store = TokenStore.open(Place.parse("s3://bucket/stores/demo", "data.store_dir"))
    train = store.split("train")
    ids = train.tokens(0, 1024)

A store on a local disk is mapped where it is. Of one in object storage, a split's shards are
copied to a folder of the node when it is first read, and mapped there.

A shard is an Arrow IPC file with one row a document: its token ids, the bytes of its text, the
index of its source file and its offset there. The rows of a split, shard after shard, are the
documents in source order; their ids one after the other are the split's flat token stream.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytune_llama.data.copies import local_shards
from raytune_llama.data.manifest import (
    MANIFEST_NAME,
    REBUILD,
    Manifest,
    Shard,
    SplitManifest,
    SplitName,
    StoreError,
    read_manifest,
)
from raytune_llama.files import sha256_file, temporary_sibling
from raytune_llama.storage import FileStatus, Place

Ids = NDArray[np.unsignedinteger] | list[int]
"""Token ids of a document."""

_BATCH_TOKENS = 1 << 20  # bounds a writer's memory; a batch may exceed it by one document
_BATCH_DOCUMENTS = 1 << 16


class ShardWriter:
    """Write documents to one shard; the file appears under its name when the block succeeds.

    `source` is the configured source that all of them are from.
    `shard` is its entry for the manifest afterwards, or None when there was no document: then no
    file is written. Memory stays bounded by one record batch.
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
        self.shard: Shard | None = None
        self._path = path
        self._source = source
        self._temporary = temporary_sibling(path)
        self._dtype = np.dtype(dtype)
        self._schema = _schema(dtype)
        self._sink: pa.OSFile | None = None
        self._writer: pa.RecordBatchFileWriter | None = None
        self._before = np.array([] if bos_id is None else [bos_id], dtype=self._dtype)
        self._behind = np.array([] if eos_id is None else [eos_id], dtype=self._dtype)
        self._rows: list[tuple[NDArray[np.unsignedinteger], int, int, int]] = []
        self._pending_tokens = 0
        self._documents = self._tokens = self._text_bytes = 0

    def __enter__(self) -> Self:
        return self

    def write(self, ids: Ids, num_bytes: int, source: int, offset: int) -> None:
        """Append a document; `bos_id` and `eos_id` are put around it.

        Args:
            ids: Its token ids, at least one.
            num_bytes: UTF-8 bytes of its text.
            source: Index of its source file.
            offset: Where it starts in that file.
        """
        assert len(ids), "a document without tokens cannot be found in the flat stream"
        if isinstance(ids, list):
            ids = np.array(ids, dtype=self._dtype)
        self._rows.append((ids, num_bytes, source, offset))
        self._pending_tokens += len(ids) + len(self._before) + len(self._behind)
        if self._pending_tokens >= _BATCH_TOKENS or len(self._rows) >= _BATCH_DOCUMENTS:
            self._flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None and self._rows:
            self._flush()
        if self._writer is None or self._sink is None:
            return
        self._writer.close()
        self._sink.close()
        if kind is not None:
            self._temporary.unlink()
            return
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
        ids, num_bytes, source, offset = zip(*self._rows, strict=True)
        around = len(self._before) + len(self._behind)
        lengths = [len(one) + around for one in ids]
        pieces = chain.from_iterable((self._before, one, self._behind) for one in ids)
        flat = np.concatenate(list(pieces))
        assert flat.max() <= np.iinfo(self._dtype).max, "an id is beyond the vocabulary"
        flat = flat.astype(self._dtype, copy=False)
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        tokens = pa.LargeListArray.from_arrays(
            pa.array(offsets), pa.array(flat), type=self._schema.field("tokens").type
        )
        columns = [tokens, pa.array(num_bytes, pa.int64()), pa.array(source, pa.int32())]
        columns.append(pa.array(offset, pa.int64()))
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._documents += len(ids)
        self._tokens += self._pending_tokens
        self._text_bytes += sum(num_bytes)
        self._rows = []
        self._pending_tokens = 0


@dataclass(frozen=True)
class TokenStore:
    """An open token store; only its manifest is in memory."""

    place: Place
    """Its directory."""
    manifest: Manifest
    """What it holds."""
    cache_dir: Path | None = None
    """As given to `open`."""

    @classmethod
    def open(cls, place: Place | Path, cache_dir: Path | None = None) -> Self:
        """Open a store after checking its manifest and the size of every shard.

        Args:
            place: Its directory.
            cache_dir: Local folder for copies of its shards, where it is in object storage; None:
                `raytune_llama` in the user's cache folder.

        Raises:
            StoreError: It is no token store, of another format, or damaged; names the file.
            OSError: Its place cannot be reached.
        """
        place = Place.local(place) if isinstance(place, Path) else place
        file = place / MANIFEST_NAME
        if file.status() is None:
            raise StoreError(f"{place}: no {MANIFEST_NAME} there; name a folder of prepare_data")
        manifest = read_manifest(file)
        files = place.files()
        for split, content in manifest.splits.items():
            if content != SplitManifest.of(content.shards):
                raise StoreError(f"{file}: counts of {split} don't fit its shards; {REBUILD}")
            for shard in content.shards:
                _check_size(place / shard.name, files, shard.file_bytes)
        return cls(place, manifest, cache_dir)

    @property
    def fingerprint(self) -> str:
        """Identifies the store by what it was made from."""
        return self.manifest.fingerprint

    def split(self, name: SplitName) -> "TokenSplit":
        """Return a split; its shards are mapped at the first use.

        Raises:
            StoreError: There is no such split.
        """
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise StoreError(f"{self.place}: no split {name!r}; there are {known}")
        return TokenSplit(self.place, self.manifest.splits[name], self.cache_dir)

    def verify(self) -> None:
        """Read every shard where the store is, no copy, and compare its hash with the manifest's.

        Raises:
            StoreError: A shard has other bytes; names the file.
        """
        for split in self.manifest.splits.values():
            for shard in split.shards:
                got = (self.place / shard.name).sha256()
                if got != shard.sha256:
                    raise StoreError(
                        f"{self.place / shard.name}: SHA-256 is {got}, the manifest says "
                        f"{shard.sha256}; {REBUILD}"
                    )


@dataclass(frozen=True)
class TokenSplit:
    """The flat token stream of a split, memory-mapped; pickles as its place and manifest."""

    place: Place
    """The store."""
    manifest: SplitManifest
    """Counts and shards."""
    cache_dir: Path | None = None
    """As the store's; where it is None, each node takes its own user's cache folder."""

    @property
    def num_documents(self) -> int:
        """Documents of the split."""
        return self.manifest.documents

    @property
    def num_tokens(self) -> int:
        """Length of the flat stream."""
        return self.manifest.tokens

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return self.manifest.text_bytes

    def source_ranges(self) -> dict[int, range]:
        """Return the stretch of the flat stream that each configured source has, in store order.

        A source without documents in this split is left out.
        """
        ranges: dict[int, range] = {}
        start = 0
        for shard in self.manifest.shards:
            stop = start + shard.tokens
            ranges[shard.source] = range(ranges.get(shard.source, range(start, 0)).start, stop)
            start = stop
        return ranges

    def tokens(self, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """Return the ids of a range of the flat stream, a read-only view where one batch has it.

        Raises:
            IndexError: The range is empty backwards or leaves the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.num_tokens}")
        pieces = [
            batch.ids[max(0, start - batch.token_start) : stop - batch.token_start]
            for batch in self._overlapping(start, stop)
        ]
        if not pieces:
            return np.empty(0, dtype=np.uint16)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the flat positions in [start, stop) at which a document starts, ascending."""
        pieces = [np.empty(0, dtype=np.int64)]
        for batch in self._overlapping(start, stop):
            starts = batch.offsets[:-1]
            bounds = np.array([start - batch.token_start, stop - batch.token_start])
            first, end = np.searchsorted(starts, bounds)
            pieces.append(starts[first:end] + batch.token_start)
        return np.concatenate(pieces)

    def bytes_between(self, start: int, stop: int) -> float:
        """Return the bytes of text that [start, stop) covers: of a cut document its token share."""
        (whole_start, part_start), (whole_stop, part_stop) = map(self._bytes_before, (start, stop))
        return (whole_stop - whole_start) + (part_stop - part_start)

    def __getstate__(self) -> dict[str, Any]:
        # The cached map of the shards stays behind: the other process maps them itself.
        return {"place": self.place, "manifest": self.manifest, "cache_dir": self.cache_dir}

    @cached_property
    def _batches(self) -> "list[_Batch]":
        return list(_map_batches(self.place, self.manifest.shards, self.cache_dir))

    @cached_property
    def _batch_starts(self) -> NDArray[np.int64]:
        return np.array([batch.token_start for batch in self._batches], dtype=np.int64)

    @cached_property
    def _batch_bytes(self) -> NDArray[np.int64]:
        """Bytes of text before each batch."""
        sums = [0, *(int(batch.num_bytes.sum()) for batch in self._batches)]
        return np.cumsum(np.array(sums, dtype=np.int64))

    def _overlapping(self, start: int, stop: int) -> "list[_Batch]":
        if start >= stop:
            return []
        first = int(np.searchsorted(self._batch_starts, start, side="right")) - 1
        end = int(np.searchsorted(self._batch_starts, stop))
        return self._batches[max(0, first) : end]

    def _bytes_before(self, position: int) -> tuple[int, float]:
        """Bytes of the whole documents before a position, and the share of the one it cuts."""
        if not 0 <= position <= self.num_tokens:
            raise IndexError(f"token {position} of a stream of {self.num_tokens}")
        if position == self.num_tokens:
            return self.num_bytes, 0.0
        number = int(np.searchsorted(self._batch_starts, position, side="right")) - 1
        batch = self._batches[number]
        inside = position - batch.token_start
        row = int(np.searchsorted(batch.offsets, inside, side="right")) - 1
        whole = int(self._batch_bytes[number]) + int(batch.num_bytes[:row].sum())
        start, end = (int(bound) for bound in batch.offsets[row : row + 2])
        return whole, int(batch.num_bytes[row]) * ((inside - start) / (end - start))


@dataclass(frozen=True)
class _Batch:
    """One mapped record batch."""

    token_start: int
    ids: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]


def _schema(dtype: str) -> pa.Schema:
    ids = pa.large_list(pa.field("item", pa.type_for_alias(dtype), nullable=False))
    columns = {"tokens": ids, "num_bytes": pa.int64(), "source": pa.int32(), "offset": pa.int64()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def _map_batches(place: Place, shards: list[Shard], cache_dir: Path | None) -> Iterable[_Batch]:
    """Map all record batches; raise StoreError where rows or tokens differ from the manifest."""
    token_start = 0
    for shard, path in zip(shards, local_shards(place, shards, cache_dir), strict=True):
        documents, first = 0, token_start
        try:
            # Closing gives the file descriptor back; the mapping lives as long as its arrays.
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file)
                batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            remedy = REBUILD if place.is_local else f"delete it, a copy of {place / shard.name}"
            raise StoreError(f"{path}: cannot be mapped ({error}); {remedy}") from error
        for batch in batches:
            tokens = batch.column("tokens")
            ids = tokens.values.to_numpy()
            num_bytes = batch.column("num_bytes").to_numpy()
            yield _Batch(token_start, ids, tokens.offsets.to_numpy(), num_bytes)
            token_start += len(ids)
            documents += batch.num_rows
        if (documents, token_start - first) != (shard.documents, shard.tokens):
            raise StoreError(
                f"{path}: {documents} documents with {token_start - first} tokens, the manifest "
                f"says {shard.documents} with {shard.tokens}; {REBUILD}"
            )


def _check_size(file: Place, files: dict[Place, FileStatus], file_bytes: int) -> None:
    got = files[file].num_bytes if file in files else None
    if got != file_bytes:
        state = "is missing" if got is None else f"has {got} bytes"
        raise StoreError(f"{file} {state}, the manifest says {file_bytes} bytes; {REBUILD}")
