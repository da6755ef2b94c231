"""Paths of files and folders on a local disk or in object storage, and atomic writes to them.

    place = Place.parse("s3://bucket/stores/demo", "data.store_dir")
    (place / "manifest.json").write_json({"documents": 2})

On a local disk, files appear as described in `files.py`; in object storage, when their upload is
complete. `transfers.py` publishes folders.
"""

import contextlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from raytune_llama.config.errors import UserError
from raytune_llama.storage.buckets import REMOTE_OPTIONS, connect, write_object
from raytune_llama.storage.files import (
    json_bytes,
    parse_json,
    sync,
    temporary_sibling,
    write_bytes_atomic,
)
from raytune_llama.storage.hashes import Hasher, show_hash

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_NEAR_SCHEME = re.compile(r"^(s3[an]?|gcs|gs|hf|https?|file):(?!//)/*", re.IGNORECASE)
_HUB = "hf"
_COPY_BYTES = 8 * 2**20
_SERVER_COPY_BYTES = 5 * 2**30  # limit of a server-side copy on S3


@dataclass(frozen=True)
class FileStatus:
    """Metadata of a file."""

    num_bytes: int
    """Size of the file, in bytes."""
    version: str
    """Changes with every write: the file's times, on a local disk also its inode."""


@dataclass(frozen=True, order=True)
class Place:
    """Path of a file or folder; hashable and picklable. `str()` gives it as a user writes it."""

    scheme: str
    """`s3`, `gs`, `hf` for a dataset on the hub, which is only read, or empty for a local path."""
    key: str
    """Absolute path, or `bucket/key`; without a slash at its end."""
    options: str = ""
    """Query string of the URI, such as a custom endpoint; empty if there is none."""

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        """Parse a path or URI.

        Args:
            text: A local path (`~` is expanded, a relative path starts at the current folder),
                `s3://bucket/key` or `gs://bucket/key`, with `?endpoint_override=...` for a server
                other than the vendor's.
            field: Config field that holds it, for the error message.

        Raises:
            ValueError: The text is empty, has an unknown scheme, no bucket, a password or an
                unknown option.
        """
        if not text.strip():
            raise UserError(f"{field}: got an empty path; wanted a file or folder")
        near = _NEAR_SCHEME.match(text)
        if near:
            scheme = near[1].lower()
            raise UserError(
                f"{field}: got {text!r}; a URI has two slashes after its scheme: "
                f"{scheme}://{text[near.end() :]}"
            )
        if not _SCHEME.match(text):
            return cls("", os.path.normpath(Path(text).expanduser().absolute()))
        parts = urlsplit(text)
        known = None if parts.scheme == _HUB else REMOTE_OPTIONS.get(parts.scheme)
        if known is None:
            hub = "; only models and sources can be on the hub" if parts.scheme == _HUB else ""
            wanted = f"a local path, s3://bucket/key or gs://bucket/key{hub}"
            raise UserError(f"{field}: got {text!r}; wanted {wanted}")
        if "@" in parts.netloc:
            raise UserError(
                f"{field}: contains a user name or password; remove it and put the credentials in "
                "the environment or the vendor's credentials file on every node"
            )
        if not parts.netloc:
            raise UserError(f"{field}: got {text!r}, which has no bucket")
        given = parse_qsl(parts.query, keep_blank_values=True)
        unknown = sorted({name for name, _ in given} - known)
        unknown += [f"{name} without a value" for name, value in given if not value]
        if unknown:
            raise UserError(
                f"{field}: unknown option {', '.join(unknown)} in {text!r}; known options: "
                f"{', '.join(f'{name}=...' for name in sorted(known))}"
            )
        # "#" is a legal character in a key, but urlsplit splits there.
        path = parts.path + (f"#{parts.fragment}" if parts.fragment else "")
        return cls(parts.scheme, f"{parts.netloc}/{path.strip('/')}".rstrip("/"), parts.query)

    @classmethod
    def local(cls, path: Path) -> Self:
        """Return the `Place` of a local path."""
        return cls("", os.path.normpath(path.absolute()))

    def __str__(self) -> str:
        if self.is_local:
            return self.key
        return f"{self.scheme}://{self.key}" + (f"?{self.options}" if self.options else "")

    def __truediv__(self, relative: str) -> "Place":
        return Place(self.scheme, f"{self.key.rstrip('/')}/{relative}", self.options)

    @property
    def is_local(self) -> bool:
        """Whether it is a path on this machine, including mounted disks."""
        return not self.scheme

    @property
    def path(self) -> Path:
        """Local path; the place must be local."""
        assert self.is_local, f"{self} is not a local path"
        return Path(self.key)

    @property
    def name(self) -> str:
        """Last component of the path."""
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> "Place":
        """Parent folder; the root of a disk or a bucket is its own parent."""
        folder = str(PurePosixPath(self.key).parent)
        return self if folder == "." else Place(self.scheme, folder, self.options)

    def with_name(self, name: str) -> "Place":
        """Return the place with another name in the same folder."""
        return self.parent / name

    def is_below(self, folder: "Place") -> bool:
        """Whether the path is `folder` or below it, judged by name."""
        same_root = (self.scheme, self.options) == (folder.scheme, folder.options)
        return same_root and PurePosixPath(self.key).is_relative_to(folder.key)

    def relative_to(self, folder: "Place") -> str:
        """Return the path relative to a parent folder, separated by "/"."""
        return PurePosixPath(self.key).relative_to(folder.key).as_posix()

    def status(self) -> FileStatus | None:
        """Return the metadata of a file; None if there is no file (there may be a folder)."""
        with contextlib.suppress(FileNotFoundError):  # deleted between pyarrow's two checks
            info = self._info(self.key)
            return self._status(info) if info.type == pafs.FileType.File else None

    def exists(self) -> bool:
        """Whether a file or folder exists; in object storage a folder exists if it has files."""
        if self.is_local:
            return os.path.lexists(self.key)
        return self._info(self.key).type != pafs.FileType.NotFound

    def is_dir(self) -> bool:
        """Whether the path is an existing folder."""
        return self._info(self.key).type == pafs.FileType.Directory

    def files(self, *, recursive: bool = False) -> dict["Place", FileStatus]:
        """Return the files of a folder, sorted by name; empty if the folder does not exist.

        `recursive` includes the folders below it. Local symlinks to folders are not followed.
        """
        if self.is_local:
            return self._local_files("**/*" if recursive else "*")
        selector = pafs.FileSelector(self.key, allow_not_found=True, recursive=recursive)
        infos = sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path)
        return {
            Place(self.scheme, info.path, self.options): self._status(info)
            for info in infos
            if info.type == pafs.FileType.File
        }

    def folders(self) -> list["Place"]:
        """Return the direct subfolders, sorted by name; empty if the folder does not exist."""
        selector = pafs.FileSelector(self.key, allow_not_found=True)
        infos: list[pafs.FileInfo] = []
        with contextlib.suppress(FileNotFoundError):  # created between pyarrow's two checks
            infos = self.filesystem.get_file_info(selector)
        found = [info for info in infos if info.type == pafs.FileType.Directory]
        return sorted(Place(self.scheme, info.path, self.options) for info in found)

    def open(self) -> pa.NativeFile:
        """Open a file for reading at any offset; use it in a `with`.

        Raises:
            OSError: The file does not exist or cannot be read.
        """
        return self.filesystem.open_input_file(self.key)

    def read_bytes(self) -> bytes:
        """Return the content of a file."""
        with self._named_errors(), self.open() as file:
            return file.read()

    def write_bytes(self, data: bytes) -> None:
        """Write a file atomically; missing parent folders are created."""
        if self.is_local:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(self.path, data)
        else:
            write_object(self.filesystem, self.key, pa.py_buffer(data))

    def hash(self, like: str | None = None) -> str:
        """Return the hash of a file's content; reads or downloads the full file.

        Args:
            like: Recorded hash whose algorithm to use; see `storage.hashes`.
        """
        return self._read_into(None, like)

    def read_json(self) -> Any:  # noqa: ANN401 - any JSON value
        """Read a UTF-8 JSON file.

        Raises:
            ValueError: The file is not JSON; the message names it.
        """
        return parse_json(self.read_bytes(), str(self))

    def write_json(self, obj: Any) -> None:  # noqa: ANN401 - any JSON value
        """Write JSON as `write_json_atomic` does."""
        self.write_bytes(json_bytes(obj))

    def delete(self) -> None:
        """Delete a file or a folder recursively; a missing one is not an error."""
        if self.is_local:
            if self.path.is_dir() and not self.path.is_symlink():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)
        elif self.is_dir():
            self.filesystem.delete_dir(self.key)
        elif self.exists():
            self.filesystem.delete_file(self.key)

    def delete_empty(self) -> None:
        """Delete a folder if it is empty."""
        if self.is_local:
            with contextlib.suppress(OSError):
                self.path.rmdir()
        elif not self.files() and not self.folders():
            self.delete()

    def move(self, target: "Place", *, first: str) -> None:
        """Rename a folder; an existing target is deleted first.

        Object storage has no rename: every file is copied, then the originals are deleted. If the
        process is killed in between, both folders exist.

        Args:
            target: New path, on the same kind of storage.
            first: The first file to delete from the old folder; readers ignore a folder without it.
        """
        target.delete()
        if self.is_local:
            self.path.rename(target.path)
            return
        for file, status in self.files(recursive=True).items():
            copy = target / file.relative_to(self)
            if status.num_bytes <= _SERVER_COPY_BYTES:
                self.filesystem.copy_file(file.key, copy.key)
                continue
            with tempfile.TemporaryDirectory() as folder:
                file.download(Path(folder, file.name))
                copy.upload(Path(folder, file.name))
        (self / first).delete()
        self.delete()

    def upload(self, source: Path) -> None:
        """Upload a local file; it appears at this place only when it is complete."""
        if self.is_local:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_sibling(self.path)
            try:
                shutil.copyfile(source, temporary)
                sync(temporary)
                temporary.replace(self.path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        elif source.stat().st_size == 0:  # an empty file cannot be mapped
            write_object(self.filesystem, self.key, pa.py_buffer(b""))
        else:
            with pa.memory_map(str(source)) as file:
                write_object(self.filesystem, self.key, file.read_buffer())

    def download(self, target: Path, *, wanted: str | None = None) -> None:
        """Copy a file to a local path, which appears only when it is complete and synced.

        Raises:
            ValueError: The hash of its bytes is not `wanted`; no file appears.
        """
        temporary = temporary_sibling(target)
        try:
            with temporary.open("xb") as file:
                got = self._read_into(file, wanted)
            if wanted is not None:
                _check_hash(self, got, wanted)
            sync(temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system on which `key` is a path, for libraries that take one."""
        bucket = self.key.partition("/")[0]
        return connect(self.scheme, "" if self.is_local else bucket, self.options)

    def _local_files(self, pattern: str) -> dict["Place", FileStatus]:
        found = {
            Place.local(path): status
            for path in self.path.glob(pattern)
            if path.is_file() and (status := Place.local(path).status())
        }
        return dict(sorted(found.items()))

    def _read_into(self, target: BinaryIO | None, like: str | None) -> str:
        """Read a file's bytes, copy them to `target` if given, and return their hash."""
        hasher = Hasher(like)
        with self._named_errors(), self.open() as file:
            while block := file.read(_COPY_BYTES):
                hasher.update(block)
                if target is not None:
                    target.write(block)
        return hasher.finish()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Add the file's name to server errors, which lack it."""
        try:
            yield
        except OSError as error:
            if self.is_local or self.key in str(error):
                raise
            raise OSError(f"{self}: {error}") from error

    def _info(self, key: str) -> pafs.FileInfo:
        return self.filesystem.get_file_info(key)

    def _status(self, info: pafs.FileInfo) -> FileStatus:
        size = int(info.size or 0)
        if self.scheme == _HUB:
            return FileStatus(size, info.path.split("/")[2])  # name@commit
        if not self.is_local:
            return FileStatus(size, str(info.mtime_ns))
        # A changed file can have its old size and mtime, but not its old ctime.
        local = Path(info.path).stat()
        return FileStatus(size, f"{local.st_mtime_ns}.{local.st_ctime_ns}.{local.st_ino}")


def _check_hash(place: Place, got: str, wanted: str) -> None:
    if got != wanted:
        raise UserError(f"{place}: its hash is {show_hash(got)}, wanted {show_hash(wanted)}")


def check_place(place: Place, field: str) -> str | None:
    """Return why a place in object storage cannot be used, or None; nothing is written.

    Args:
        place: Place to check; it need not exist.
        field: Config field that holds it, for the message.
    """
    if place.is_local:
        return None
    bucket = Place(place.scheme, place.key.partition("/")[0], place.options)
    try:
        if place.exists() or bucket.exists():
            return None
    except (OSError, pa.ArrowException) as error:
        return (
            f"{field}: {place} cannot be reached ({error}); check the endpoint, the region, and "
            "that this machine's and every node's credentials allow list, read and write access"
        )
    return f"{field}: {place}: there is no bucket {bucket.key}; create it, or use an existing one"


def check_writable(place: Place, field: str) -> str | None:
    """Return why nothing can be written below a place, or None; a file is written and deleted.

    Args:
        place: Place to check; it need not exist.
        field: Config field that holds it, for the message.
    """
    probe = place / f".probe-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"")
        probe.delete()
    except (OSError, pa.ArrowException) as error:
        return (
            f"{field}: {place} cannot be written to ({error}); check that this machine's "
            "credentials allow write and delete access"
        )
    return None


def local_path(text: str, field: str) -> Path:
    """Return a configured path as an absolute local one.

    Args:
        text: Path in the config; `~` is expanded, a relative path starts at the current folder.
        field: Config field that holds it, for the error message.

    Raises:
        ValueError: The path is empty or names object storage (`s3://...`).
    """
    if _SCHEME.match(text):
        raise UserError(
            f"{field}: got {text!r}, but only local paths are supported here; copy it to a disk "
            "that every node mounts and set that path"
        )
    return Place.parse(text, field).path


def is_url(text: str) -> bool:
    """Whether a configured path has a scheme, such as `s3://`; else it is a local one."""
    return _SCHEME.match(text) is not None


def is_submitted_job() -> bool:
    """Whether this process is the driver of a job that was submitted to a cluster."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_run_dir(run_dir: str) -> list[str]:
    """Return why the driver can't keep its results in a directory; empty if it can.

    Args:
        run_dir: directory as the user wrote it.
    """
    is_absolute = "://" in run_dir or Path(run_dir).expanduser().is_absolute()
    if not is_submitted_job() or is_absolute:
        return []
    return [
        f"run_dir: {run_dir!r} is relative, and a submitted job's directory is deleted when the "
        "job ends; give an absolute path"
    ]
