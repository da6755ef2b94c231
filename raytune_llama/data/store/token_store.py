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

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytune_llama.data.store.config import StoreConfig
from raytune_llama.data.store.manifest import (
    MANIFEST_NAME,
    REBUILD_HINT,
    Manifest,
    Shard,
    SplitManifest,
    SplitName,
    StoreError,
    read_manifest,
)
from raytune_llama.data.store.shard_cache import local_shards
from raytune_llama.storage.place import FileStatus, Place


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
            if content != SplitManifest.from_shards(content.shards):
                raise StoreError(f"{file}: counts of {split} don't fit its shards; {REBUILD_HINT}")
            for shard in content.shards:
                _check_size(place / shard.name, files, shard.file_bytes)
        return cls(place, manifest, cache_dir)

    @property
    def fingerprint(self) -> str:
        """Identifies the store by what it was made from."""
        return self.manifest.fingerprint

    def file_name(self, number: int) -> str | None:
        """Return what a source file is called, by its number; None where no input names it."""
        files = self.manifest.inputs.get("sources", [])
        return files[number]["name"] if number < len(files) else None

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
                        f"{shard.sha256}; {REBUILD_HINT}"
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
        return self._by_source([shard.tokens for shard in self.manifest.shards])

    def source_documents(self) -> dict[int, range]:
        """Return the numbers of the documents that each configured source has, in the same way."""
        return self._by_source([shard.documents for shard in self.manifest.shards])

    def token_starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the flat positions at which documents start, by their numbers in the split.

        The number `num_documents` stands for the end of the stream. A document is found by a
        binary search over the batches; none is scanned.

        Raises:
            IndexError: A number is below 0 or above `num_documents`.
        """
        if len(documents) and not 0 <= documents.min() <= documents.max() <= self.num_documents:
            found = f"documents {documents.min()} to {documents.max()}"
            raise IndexError(f"{found} of a split with {self.num_documents}")
        starts = np.empty(len(documents), dtype=np.int64)
        owners = np.searchsorted(self._batch_documents, documents, side="right") - 1
        for number in np.unique(owners):
            batch, chosen = self._batches[number], owners == number
            rows = documents[chosen] - self._batch_documents[number]
            starts[chosen] = batch.offsets[rows] + batch.token_start
        return starts

    def file_starts(self, documents: range) -> NDArray[np.int64]:
        """Return the numbers of the documents in a range with which a source file starts there.

        The first of the range is always one of them.
        """
        starts: list[int] = []
        before = -1
        for first, batch in zip(self._batch_documents.tolist(), self._batches, strict=True):
            files = batch.files[max(0, documents.start - first) : max(0, documents.stop - first)]
            changes = np.flatnonzero(np.diff(files, prepend=before))
            starts.extend((changes + max(first, documents.start)).tolist())
            before = files[-1] if len(files) else before
        return np.array(starts, dtype=np.int64)

    def tokens(self, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """Return the ids of a range of the flat stream, a read-only view where one batch has it.

        Raises:
            IndexError: The range is empty backwards or leaves the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.num_tokens}")
        return _joined([(b, b.ids) for b in self._overlapping(start, stop)], start, stop)

    @property
    def has_targets(self) -> bool:
        """Whether documents say which of their tokens are learned: those of conversations do."""
        return any(shard.targets is not None for shard in self.manifest.shards)

    def targets(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return which ids of a range of the flat stream are learned; see `tokens`."""
        found = [
            (batch, batch.targets)
            for batch in self._overlapping(start, stop)
            if batch.targets is not None
        ]
        assert found or start == stop, "a store of text learns everything"
        return _joined(found, start, stop).astype(np.bool_, copy=False)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the flat positions in [start, stop) at which a document starts, ascending."""
        pieces = [np.empty(0, dtype=np.int64)]
        for batch in self._overlapping(start, stop):
            starts = batch.offsets[:-1]
            bounds = (start - batch.token_start, stop - batch.token_start)
            first, end = starts.searchsorted(bounds)
            pieces.append(starts[first:end] + batch.token_start)
        return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

    def documents_between(self, start: int, stop: int) -> range:
        """Return the numbers of the documents that have tokens in [start, stop), which has some."""
        bounds = [self._row_at(position) for position in (start, stop - 1)]
        first, last = (int(self._batch_documents[number]) + row for number, row in bounds)
        return range(first, last + 1)

    def origin(self, document: int) -> tuple[int, int]:
        """Return where a document of the split comes from.

        Returns:
            The number of its file among the store's, and its offset there as the store has it.
        """
        number = int(np.searchsorted(self._batch_documents, document, side="right")) - 1
        batch, row = self._batches[number], document - int(self._batch_documents[number])
        return int(batch.files[row]), int(batch.file_offsets[row])

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
    def _batch_starts(self) -> list[int]:
        return [batch.token_start for batch in self._batches]

    @cached_property
    def _batch_documents(self) -> NDArray[np.int64]:
        """Documents before each batch."""
        counts = [len(batch.files) for batch in self._batches]
        return np.cumsum(np.array([0, *counts], dtype=np.int64))[:-1]

    @cached_property
    def _batch_bytes(self) -> NDArray[np.int64]:
        """Bytes of text before each batch."""
        sums = [0, *(int(batch.num_bytes.sum()) for batch in self._batches)]
        return np.cumsum(np.array(sums, dtype=np.int64))

    def _by_source(self, sizes: list[int]) -> dict[int, range]:
        """Add up the shards' sizes to one range for each source."""
        ranges: dict[int, range] = {}
        start = 0
        for shard, size in zip(self.manifest.shards, sizes, strict=True):
            first = ranges.get(shard.source, range(start, start)).start
            ranges[shard.source] = range(first, start + size)
            start += size
        return ranges

    def _overlapping(self, start: int, stop: int) -> "list[_Batch]":
        if start >= stop:
            return []
        first = bisect_right(self._batch_starts, start) - 1
        return self._batches[max(0, first) : bisect_left(self._batch_starts, stop)]

    def _bytes_before(self, position: int) -> tuple[int, float]:
        """Bytes of the whole documents before a position, and the share of the one it cuts."""
        if not 0 <= position <= self.num_tokens:
            raise IndexError(f"token {position} of a stream of {self.num_tokens}")
        if position == self.num_tokens:
            return self.num_bytes, 0.0
        number, row = self._row_at(position)
        batch = self._batches[number]
        inside = position - batch.token_start
        whole = int(self._batch_bytes[number]) + int(batch.num_bytes[:row].sum())
        start, end = (int(bound) for bound in batch.offsets[row : row + 2])
        return whole, int(batch.num_bytes[row]) * ((inside - start) / (end - start))

    def _row_at(self, position: int) -> tuple[int, int]:
        """Return the batch that has a token of the stream, and the row of its document there."""
        number = bisect_right(self._batch_starts, position) - 1
        batch = self._batches[number]
        inside = position - batch.token_start
        return number, int(np.searchsorted(batch.offsets, inside, side="right")) - 1


@dataclass(frozen=True)
class _Batch:
    """One mapped record batch."""

    token_start: int
    ids: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    files: NDArray[np.int32]
    file_offsets: NDArray[np.int64]
    targets: NDArray[np.uint8] | None


def _joined(columns: list[tuple[_Batch, NDArray[Any]]], start: int, stop: int) -> NDArray[Any]:
    """Return a range of the flat stream of a column, a view where one batch has all of it."""
    pieces = [
        column[max(0, start - batch.token_start) : stop - batch.token_start]
        for batch, column in columns
    ]
    if not pieces:
        return np.empty(0, dtype=np.uint16)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


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
            remedy = (
                REBUILD_HINT if place.is_local else f"delete it, a copy of {place / shard.name}"
            )
            raise StoreError(f"{path}: cannot be mapped ({error}); {remedy}") from error
        for batch in batches:
            tokens = batch.column("tokens")
            ids = tokens.values.to_numpy()
            num_bytes = batch.column("num_bytes").to_numpy()
            files = batch.column("source").to_numpy()
            file_offsets = batch.column("offset").to_numpy()
            offsets = tokens.offsets.to_numpy()
            targets = None
            if shard.targets is not None:
                targets = batch.column("targets").values.to_numpy()
            yield _Batch(token_start, ids, offsets, num_bytes, files, file_offsets, targets)
            token_start += len(ids)
            documents += batch.num_rows
        if (documents, token_start - first) != (shard.documents, shard.tokens):
            raise StoreError(
                f"{path}: {documents} documents with {token_start - first} tokens, the manifest "
                f"says {shard.documents} with {shard.tokens}; {REBUILD_HINT}"
            )


def _check_size(file: Place, files: dict[Place, FileStatus], file_bytes: int) -> None:
    got = files[file].num_bytes if file in files else None
    if got != file_bytes:
        state = "is missing" if got is None else f"has {got} bytes"
        raise StoreError(f"{file} {state}, the manifest says {file_bytes} bytes; {REBUILD_HINT}")


def open_store(config: StoreConfig) -> TokenStore:
    """Open the token store that a config names, as it is.

    Raises:
        StoreError: It is no token store, of another format, or damaged.
        OSError: Its place cannot be reached.
    """
    cache_dir = Path(config.cache_dir) if config.cache_dir is not None else None
    return TokenStore.open(Place.parse(config.store_dir, "data.store_dir"), cache_dir)
