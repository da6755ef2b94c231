"""Hashes of source files, and how to know them without reading hundreds of gigabytes again.

A store's fingerprint holds the hash of each file's content. It falls out of the building; to see
later whether the store still fits its sources, their sizes and times are compared with those of
that day, and only a file that looks different is read.
"""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os import cpu_count
from typing import Any, Self

import pydantic

from raytune_llama.data.build.unit_encoder import UnitRecord
from raytune_llama.data.build.units import WorkUnit
from raytune_llama.data.readers.ranges import HashingReader, content_sha256
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

HASHES_NAME = ".source-files.json"
"""Lies in the store, but is no part of it: it may be lost, and then all files are read again."""


@dataclass(frozen=True, kw_only=True)
class HashedFile:
    """A file as it was when its content was hashed."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    num_bytes: int
    """Its size."""
    version: str
    """`FileStatus.version`."""
    sha256: str
    """`content_sha256` of its blocks."""


@dataclass(frozen=True)
class SourceHashes:
    """The source files whose content is known, by source and name."""

    files: dict[str, HashedFile]

    @classmethod
    def from_records(
        cls, files: list[SourceFile], units: list[WorkUnit], records: list[UnitRecord]
    ) -> Self:
        """Put the hashes together that the units of a store have made."""
        digests: dict[int, list[str]] = {}
        for unit, record in zip(units, records, strict=True):
            for piece, found in zip(unit.byte_ranges, record.pieces, strict=True):
                digests.setdefault(piece.file, []).extend(found.digests)
        return cls(
            {
                _key(file): _to_hashed_file(file, content_sha256(digests[index]))
                for index, file in enumerate(files)
            }
        )

    @classmethod
    def read(cls, store: Place) -> Self:
        """Read what a store remembers; nothing where that is missing or damaged."""
        place = store / HASHES_NAME
        if not place.exists():
            return cls({})
        try:
            adapter = pydantic.TypeAdapter(dict[str, HashedFile])
            return cls(adapter.validate_json(place.read_bytes()))
        except pydantic.ValidationError:
            logger.warning("%s is damaged: all source files are read again", place)
            return cls({})

    def write(self, store: Place) -> None:
        """Remember the files beside a store's shards."""
        (store / HASHES_NAME).write_json({key: asdict(file) for key, file in self.files.items()})

    def fingerprint_inputs(self, files: list[SourceFile]) -> list[dict[str, Any]]:
        """Return what the files add to a fingerprint; settings that a format ignores do not."""
        return [_inputs(file, self.files[_key(file)]) for file in files]


def hash_files(files: list[SourceFile], seen: SourceHashes) -> SourceHashes:
    """Return the hashes of all files; read those that look different from when they were seen."""
    known = {_key(file): _unchanged(file, seen.files) for file in files}
    unknown = [file for file in files if known[_key(file)] is None]
    if unknown:
        num_bytes = sum(file.status.num_bytes for file in unknown)
        logger.info("hashing %d source files, %.1f MB", len(unknown), num_bytes / 1e6)
    with ThreadPoolExecutor(cpu_count()) as threads:
        hashed = dict(zip(map(_key, unknown), threads.map(_hash_file, unknown), strict=True))
    return SourceHashes({key: found or hashed[key] for key, found in known.items()})


def _unchanged(file: SourceFile, seen: Mapping[str, HashedFile]) -> HashedFile | None:
    found = seen.get(_key(file))
    same = found and (found.num_bytes, found.version) == (
        file.status.num_bytes,
        file.status.version,
    )
    return found if same else None


def _hash_file(file: SourceFile) -> HashedFile:
    with file.place.open() as opened:
        digests = HashingReader(opened, 0, file.status.num_bytes).digests()
    return _to_hashed_file(file, content_sha256(digests))


def _to_hashed_file(file: SourceFile, sha256: str) -> HashedFile:
    return HashedFile(num_bytes=file.status.num_bytes, version=file.status.version, sha256=sha256)


def _key(file: SourceFile) -> str:
    return f"{file.source}/{file.name}"


def _inputs(file: SourceFile, seen: HashedFile) -> dict[str, Any]:
    options = file.options
    fields: dict[str, Any] = {
        "source": file.source,
        "name": file.name,
        "sha256": seen.sha256,
        "format": options.format,
        "max_document_bytes": options.max_document_bytes,
    }
    if options.format != "parquet":
        fields |= {"compression": options.compression, "encoding": options.encoding}
    if options.format == "txt":
        return fields | {"document": options.document}
    return fields | {"text_fields": list(options.text_fields)}
