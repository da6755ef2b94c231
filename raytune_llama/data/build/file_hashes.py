"""Content hashes of source files, cached so that unchanged files are not read again.

A store's fingerprint includes the hash of each source file, computed while the store is built. To
check later whether the store still matches its sources, file sizes and versions are compared with
those recorded at build time, and only files that differ are hashed again.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from os import cpu_count
from typing import Annotated, Any, Self

import pydantic

from raytune_llama.data.build.unit_encoder import UnitRecord
from raytune_llama.data.build.units import WorkUnit
from raytune_llama.data.readers.ranges import HashingReader, content_hash
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.store.manifest import READ_HASH
from raytune_llama.logs import waiting
from raytune_llama.storage.hashes import algorithm_of, hash_key
from raytune_llama.storage.place import FileStatus, Place

logger = logging.getLogger(__name__)

HASHES_NAME = ".source-files.json"
"""Name of the hash cache in the store directory; if it is lost, all files are hashed again."""


@dataclass(frozen=True, kw_only=True)
class HashedFile:
    """State of a file when its content was hashed."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    num_bytes: int
    """File size in bytes."""
    version: str
    """`FileStatus.version` of the file."""
    hash: Annotated[str, READ_HASH]
    """`content_hash` of the file's blocks."""


@dataclass(frozen=True)
class SourceHashes:
    """Known content hashes of source files."""

    files: dict[str, HashedFile]
    """Hashed files by `<source index>/<name>`."""

    @classmethod
    def from_records(
        cls, files: list[SourceFile], units: list[WorkUnit], records: list[UnitRecord]
    ) -> Self:
        """Combine the block hashes in the records of a store's units."""
        digests: dict[int, list[str]] = {}
        for unit, record in zip(units, records, strict=True):
            for byte_range, found in zip(unit.byte_ranges, record.pieces, strict=True):
                digests.setdefault(byte_range.file, []).extend(found.digests)
        return cls(
            {
                _key(file): _to_hashed_file(file, content_hash(digests[index]))
                for index, file in enumerate(files)
            }
        )

    @classmethod
    def read(cls, store: Place) -> Self:
        """Read the hash cache of a store; empty if it is missing or damaged."""
        place = store / HASHES_NAME
        if not place.exists():
            return cls({})
        try:
            adapter = pydantic.TypeAdapter(dict[str, HashedFile])
            return cls(adapter.validate_json(place.read_bytes()))
        except pydantic.ValidationError:
            logger.warning("%s is damaged: hashing all source files again", place)
            return cls({})

    def write(self, store: Place) -> None:
        """Write the hash cache into the store directory."""
        (store / HASHES_NAME).write_json({key: asdict(file) for key, file in self.files.items()})

    def fingerprint_inputs(self, files: list[SourceFile]) -> list[dict[str, Any]]:
        """Return the files' fingerprint inputs, without settings that their format ignores."""
        return [_inputs(file, self.files[_key(file)]) for file in files]


def hash_files(
    files: list[SourceFile], seen: SourceHashes, like: str | None = None
) -> SourceHashes:
    """Return the hashes of all files, hashing only those that changed since `seen`.

    Args:
        files: Source files.
        seen: Known hashes.
        like: Recorded hash whose algorithm to use; see `storage.hashes`.
    """
    known = {_key(file): _unchanged(file, seen.files, like) for file in files}
    unknown = [file for file in files if known[_key(file)] is None]
    num_bytes = sum(file.status.num_bytes for file in unknown)
    what = (
        f"hashing {len(unknown)} source files, {num_bytes / 1e6:.1f} MB, that were written since "
        "the token store was built"
    )
    with (
        waiting(logger, what, usually="1 to 5 s per GB"),
        ThreadPoolExecutor(cpu_count()) as threads,
    ):
        found = threads.map(partial(_hash_file, like=like), unknown)
        hashed = dict(zip(map(_key, unknown), found, strict=True))
    return SourceHashes({key: found or hashed[key] for key, found in known.items()})


def _unchanged(
    file: SourceFile, seen: Mapping[str, HashedFile], like: str | None
) -> HashedFile | None:
    found = seen.get(_key(file))
    if found is None or algorithm_of(found.hash) != algorithm_of(like):
        return None
    state = (file.status.num_bytes, file.status.version)
    return found if (found.num_bytes, found.version) == state else None


def _hash_file(file: SourceFile, like: str | None) -> HashedFile:
    return _to_hashed_file(file, _content_hash(file.place, file.status, like))


@lru_cache(maxsize=1 << 16)
def _content_hash(place: Place, status: FileStatus, like: str | None) -> str:
    """Hash a file once per process while it is unchanged: a run checks its store more than once."""
    with place.open() as opened:
        reader = HashingReader(opened, 0, status.num_bytes, like)
        return content_hash(reader.block_hashes(), like)


def _to_hashed_file(file: SourceFile, found: str) -> HashedFile:
    return HashedFile(num_bytes=file.status.num_bytes, version=file.status.version, hash=found)


def _key(file: SourceFile) -> str:
    return f"{file.source}/{file.name}"


def _inputs(file: SourceFile, seen: HashedFile) -> dict[str, Any]:
    options = file.options
    fields: dict[str, Any] = {
        "source": file.source,
        "name": file.name,
        hash_key("hash", seen.hash): seen.hash,
        "format": options.format,
        "max_document_bytes": options.max_document_bytes,
    }
    if not options.is_table:
        fields |= {"compression": options.compression, "encoding": options.encoding}
    if options.format == "txt":
        return fields | {"document": options.document}
    return fields | {"text_fields": list(options.text_fields)}
