"""List the files of a path, folder or glob, on a local disk or in object storage."""

import glob
import os
import re
from pathlib import Path, PurePosixPath

from raytune_llama.config.errors import UserError
from raytune_llama.storage import hub
from raytune_llama.storage.place import FileStatus, Place

ListedFile = tuple[Place, str, FileStatus]
"""A file, its name relative to the listed folder, and its size and version."""


def list_files(place: Place, field: str) -> list[ListedFile]:
    """List the files of a path, folder or glob, sorted by relative name.

    Args:
        place: Path, folder or glob.
        field: Config field that holds it, for error messages.

    Raises:
        ValueError: No file matches, or the place cannot be listed.
    """
    try:
        listed = _list_local(place.path) if place.is_local else _list_remote(place)
    except OSError as error:
        raise UserError(
            f"{field}: {place} cannot be listed ({error}); check the spelling, the bucket and the "
            "credentials"
        ) from error
    if not listed:
        if place.scheme == "hf":
            hub.check_readable(f"{hub.SCHEME}{place.key}", field)
        where = "the mount" if place.is_local else "the bucket"
        raise UserError(f"{field}: no file matches {place}; check the spelling and {where}")
    return sorted(listed, key=lambda one: one[1])


def _list_local(path: Path) -> list[ListedFile]:
    if path.is_file():
        return [_listed(path, path.name)]
    if path.is_dir():
        root, roots = path, [path]
    else:
        root = _glob_root(path)
        roots = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    found = {file for match in roots for file in (_walk(match) if match.is_dir() else [match])}
    return [_listed(file, PurePosixPath(file.relative_to(root)).as_posix()) for file in found]


def _listed(path: Path, name: str) -> ListedFile:
    place = Place.local(path)
    status = place.status()
    if status is None:
        raise FileNotFoundError(f"{path} is a broken link, or not a file")
    return place, name, status


def _glob_root(pattern: Path) -> Path:
    """Return the folder above the first component of a pattern that has a wildcard."""
    parts = pattern.parts
    plain = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:plain])


def _walk(folder: Path) -> list[Path]:
    """List all files below a folder except hidden ones; follow each linked folder once."""
    files: list[Path] = []
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link to a parent folder would loop forever
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files.extend(Path(root, name) for name in names if not name.startswith("."))
    return files


def _list_remote(place: Place) -> list[ListedFile]:
    status = place.status()
    if status is not None:
        return [(place, place.name, status)]
    root, pattern = place, None
    if glob.has_magic(place.key):
        root = Place(place.scheme, _glob_root(Path(place.key)).as_posix(), place.options)
        pattern = _pattern(place.relative_to(root))
    named = [
        (file, file.relative_to(root), status)
        for file, status in root.files(recursive=True).items()
    ]
    return [
        one
        for one in named
        if not any(part.startswith(".") for part in one[1].split("/"))
        and (pattern is None or pattern.fullmatch(one[1]))
    ]


def _pattern(text: str) -> re.Pattern[str]:
    """Translate a glob to a regex; a matching folder includes all files below it."""
    parts: list[str] = []
    for token in re.findall(r"\*\*/|\*\*|\*|\[!?[^\]]+\]|.", text):
        match token:
            case "**/":
                parts.append("(?:[^/]+/)*")
            case "**":
                parts.append(".*")
            case "*":
                parts.append("[^/]*")
            case "[" | "]":
                parts.append(re.escape(token))
            case _ if len(token) > 1:
                parts.append(token.replace("[!", "[^", 1))
            case _:
                parts.append(re.escape(token))
    return re.compile("".join(parts) + "(?:/.*)?")
