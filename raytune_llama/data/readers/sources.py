"""Corpora: the files that a config names, and how to read each of them.

A source is a file, a folder (all files below it except hidden ones) or a glob, on a local disk or
in object storage. Its files are sorted by name, so that the same folder is the same corpus on every
machine.
"""

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.detection import (
    FORMATS_BY_SUFFIX,
    DetectedFormat,
    FileKind,
    detect_format,
)
from raytune_llama.data.readers.listing import list_files
from raytune_llama.data.readers.rows import ReadOptions
from raytune_llama.storage.place import FileStatus, Place

logger = logging.getLogger(__name__)

_NUM_THREADS = 16  # a request to object storage takes tens of milliseconds


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus and how to read it."""

    source: int
    """Index of the configured source that the file belongs to."""
    place: Place
    """Location of the file."""
    name: str
    """Path of the file relative to its source, with "/" between folders."""
    status: FileStatus
    """Size of the file, and a version that changes when it is rewritten."""
    options: ReadOptions
    """How to read the file."""
    row_group_bytes: tuple[int, ...] = ()
    """Compressed size of each row group, in bytes; empty unless Parquet."""


def discover_files(
    sources: tuple[SourceConfig, ...], *, max_document_bytes: int = 1 << 28
) -> list[SourceFile]:
    """List the files of all sources, in source order and by name within a source.

    Reads the beginning of each file to detect its encoding, and JSON or JSON Lines.

    Args:
        sources: Sources in the config.
        max_document_bytes: Maximum size of a document; longer ones are quarantined unread.

    Raises:
        ConfigError: A source matches no file, a file has an unknown format, is listed twice or
            cannot be opened, or all are empty; reports all problems together, each with its field.
    """
    problems: list[str] = []
    found: list[tuple[int, Place, str, FileStatus]] = []
    seen: dict[str, str] = {}
    if not sources:
        problems.append("sources: got an empty list; name at least one file, folder or glob")
    for number, source in enumerate(sources):
        field = f"sources.{number}.path"
        try:
            matched = list_files(Place.parse(source.path, field), field)
        except ValueError as error:
            problems.append(str(error))
            continue
        for place, name, status in matched:
            same = str(place.path.resolve()) if place.is_local else str(place)
            if same in seen:
                problems.append(f"{field}: {place} is already part of {seen[same]}")
            seen.setdefault(same, f"sources.{number}")
            found.append((number, place, name, status))
    kinds = [(file, *_kind_of(sources[file[0]], file[1], file[0])) for file in found]
    problems += [problem for _, _, problem in kinds if problem]
    readable = [(file, kind) for file, kind, _ in kinds if kind is not None]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        inspected = list(threads.map(lambda pair: _inspect(sources, *pair), readable))
    problems += [result for result in inspected if isinstance(result, str)]
    problems.sort(key=_source_number)
    if found and not problems and not any(status.num_bytes for *_, status in found):
        problems.append(f"sources: all {len(found)} files are empty; name files with text")
    if problems:
        raise ConfigError(problems)
    return [
        _source_file(sources, file, result, max_document_bytes)
        for (file, _), result in zip(readable, inspected, strict=True)
        if not isinstance(result, str)
    ]


def check_sources(sources: tuple[SourceConfig, ...]) -> list[str]:
    """Check the sources, reading only the beginning of their files.

    Returns:
        One line per problem, starting with the path of the field. Empty if there is none.
    """
    try:
        discover_files(sources)
    except ConfigError as error:
        return error.problems
    return []


def _source_number(problem: str) -> int:
    found = re.match(r"sources\.(\d+)\.", problem)
    return int(found[1]) if found else -1


def _kind_of(source: SourceConfig, place: Place, number: int) -> tuple[FileKind | None, str | None]:
    """Return the format of a file from its name, or the problem with it."""
    field = f"sources.{number}"
    kind = FileKind.from_name(place.name, source.format)
    problem = None
    if kind is None:
        problem = (
            f"{field}.format: unknown suffix of {place}; wanted one of "
            f"{', '.join('.' + suffix for suffix in FORMATS_BY_SUFFIX)}: set format, or narrow "
            "path with a glob"
        )
    elif kind.format == "txt" and (source.text_field != "text" or source.text_aliases):
        problem = (
            f"{field}.text_field: {place} is plain text and has no fields; remove text_field and "
            "text_aliases"
        )
    elif kind.format != "txt" and source.document != "line":
        problem = (
            f"{field}.document: {place} is {kind.format}, where each row is a document; remove it"
        )
    elif kind.format == "parquet" and source.encoding != "auto":
        problem = f"{field}.encoding: {place} is Parquet, whose text is UTF-8; remove it"
    return (None if problem else kind), problem


def _inspect(
    sources: tuple[SourceConfig, ...],
    file: tuple[int, Place, str, FileStatus],
    kind: FileKind,
) -> DetectedFormat | str:
    """Detect the format of a file; return the problem with it instead of raising."""
    number, place, _, status = file
    source = sources[number]
    try:
        return detect_format(
            place,
            status,
            kind,
            declared_encoding=source.encoding,
            is_format_declared=source.format != "auto",
            text_fields=(source.text_field, *source.text_aliases),
        )
    except ValueError as error:
        return f"sources.{number}: {error}"
    except OSError as error:
        # pyarrow's own text repeats the path.
        cause = os.strerror(error.errno) if error.errno else error
        return f"sources.{number}.path: {place} cannot be read: {cause}"


def _source_file(
    sources: tuple[SourceConfig, ...],
    file: tuple[int, Place, str, FileStatus],
    inspection: DetectedFormat,
    max_document_bytes: int,
) -> SourceFile:
    number, place, name, status = file
    source = sources[number]
    for note in inspection.notes:
        logger.warning("%s: %s", place, note)
    options = ReadOptions(
        format=inspection.kind.format,
        compression=inspection.kind.compression,
        encoding=inspection.encoding.codec,
        bom_bytes=inspection.encoding.bom_bytes,
        document=source.document,
        text_fields=(source.text_field, *source.text_aliases),
        max_document_bytes=max_document_bytes,
    )
    return SourceFile(number, place, name, status, options, inspection.row_group_bytes)
