"""The token store: a directory of memory-mapped Arrow shards and a manifest with their hashes.

    store = TokenStore.open(Place.parse("s3://bucket/stores/demo", "data.store_dir"))
    train = store.split("train")
    ids = train.tokens(0, 1024)

A store on a local disk is mapped in place. The shards of a store in object storage are downloaded
to a local cache when their split is first read, and mapped there.

A shard is an Arrow IPC file with one row per document: its token ids, the size of its text, the
index of its source file and its offset there. The rows of a split, shard after shard, are the
documents in source order; their concatenated ids are the split's flat token stream.
"""

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from raytune_llama.storage.buckets import NUM_CONNECTIONS
from raytune_llama.storage.hashes import show_hash
from raytune_llama.storage.place import FileStatus, Place
from raytune_llama.storage.transfers import default_cache_dir, local_copy, local_copy_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenStore:
    """An open token store; only its manifest is in memory."""

    place: Place
    """Directory of the store."""
    manifest: Manifest
    """Manifest of the store."""
    cache_dir: Path | None = None
    """Local shard cache, as given to `open`."""

    @classmethod
    def open(cls, place: Place | Path, cache_dir: Path | None = None) -> Self:
        """Open a store after checking its manifest and the size of every shard.

        Args:
            place: Directory of the store.
            cache_dir: Local directory in which shards from object storage are cached; None:
                `raytune_llama` in the user's cache directory.

        Raises:
            StoreError: There is no token store, or it has another format version or is damaged;
                names the file.
            OSError: The store cannot be reached.
        """
        place = Place.local(place) if isinstance(place, Path) else place
        file = place / MANIFEST_NAME
        if file.status() is None:
            raise StoreError(
                f"{place}: not a token store, it has no {MANIFEST_NAME}; build it with prepare_data"
            )
        manifest = read_manifest(file)
        files = place.files()
        for split, content in manifest.splits.items():
            if content != SplitManifest.from_shards(content.shards):
                raise StoreError(
                    f"{file}: the counts of {split} do not match its shards; {REBUILD_HINT}"
                )
            for shard in content.shards:
                _check_size(place / shard.name, files, shard.file_bytes)
        return cls(place, manifest, cache_dir)

    @property
    def fingerprint(self) -> str:
        """Hash of the inputs that the store was built from."""
        return self.manifest.fingerprint

    def file_name(self, number: int) -> str | None:
        """Return the name of the source file with index `number`; None if it is not recorded."""
        files = self.manifest.inputs.get("sources", [])
        return files[number]["name"] if number < len(files) else None

    def split(self, name: SplitName) -> "TokenSplit":
        """Return a split; its shards are mapped on first use.

        Raises:
            StoreError: The store has no such split.
        """
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise StoreError(f"{self.place}: no split {name!r}; it has {known}")
        return TokenSplit(self.place, self.manifest.splits[name], self.cache_dir)

    def verify(self) -> None:
        """Hash every original shard, not a cached copy, and compare it with the manifest.

        Raises:
            StoreError: The hash of a shard differs; names the file.
        """
        for split in self.manifest.splits.values():
            for shard in split.shards:
                got = (self.place / shard.name).hash(like=shard.hash)
                if got != shard.hash:
                    raise StoreError(
                        f"{self.place / shard.name}: its hash is {show_hash(got)}, the "
                        f"manifest says {show_hash(shard.hash)}; {REBUILD_HINT}"
                    )


@dataclass(frozen=True)
class TokenSplit:
    """Memory-mapped flat token stream of a split; pickles without its mapping."""

    place: Place
    """Directory of the store."""
    manifest: SplitManifest
    """Counts and shards of the split."""
    cache_dir: Path | None = None
    """Local shard cache; None: the user's cache directory on each node."""

    @property
    def num_documents(self) -> int:
        """Number of documents in the split."""
        return self.manifest.documents

    @property
    def num_tokens(self) -> int:
        """Length of the flat stream in tokens."""
        return self.manifest.tokens

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8 bytes."""
        return self.manifest.text_bytes

    def source_ranges(self) -> dict[int, range]:
        """Return each source's span of the flat stream, in tokens, by source index.

        Sources without documents in this split are omitted.
        """
        return self._by_source([shard.tokens for shard in self.manifest.shards])

    def source_documents(self) -> dict[int, range]:
        """Return each source's range of document numbers, as `source_ranges` does for tokens."""
        return self._by_source([shard.documents for shard in self.manifest.shards])

    def token_starts(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the flat positions at which the documents with the given numbers start.

        The number `num_documents` means the end of the stream. Documents are looked up by binary
        search over the record batches, without a scan.

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
        """Return the numbers of the documents in a range that are the first of their source file.

        The first document of the range is always included.
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
        """Return the ids in [start, stop) of the flat stream; a read-only view within one batch.

        Raises:
            IndexError: `start` is above `stop`, or the range exceeds the stream.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a stream of {self.num_tokens}")
        return _joined([(b, b.ids) for b in self._overlapping(start, stop)], start, stop)

    @property
    def has_targets(self) -> bool:
        """Whether the split has a loss mask over its tokens, as conversations do."""
        return any(shard.targets is not None for shard in self.manifest.shards)

    def targets(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return the loss mask of [start, stop) of the flat stream; see `tokens`."""
        found = [
            (batch, batch.targets)
            for batch in self._overlapping(start, stop)
            if batch.targets is not None
        ]
        assert found or start == stop, "a store of text has no loss mask"
        return _joined(found, start, stop).astype(np.bool_, copy=False)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the flat positions in [start, stop) at which a document starts, ascending."""
        found = [np.empty(0, dtype=np.int64)]
        for batch in self._overlapping(start, stop):
            starts = batch.offsets[:-1]
            bounds = (start - batch.token_start, stop - batch.token_start)
            first, end = starts.searchsorted(bounds)
            found.append(starts[first:end] + batch.token_start)
        return found[1] if len(found) == 2 else np.concatenate(found)

    def documents_between(self, start: int, stop: int) -> range:
        """Return the numbers of the documents with tokens in the non-empty range [start, stop)."""
        bounds = [self._row_at(position) for position in (start, stop - 1)]
        first, last = (int(self._batch_documents[number]) + row for number, row in bounds)
        return range(first, last + 1)

    def origin(self, document: int) -> tuple[int, int]:
        """Return the origin of a document of the split.

        Returns:
            Index of its source file, and its offset in the file: bytes, or rows for tables.
        """
        number = int(np.searchsorted(self._batch_documents, document, side="right")) - 1
        batch, row = self._batches[number], document - int(self._batch_documents[number])
        return int(batch.files[row]), int(batch.file_offsets[row])

    def bytes_between(self, start: int, stop: int) -> float:
        """Return the text bytes of [start, stop); a cut document counts by its share of tokens."""
        (whole_start, part_start), (whole_stop, part_stop) = map(self._bytes_before, (start, stop))
        return (whole_stop - whole_start) + (part_stop - part_start)

    def __getstate__(self) -> dict[str, Any]:
        # Without the cached mapping: the receiving process maps the shards itself.
        return {"place": self.place, "manifest": self.manifest, "cache_dir": self.cache_dir}

    @cached_property
    def _batches(self) -> "list[_Batch]":
        return list(_map_batches(self.place, self.manifest.shards, self.cache_dir))

    @cached_property
    def _batch_starts(self) -> list[int]:
        return [batch.token_start for batch in self._batches]

    @cached_property
    def _batch_documents(self) -> NDArray[np.int64]:
        """Number of documents before each batch."""
        counts = [len(batch.files) for batch in self._batches]
        return np.cumsum(np.array([0, *counts], dtype=np.int64))[:-1]

    @cached_property
    def _batch_bytes(self) -> NDArray[np.int64]:
        """Text bytes before each batch, and in total as the last value."""
        sums = [0, *(int(batch.num_bytes.sum()) for batch in self._batches)]
        return np.cumsum(np.array(sums, dtype=np.int64))

    def _by_source(self, sizes: list[int]) -> dict[int, range]:
        """Add up the shards' sizes to one range per source."""
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
        """Return the bytes of complete documents before a position, and those of the cut one."""
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
        """Return the batch index of a token of the stream, and its document's row in the batch."""
        number = bisect_right(self._batch_starts, position) - 1
        batch = self._batches[number]
        inside = position - batch.token_start
        return number, int(np.searchsorted(batch.offsets, inside, side="right")) - 1


@dataclass(frozen=True)
class _Batch:
    """Memory-mapped record batch."""

    token_start: int
    ids: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    files: NDArray[np.int32]
    file_offsets: NDArray[np.int64]
    targets: NDArray[np.uint8] | None


def _joined(columns: list[tuple[_Batch, NDArray[Any]]], start: int, stop: int) -> NDArray[Any]:
    """Return [start, stop) of a column's flat stream; a view if one batch holds all of it."""
    parts = [
        column[max(0, start - batch.token_start) : stop - batch.token_start]
        for batch, column in columns
    ]
    if not parts:
        return np.empty(0, dtype=np.uint16)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _map_batches(place: Place, shards: list[Shard], cache_dir: Path | None) -> Iterable[_Batch]:
    """Map all record batches; raise StoreError if their counts differ from the manifest."""
    token_start = 0
    for shard, path in zip(shards, local_shards(place, shards, cache_dir), strict=True):
        documents, first = 0, token_start
        try:
            # Closing releases the file descriptor; the mapping lives as long as its arrays.
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file)
                batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (OSError, pa.ArrowInvalid) as error:
            remedy = (
                REBUILD_HINT
                if place.is_local
                else f"delete this cached copy of {place / shard.name} to download it again"
            )
            raise StoreError(f"{path}: cannot be memory-mapped ({error}); {remedy}") from error
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
                f"{path}: has {documents} documents with {token_start - first} tokens, the "
                f"manifest says {shard.documents} with {shard.tokens}; {REBUILD_HINT}"
            )


def _check_size(file: Place, files: dict[Place, FileStatus], file_bytes: int) -> None:
    got = files[file].num_bytes if file in files else None
    if got != file_bytes:
        state = "is missing" if got is None else f"has {got} bytes"
        raise StoreError(f"{file} {state}, the manifest says {file_bytes} bytes; {REBUILD_HINT}")


def open_store(config: StoreConfig) -> TokenStore:
    """Open the existing token store that a config names; see `TokenStore.open`.

    Raises:
        StoreError: There is no token store, or it has another format version or is damaged.
        OSError: The store cannot be reached.
    """
    cache_dir = Path(config.cache_dir) if config.cache_dir is not None else None
    return TokenStore.open(Place.parse(config.store_dir, "data.store_dir"), cache_dir)


def local_shards(place: Place, shards: Sequence[Shard], cache_dir: Path | None) -> list[Path]:
    """Return the local paths of shards, in order; shards not cached yet are downloaded.

    Args:
        place: Location of the store.
        shards: Shards to return.
        cache_dir: Local directory of the cache; None: `raytune_llama` in the user's cache
            directory.

    Raises:
        StoreError: A shard cannot be downloaded, or does not match the manifest's hash.
    """
    if place.is_local:
        return [place.path / shard.name for shard in shards]
    folder = cache_dir or default_cache_dir()
    paths = [local_copy_path(place / shard.name, shard.hash, folder) for shard in shards]
    missing = [shard for shard, path in zip(shards, paths, strict=True) if not path.exists()]
    if missing:
        gib = sum(shard.file_bytes for shard in missing) / 2**30
        counts = f"{len(missing)} of {len(shards)}"
        logger.info("%s: downloading %s shards, %.3f GiB, to %s", place, counts, gib, folder)

    def fetch(shard: Shard) -> Path:
        file = place / shard.name
        try:
            return local_copy(file, wanted=shard.hash, num_bytes=shard.file_bytes, cache_dir=folder)
        except OSError as error:
            raise StoreError(f"{file}: cannot be downloaded to {folder} ({error})") from error
        except ValueError as error:
            raise StoreError(f"{error}; {REBUILD_HINT}") from error

    with ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
        return list(threads.map(fetch, shards))
