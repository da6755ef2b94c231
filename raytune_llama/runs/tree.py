"""Folders with the sizes and times of their files, read once from a disk or a bucket.

    folder = read_folder(Place.parse("runs", "DIR"))
    folder.num_bytes, folder.modified, folder.folders["demo"].files["run.yaml"]

Hidden folders are left out, except those that jobs write: the lease, and what an unfinished write
or a probe has left. Symbolic links to folders are not followed.
"""

import contextlib
import functools
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from raytune_llama.config.settings import ConfigError
from raytune_llama.storage.lease import LEASE_FOLDER
from raytune_llama.storage.place import Place, check_place

TEMPORARY = re.compile(r"\..+\.tmp")
"""Name of a file or folder that is being written, or that a killed process has left."""

PROBE = re.compile(r"\.probe-[0-9a-f]{32}")
"""Name of a folder in which nodes try whether they can write to a run directory."""


class FileFacts(NamedTuple):
    """Size and time of a file."""

    num_bytes: int
    """Size, in bytes."""
    modified: float
    """Time of the last write, in seconds since the epoch, by the clock of its storage."""


@dataclass(frozen=True)
class Folder:
    """A folder with all that is below it."""

    place: Place
    """Where it is."""
    files: Mapping[str, FileFacts] = field(default_factory=dict)
    """Its own files, by name."""
    folders: Mapping[str, "Folder"] = field(default_factory=dict)
    """Its own folders, by name."""
    problem: str | None = None
    """Why it cannot be read; None if it was."""

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of all files below it."""
        below = sum(folder.num_bytes for folder in self.folders.values())
        return below + sum(file.num_bytes for file in self.files.values())

    @functools.cached_property
    def modified(self) -> float | None:
        """Time of the newest write below it, in seconds since the epoch; None without files."""
        times = [file.modified for file in self.files.values()]
        times += [each.modified for each in self.folders.values() if each.modified is not None]
        return max(times, default=None)

    def walk(self) -> Iterator["Folder"]:
        """Yield the folder and all that are below it, a folder before what is in it."""
        yield self
        for folder in self.folders.values():
            yield from folder.walk()


def read_folder(place: Place) -> Folder:
    """Read a folder with all that is below it.

    Args:
        place: an existing folder, on a disk or in object storage.

    Raises:
        ConfigError: it does not exist, is a file, or the bucket cannot be reached.
    """
    problem = check_place(place, "DIR")
    if problem is None and place.is_local and not place.path.is_dir():
        problem = f"DIR: {place} is not a directory; name one that holds runs"
    if problem is not None:
        raise ConfigError([problem])
    if place.is_local:
        return _read_local(place)
    try:
        folder = _read_remote(place)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError([f"DIR: {place} cannot be listed ({error})"]) from error
    if not folder.files and not folder.folders:
        raise ConfigError([f"DIR: {place} has no files; check the spelling"])
    return folder


def _is_read(name: str) -> bool:
    is_left = TEMPORARY.fullmatch(name) or PROBE.fullmatch(name)
    return not name.startswith(".") or name == LEASE_FOLDER or is_left is not None


def _read_local(place: Place) -> Folder:
    files: dict[str, FileFacts] = {}
    folders: dict[str, Folder] = {}
    try:
        with os.scandir(place.path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return Folder(place)  # deleted by a running job in the meantime
    except OSError as error:
        return Folder(place, problem=f"cannot be listed: {error.strerror}")
    for entry in entries:
        with contextlib.suppress(FileNotFoundError):
            if entry.is_dir(follow_symlinks=False):
                if _is_read(entry.name):
                    folders[entry.name] = _read_local(place / entry.name)
                continue
            status = entry.stat()
            if stat.S_ISREG(status.st_mode):
                files[entry.name] = FileFacts(status.st_size, status.st_mtime)
    return Folder(place, files, folders)


def _read_remote(place: Place) -> Folder:
    """Read a folder in object storage by one listing, in pages of the vendor's."""
    selector = pafs.FileSelector(place.key, recursive=True, allow_not_found=True)
    root = _Growing()
    for info in place.filesystem.get_file_info(selector):
        *parents, name = info.path.removeprefix(f"{place.key}/").split("/")
        if info.type != pafs.FileType.File or not all(map(_is_read, parents)):
            continue
        here = root
        for parent in parents:
            here = here.folders.setdefault(parent, _Growing())
        here.files[name] = FileFacts(int(info.size or 0), (info.mtime_ns or 0) / 1e9)
    return root.finish(place)


@dataclass
class _Growing:
    """A folder whose files are still being listed."""

    files: dict[str, FileFacts] = field(default_factory=dict)
    folders: dict[str, "_Growing"] = field(default_factory=dict)

    def finish(self, place: Place) -> Folder:
        below = {name: self.folders[name].finish(place / name) for name in sorted(self.folders)}
        return Folder(place, dict(sorted(self.files.items())), below)
