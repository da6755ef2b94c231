"""Corpora: which files a config names, and what can be said about them without reading them.

A source is a file, a folder (all files below it but hidden ones) or a glob. Its files come in the
order of their names, so that the same folder is the same corpus on every machine.
"""

import glob
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, cast, get_args

from pydantic import Field

from raytune_llama.config import PLACEMENT, ConfigError, settings
from raytune_llama.data.documents import (
    DocumentMode,
    Format,
    ReadOptions,
    SourceError,
    check_parquet,
)
from raytune_llama.storage import local_path


@settings
class SourceConfig:
    """One corpus of text."""

    path: Annotated[str, PLACEMENT]
    """File, folder (read recursively, without hidden files) or glob (`**` for any depth). A store
    is identified by the content and the relative names of the files, not by this path."""
    format: Literal["auto", "txt", "json", "jsonl", "parquet"] = "auto"
    """`auto` goes by the suffix of each file. `json` is an array of objects or one object."""
    document: DocumentMode = "line"
    """What a document of a txt file is: a `line`, the whole `file`, or a paragraph that ends at a
    `blank_line`."""
    text_field: str = "text"
    """The field of a JSON object, or the column of a Parquet file, that holds the text."""
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
    path: Path
    """Absolute."""
    name: str
    """Relative to its source, with "/" between folders."""
    options: ReadOptions
    """How to read it."""


def discover_files(sources: tuple[SourceConfig, ...]) -> list[SourceFile]:
    """List the files of all sources, in source order and by name within a source.

    Raises:
        ConfigError: A source matches no file, a file is of an unknown format or named twice; all
            such problems at once, each with its field.
    """
    problems: list[str] = []
    files: list[SourceFile] = []
    seen: dict[Path, str] = {}
    if not sources:
        problems.append("sources: got an empty list; name at least one file, folder or glob")
    for number, source in enumerate(sources):
        field = f"sources.{number}"
        try:
            matched = _match(source.path, f"{field}.path")
        except ValueError as error:
            problems.append(str(error))
            continue
        for path, name in matched:
            try:
                options = _read_options(source, path, field)
            except ValueError as error:
                problems.append(str(error))
                continue
            same = path.resolve()
            if same in seen:
                problems.append(f"{field}.path: {path} is already part of {seen[same]}")
            seen.setdefault(same, field)
            files.append(SourceFile(number, path, name, options))
    if problems:
        raise ConfigError(problems)
    return files


def check_sources(sources: tuple[SourceConfig, ...]) -> list[str]:
    """List what is wrong with the sources, without reading their text.

    Returns:
        One line a problem, starting with the field's path: nothing matched, unknown format, a
        setting that its format ignores, a file that cannot be opened or holds no byte at all, a
        Parquet file without the text column. Empty when there is none.
    """
    try:
        files = discover_files(sources)
    except ConfigError as error:
        return error.problems
    problems: list[str] = []
    for file in files:
        try:
            with file.path.open("rb") as opened:
                opened.read(1)
            if file.options.format == "parquet":
                check_parquet(file.path, file.options.text_field)
        except OSError as error:
            problems.append(f"sources: {file.path} cannot be read: {error.strerror}")
        except SourceError as error:
            problems.append(f"sources: {error}")
    if not problems and not any(file.path.stat().st_size for file in files):
        problems.append(f"sources: all {len(files)} files are empty; name files with text")
    return problems


def _match(text: str, field: str) -> list[tuple[Path, str]]:
    """Return the files that a path, folder or glob names, with their relative names, sorted."""
    path = local_path(text, field)
    if path.is_file():
        return [(path, path.name)]
    if path.is_dir():
        root, roots = path, [path]
    else:
        root = _glob_root(path)
        roots = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    found = {file for match in roots for file in (_walk(match) if match.is_dir() else [match])}
    if not found:
        raise ValueError(f"{field}: no file matches {path}; check the spelling and the mount")
    named = [(file, PurePosixPath(file.relative_to(root)).as_posix()) for file in found]
    return sorted(named, key=lambda pair: pair[1])


def _glob_root(pattern: Path) -> Path:
    """Return the folder above the first part of a pattern that has a wildcard."""
    parts = pattern.parts
    plain = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:plain])


def _walk(folder: Path) -> list[Path]:
    """List all files below a folder but hidden ones; links to folders are followed once."""
    files: list[Path] = []
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link to a folder above would never end
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files.extend(Path(root, name) for name in names if not name.startswith("."))
    return files


def _read_options(source: SourceConfig, path: Path, field: str) -> ReadOptions:
    """Decide how to read a file; refuse a setting that its format would ignore."""
    kind = path.suffix.lower().removeprefix(".") if source.format == "auto" else source.format
    if kind not in get_args(Format):
        raise ValueError(
            f"{field}.format: cannot tell the format of {path} by its suffix; wanted one of "
            f"{', '.join('.' + name for name in get_args(Format))}: set format, or narrow path "
            "with a glob"
        )
    if kind == "txt" and source.text_field != "text":
        raise ValueError(f"{field}.text_field: {path} is plain text and has no fields; drop it")
    if kind != "txt" and source.document != "line":
        raise ValueError(f"{field}.document: {path} is {kind}, where a row is a document; drop it")
    return ReadOptions(cast("Format", kind), source.document, source.text_field)
