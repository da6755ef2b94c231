"""Corpora: the files that a config names, and how to read each of them.

A source is a file, a folder (all files below it except hidden ones) or a glob, on a local disk or
in object storage. What `side_files.py` recognizes as no data is skipped. The files are sorted by
name, so that the same folder is the same corpus on every machine.
"""

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from raytune_llama.config.settings import ConfigError
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.detection import (
    FORMATS_BY_SUFFIX,
    DetectedFormat,
    FileKind,
    detect_format,
)
from raytune_llama.data.readers.listing import list_files
from raytune_llama.data.readers.rows import TABLE_FORMATS, ReadOptions
from raytune_llama.data.readers.side_files import is_side_file
from raytune_llama.storage.directories import parse_source
from raytune_llama.storage.place import FileStatus, Place

logger = logging.getLogger(__name__)

RowKind = Literal["texts", "objects"]
"""What the rows of files are read as: the text in one of their fields, or objects."""

_NUM_THREADS = 16  # a request to object storage takes tens of milliseconds
_NUM_SHOWN = 5
_SUFFIXES: dict[RowKind, str] = {
    "texts": ", ".join(f".{suffix}" for suffix in FORMATS_BY_SUFFIX),
    "objects": ", ".join(f".{suffix}" for suffix in FORMATS_BY_SUFFIX if suffix != "txt"),
}

_FoundFile = tuple[int, Place, str, FileStatus]  # source, place, name in the source, status


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
    """Size of each row group or Arrow record batch, in bytes; empty unless a table."""

    @property
    def end(self) -> int:
        """End of the file's last range: a number of row groups for tables, else of bytes."""
        return len(self.row_group_bytes) if self.options.is_table else self.status.num_bytes


def discover_files(
    sources: tuple[SourceConfig, ...],
    *,
    max_document_bytes: int = 1 << 28,
    rows: RowKind = "texts",
    is_quiet: bool = False,
) -> list[SourceFile]:
    """List the files of all sources, in source order and by name within a source.

    Reads the beginning of each file to detect its encoding, and JSON or JSON Lines. Files beside
    the data that hold none, such as a README.md in a folder, are skipped and logged per source.

    Args:
        sources: Sources in the config.
        max_document_bytes: Maximum size of a document; longer ones are quarantined unread.
        rows: What rows are read as. Objects have no text field, and are not read from plain text.
        is_quiet: Whether to log nothing, as for a look at files before it is decided how to read
            them.

    Raises:
        ConfigError: A source matches no file, a file has an unknown format, is listed twice or
            cannot be opened, or all are empty; reports all problems together, each with its field.
    """
    problems: list[str] = []
    if not sources:
        problems.append("sources: got an empty list; name at least one file, folder or glob")
    found, skipped = _list_all(sources, rows, problems)
    readable = _choose_kinds(sources, found, rows, problems)
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        inspected = list(
            threads.map(lambda pair: _inspect(sources, pair[0], pair[1], rows), readable)
        )
    problems += [result for result in inspected if isinstance(result, str)]
    problems.sort(key=_source_number)
    if found and not problems and not any(status.num_bytes for *_, status in found):
        problems.append(f"sources: all {len(found)} files are empty; name files with text")
    if problems:
        raise ConfigError(problems)
    if not is_quiet:
        _log_skipped(skipped)
        _log_notes(readable, inspected)
    return [
        _source_file(sources, file, result, max_document_bytes, rows)
        for (file, _), result in zip(readable, inspected, strict=True)
        if not isinstance(result, str)
    ]


def _list_all(
    sources: tuple[SourceConfig, ...], rows: RowKind, problems: list[str]
) -> tuple[list[_FoundFile], list[tuple[Place, list[str]]]]:
    """List the files of all sources that can hold data, and the names of the others per source."""
    found: list[_FoundFile] = []
    skipped: list[tuple[Place, list[str]]] = []
    seen: dict[str, str] = {}
    for number, source in enumerate(sources):
        field = f"sources.{number}.path"
        try:
            path = parse_source(source.path, field)
            matched = list_files(path, field)
        except ValueError as error:
            problems.append(str(error))
            continue
        others: list[str] = []
        for place, name, status in matched:
            # A file that is named itself is read, whatever its name.
            if place != path and is_side_file(place, status, source.format):
                others.append(name)
                continue
            same = str(place.path.resolve()) if place.is_local else str(place)
            if same in seen:
                problems.append(f"{field}: {place} is already part of {seen[same]}")
            seen.setdefault(same, f"sources.{number}")
            found.append((number, place, name, status))
        if len(others) == len(matched):
            problems.append(
                f"{field}: {path} has no data, only {_name_some(others)}; wanted "
                f"{_SUFFIXES[rows]} files, or the name of one file"
            )
        elif others:
            skipped.append((path, others))
    return found, skipped


def _log_skipped(skipped: list[tuple[Place, list[str]]]) -> None:
    for path, names in skipped:
        logger.info(
            "%s: skipped %d files that hold no data, as their names say: %s; name a file itself to "
            "read it",
            path,
            len(names),
            _name_some(names),
        )


def _name_first(places: list[Place]) -> str:
    more = f" and {len(places) - 1} more files" if len(places) > 1 else ""
    return f"{places[0]}{more}"


def _name_some(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more


def _choose_kinds(
    sources: tuple[SourceConfig, ...],
    found: list[_FoundFile],
    rows: RowKind,
    problems: list[str],
) -> list[tuple[_FoundFile, FileKind]]:
    """Return the format of each file by its name; files with the same problem share a line."""
    kinds: list[tuple[_FoundFile, FileKind]] = []
    refused: dict[tuple[int, _Refusal], list[Place]] = {}
    for file in found:
        number, place, *_ = file
        kind = _kind_of(sources[number], place, rows)
        if isinstance(kind, FileKind):
            kinds.append((file, kind))
        else:
            refused.setdefault((number, kind), []).append(place)
    for (number, refusal), places in refused.items():
        named = _name_first(places)
        problems.append(f"sources.{number}.{refusal.field}: {refusal.got} {named}{refusal.wanted}")
    return kinds


def _log_notes(
    readable: list[tuple[_FoundFile, FileKind]], inspected: list[DetectedFormat | str]
) -> None:
    """Log what was detected and not declared; files of a source with the same note share a line."""
    noted: dict[tuple[int, str], list[Place]] = {}
    for ((number, place, *_), _), inspection in zip(readable, inspected, strict=True):
        if isinstance(inspection, DetectedFormat):
            for note in inspection.notes:
                noted.setdefault((number, note), []).append(place)
    for (_, note), places in noted.items():
        logger.warning("%s: %s", _name_first(places), note)


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


@dataclass(frozen=True)
class _Refusal:
    """Why a file cannot be read as configured, in the parts of a message around its name."""

    field: str
    got: str
    wanted: str


def _kind_of(source: SourceConfig, place: Place, rows: RowKind) -> FileKind | _Refusal:
    """Return the format of a file from its name, or the problem with it."""
    kind = FileKind.from_name(place.name, source.format)
    if kind is None:
        suffix = PurePosixPath(place.name.lower()).suffix or "none"
        # The field `format` of conversations is that of their rows.
        field, remedy = ("format", "set format, or ") if rows == "texts" else ("path", "")
        wanted = f"; wanted {_SUFFIXES[rows]}: {remedy}narrow path with a glob"
        return _Refusal(field, f"unknown suffix {suffix} of", wanted)
    if kind.format == "txt" and rows == "objects":
        wanted = f"; conversations are read from {_SUFFIXES[rows]} files: narrow path with a glob"
        return _Refusal("path", "got plain text:", wanted)
    if kind.format == "txt" and (source.text_field != "text" or source.text_aliases):
        remedy = ", which has no fields; remove text_field and text_aliases"
        return _Refusal("text_field", f"got {source.text_field!r} for plain text:", remedy)
    if kind.format != "txt" and source.document != "line":
        remedy = ", where each row is a document; remove document, or set it to line"
        return _Refusal("document", f"got {source.document} for {kind.format}:", remedy)
    if kind.format in TABLE_FORMATS and source.encoding != "auto":
        remedy = ", whose text is always UTF-8; remove encoding"
        return _Refusal("encoding", f"got {source.encoding} for {kind.format}:", remedy)
    return kind


def _inspect(
    sources: tuple[SourceConfig, ...], file: _FoundFile, kind: FileKind, rows: RowKind
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
            text_fields=_text_fields(source, rows),
        )
    except ValueError as error:
        return f"sources.{number}: {error}"
    except OSError as error:
        # pyarrow's own text repeats the path.
        cause = os.strerror(error.errno) if error.errno else error
        return f"sources.{number}.path: {place} cannot be read: {cause}"


def _source_file(
    sources: tuple[SourceConfig, ...],
    file: _FoundFile,
    inspection: DetectedFormat,
    max_document_bytes: int,
    rows: RowKind,
) -> SourceFile:
    number, place, name, status = file
    source = sources[number]
    options = ReadOptions(
        format=inspection.kind.format,
        compression=inspection.kind.compression,
        encoding=inspection.encoding.codec,
        bom_bytes=inspection.encoding.bom_bytes,
        document=source.document,
        text_fields=_text_fields(source, rows),
        max_document_bytes=max_document_bytes,
    )
    return SourceFile(number, place, name, status, options, inspection.row_group_bytes)


def _text_fields(source: SourceConfig, rows: RowKind) -> tuple[str, ...]:
    return (source.text_field, *source.text_aliases) if rows == "texts" else ()
