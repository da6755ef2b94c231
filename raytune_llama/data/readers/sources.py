"""Corpora: which files a config names, and how each of them has to be read.

A source is a file, a folder (all files below it but hidden ones) or a glob, on a local disk or in
object storage. Its files come in the order of their names, so that the same folder is the same
corpus on every machine.
"""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from raytune_llama.config.settings import PLACEMENT, ConfigError, settings
from raytune_llama.data.readers.detection import (
    FORMATS_BY_SUFFIX,
    DetectedFormat,
    FileKind,
    detect_format,
)
from raytune_llama.data.readers.encodings import Encoding
from raytune_llama.data.readers.listing import list_files
from raytune_llama.data.readers.rows import DocumentMode, ReadOptions
from raytune_llama.storage.place import FileStatus, Place

logger = logging.getLogger(__name__)

_NUM_THREADS = 16  # object storage answers one request in tens of milliseconds


@settings
class SourceConfig:
    """One corpus of text."""

    path: Annotated[str, PLACEMENT]
    """File, folder (read recursively, without hidden files) or glob (`**` for any depth), local or
    `s3://...`, `gs://...`. A store is identified by the content and the relative names of the
    files, not by this path."""
    format: Literal["auto", "txt", "json", "jsonl", "parquet"] = "auto"
    """`auto` goes by the suffix of each file, before one of .gz, .bz2 and .zst, and for JSON by
    its first bytes. `json` is one array of objects, or objects one after the other; one task
    reads the whole file. `jsonl` has an object on each line and is read in ranges."""
    document: DocumentMode = "line"
    """What a document of a txt file is: a `line`, the whole `file`, or a paragraph that ends at a
    `blank_line`."""
    encoding: Encoding = "auto"
    """Of txt and JSON files. `auto`: by a mark at the start, else UTF-8, unless the text is
    plainly GB18030 (GBK), which is then logged for each file and stands in the manifest."""
    text_field: str = "text"
    """The field of a JSON object, or the column of a Parquet file, that holds the text."""
    text_aliases: tuple[str, ...] = ()
    """Other names that this field has in some rows; rows read under them are counted."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the run's sequences, relative to the other sources' weights; for all sources or for
    none. Null: every sequence once an epoch. It is the run's, a token store does not depend on
    it."""
    name: Annotated[Annotated[str, Field(pattern=r"^[\w.-]+$")] | None, PLACEMENT] = None
    """Name in metrics and manifests, of letters, digits, `_`, `.` and `-`; no two sources have the
    same. Null: the last part of the path, without suffix and wildcards."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus and how to read it."""

    source: int
    """Index of the configured source that it belongs to."""
    place: Place
    """Where it is."""
    name: str
    """Relative to its source, with "/" between folders."""
    status: FileStatus
    """Its size, and what tells that it was written again."""
    options: ReadOptions
    """How to read it."""
    row_group_bytes: tuple[int, ...] = ()
    """Size of each row group of a Parquet file."""


def discover_files(
    sources: tuple[SourceConfig, ...], *, max_document_bytes: int = 1 << 28
) -> list[SourceFile]:
    """List the files of all sources, in source order and by name within a source.

    The beginning of each file is read, to recognise its encoding and its kind of JSON.

    Args:
        sources: What the config names.
        max_document_bytes: A longer document goes to quarantine unread.

    Raises:
        ConfigError: A source matches no file, a file is of an unknown format, named twice, or
            cannot be opened, or all are empty; all such problems at once, each with its field.
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
    """List what is wrong with the sources, by the beginning of their files only.

    Returns:
        One line a problem, starting with the field's path. Empty when there is none.
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
    """Decide by its name how a file is read, or say why that is not possible."""
    field = f"sources.{number}"
    kind = FileKind.from_name(place.name, source.format)
    problem = None
    if kind is None:
        problem = (
            f"{field}.format: cannot tell the format of {place} by its suffix; wanted one of "
            f"{', '.join('.' + suffix for suffix in FORMATS_BY_SUFFIX)}: set format, or narrow "
            "path with a glob"
        )
    elif kind.format == "txt" and (source.text_field != "text" or source.text_aliases):
        problem = (
            f"{field}.text_field: {place} is plain text and has no fields; drop text_field and "
            "text_aliases"
        )
    elif kind.format != "txt" and source.document != "line":
        problem = f"{field}.document: {place} is {kind.format}, where a row is a document; drop it"
    elif kind.format == "parquet" and source.encoding != "auto":
        problem = f"{field}.encoding: {place} is Parquet, whose text is UTF-8; drop it"
    return (None if problem else kind), problem


def _inspect(
    sources: tuple[SourceConfig, ...],
    file: tuple[int, Place, str, FileStatus],
    kind: FileKind,
) -> DetectedFormat | str:
    """Look into a file; return a line about what is wrong with it instead of raising."""
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
        return f"sources.{number}.path: {place} cannot be read: {error.strerror or error}"


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
