"""Places of files and folders, on a local disk or in object storage, and how things appear there.

    place = Place.parse("s3://bucket/stores/demo", "data.store_dir")
    (place / "manifest.json").write_json({"documents": 2})

On a local disk files appear as `files.py` says, in object storage when their upload is complete.
How whole folders appear is in `transfers.py`.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
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

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_COPY_BYTES = 8 * 2**20
_SERVER_COPY_BYTES = 5 * 2**30  # S3 copies no larger object by itself


@dataclass(frozen=True)
class FileStatus:
    """What is known of a file without reading it."""

    num_bytes: int
    """Its size."""
    version: str
    """Changes when the file is written again: its times, and on a local disk its inode."""


@dataclass(frozen=True, order=True)
class Place:
    """A file or folder; hashable and picklable, `str()` gives it as a user would write it."""

    scheme: str
    """`s3`, `gs`, or empty for a local path."""
    key: str
    """Absolute path, or `bucket/key`; without a slash at its end."""
    options: str = ""
    """What stands behind `?` in the URI, such as an endpoint of one's own."""

    @classmethod
    def parse(cls, text: str, field: str) -> Self:
        """Read what a user wrote.

        Args:
            text: A local path (`~` is expanded, a relative one starts at the current folder),
                `s3://bucket/key` or `gs://bucket/key`, with `?endpoint_override=...` for a server
                other than the vendor's.
            field: The config field that holds it, for the error message.

        Raises:
            ValueError: The text is empty, of an unknown scheme, without bucket, holds a password
                or an unknown option.
        """
        if not text.strip():
            raise UserError(f"{field}: got an empty path; name a file or folder")
        if not _SCHEME.match(text):
            return cls("", os.path.normpath(Path(text).expanduser().absolute()))
        parts = urlsplit(text)
        known = REMOTE_OPTIONS.get(parts.scheme)
        if known is None:
            raise UserError(
                f"{field}: got {text!r}; wanted a local path, s3://bucket/key or gs://bucket/key"
            )
        if "@" in parts.netloc:
            raise UserError(
                f"{field}: holds a user name or a password; drop it and put the credentials into "
                "the environment or the vendor's credentials file of every node"
            )
        if not parts.netloc:
            raise UserError(f"{field}: got {text!r}, which names no bucket")
        given = parse_qsl(parts.query, keep_blank_values=True)
        unknown = sorted({name for name, _ in given} - known)
        unknown += [f"{name} without a value" for name, value in given if not value]
        if unknown:
            raise UserError(
                f"{field}: unknown option {', '.join(unknown)} in {text!r}; there are: "
                f"{', '.join(f'{name}=...' for name in sorted(known))}"
            )
        # A "#" is a legal character of a key, which urlsplit cuts at.
        path = parts.path + (f"#{parts.fragment}" if parts.fragment else "")
        return cls(parts.scheme, f"{parts.netloc}/{path.strip('/')}".rstrip("/"), parts.query)

    @classmethod
    def local(cls, path: Path) -> Self:
        """Return the place of a local path."""
        return cls("", os.path.normpath(path.absolute()))

    def __str__(self) -> str:
        if self.is_local:
            return self.key
        return f"{self.scheme}://{self.key}" + (f"?{self.options}" if self.options else "")

    def __truediv__(self, relative: str) -> "Place":
        return Place(self.scheme, f"{self.key.rstrip('/')}/{relative}", self.options)

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine (or of a disk that it mounts)."""
        return not self.scheme

    @property
    def path(self) -> Path:
        """The local path."""
        assert self.is_local, f"{self} is no local path"
        return Path(self.key)

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> "Place":
        """The folder that it is in; of a whole disk or bucket, itself."""
        folder = str(PurePosixPath(self.key).parent)
        return self if folder == "." else Place(self.scheme, folder, self.options)

    def with_name(self, name: str) -> "Place":
        """Return its neighbour of another name."""
        return self.parent / name

    def is_below(self, folder: "Place") -> bool:
        """Whether it is a folder or anything in it, by name."""
        same_root = (self.scheme, self.options) == (folder.scheme, folder.options)
        return same_root and PurePosixPath(self.key).is_relative_to(folder.key)

    def relative_to(self, folder: "Place") -> str:
        """Return the parts behind a folder above it, with "/" between them."""
        return PurePosixPath(self.key).relative_to(folder.key).as_posix()

    def status(self) -> FileStatus | None:
        """Return what is known of a file; None where there is no file (but perhaps a folder)."""
        with contextlib.suppress(FileNotFoundError):  # it has gone between two looks at it
            info = self._info(self.key)
            return self._status(info) if info.type == pafs.FileType.File else None

    def exists(self) -> bool:
        """Whether there is a file or folder; in object storage a folder exists by its files."""
        if self.is_local:
            return os.path.lexists(self.key)
        return self._info(self.key).type != pafs.FileType.NotFound

    def is_dir(self) -> bool:
        """Whether there is a folder."""
        return self._info(self.key).type == pafs.FileType.Directory

    def files(self, *, recursive: bool = False) -> dict["Place", FileStatus]:
        """List the files of a folder (of all below it) by name; empty where there is no folder.

        A local link to a folder is not followed.
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
        """List the folders right below a folder by name; empty where there is no folder."""
        selector = pafs.FileSelector(self.key, allow_not_found=True)
        infos: list[pafs.FileInfo] = []
        with contextlib.suppress(FileNotFoundError):  # it was made between pyarrow's two looks
            infos = self.filesystem.get_file_info(selector)
        found = [info for info in infos if info.type == pafs.FileType.Directory]
        return sorted(Place(self.scheme, info.path, self.options) for info in found)

    def open(self) -> pa.NativeFile:
        """Open a file for reading at any offset; use it in a `with`.

        Raises:
            OSError: There is no such file, or it cannot be read.
        """
        return self.filesystem.open_input_file(self.key)

    def read_bytes(self) -> bytes:
        """Read a whole file."""
        with self._named_errors(), self.open() as file:
            return file.read()

    def write_bytes(self, data: bytes) -> None:
        """Write a file that is either the old one or whole; folders above it are made."""
        if self.is_local:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(self.path, data)
        else:
            write_object(self.filesystem, self.key, pa.py_buffer(data))

    def sha256(self) -> str:
        """Hash a file's bytes as lower-case hex; all of them are read, from wherever it is."""
        return self._read_into(None)

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
        """Delete a file, or a folder with all below it; nothing there is no error."""
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
        """Delete a folder that nothing is in; any other stays."""
        if self.is_local:
            with contextlib.suppress(OSError):
                self.path.rmdir()
        elif not self.files() and not self.folders():
            self.delete()

    def move(self, target: "Place", *, first: str) -> None:
        """Give a folder another name; what has that name is deleted before.

        Object storage has no rename: there every file is copied, and then deleted here. Killed in
        between, both are there.

        Args:
            target: The new name; at the same kind of place.
            first: The file that is deleted here before the others, without which a reader does
                not trust what is left.
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
        """Write a local file's bytes; the file appears when all of them are there."""
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
        elif source.stat().st_size == 0:  # which cannot be mapped
            write_object(self.filesystem, self.key, pa.py_buffer(b""))
        else:
            with pa.memory_map(str(source)) as file:
                write_object(self.filesystem, self.key, file.read_buffer())

    def download(self, target: Path, *, sha256: str | None = None) -> None:
        """Copy a file to a local path, which appears when it is whole and on the disk.

        Raises:
            ValueError: Its bytes have another hash than the one given; nothing appears.
        """
        temporary = temporary_sibling(target)
        try:
            with temporary.open("xb") as file:
                got = self._read_into(file)
            if sha256 is not None:
                _check_hash(self, got, sha256)
            sync(temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @property
    def filesystem(self) -> pafs.FileSystem:
        """Where `key` is a path; for libraries that speak pyarrow's own types."""
        bucket = self.key.partition("/")[0]
        return connect(self.scheme, "" if self.is_local else bucket, self.options)

    def _local_files(self, pattern: str) -> dict["Place", FileStatus]:
        found = {
            Place.local(path): status
            for path in self.path.glob(pattern)
            if path.is_file() and (status := Place.local(path).status())
        }
        return dict(sorted(found.items()))

    def _read_into(self, target: BinaryIO | None) -> str:
        """Copy a file's bytes, where a target is given, and return their hash."""
        digest = hashlib.sha256()
        with self._named_errors(), self.open() as file:
            while block := file.read(_COPY_BYTES):
                digest.update(block)
                if target is not None:
                    target.write(block)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name the file in errors of a server, which say what failed but not with what."""
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
        if not self.is_local:
            return FileStatus(size, str(info.mtime_ns))
        # A changed file can keep its size and be given its old time, but not its change time.
        local = Path(info.path).stat()
        return FileStatus(size, f"{local.st_mtime_ns}.{local.st_ctime_ns}.{local.st_ino}")


def _check_hash(place: Place, got: str, wanted: str) -> None:
    if got != wanted:
        raise UserError(f"{place}: SHA-256 is {got}, wanted {wanted}")


def check_place(place: Place, field: str) -> str | None:
    """Return why a place in object storage cannot be used, or None; nothing is written.

    Args:
        place: Where something is, or will be.
        field: The config field that holds it, for the message.
    """
    if place.is_local:
        return None
    bucket = Place(place.scheme, place.key.partition("/")[0], place.options)
    try:
        if place.exists() or bucket.exists():
            return None
    except (OSError, pa.ArrowException) as error:
        return (
            f"{field}: {place} cannot be reached ({error}); check the endpoint and the region, and "
            "that the credentials of this machine and of every node may list, read and write there"
        )
    return (
        f"{field}: {place}: there is no bucket {bucket.key}; create it, or name one that is there"
    )


def local_path(text: str, field: str) -> Path:
    """Turn a configured path into an absolute local one.

    Args:
        text: What the user wrote; `~` is expanded, a relative path starts at the current folder.
        field: The config field that holds it, for the error message.

    Raises:
        ValueError: The path is empty or names object storage (`s3://...`).
    """
    if _SCHEME.match(text):
        raise UserError(
            f"{field}: got {text!r}, but only a local path can be read there; copy it to a disk "
            "that every node mounts and name that path"
        )
    return Place.parse(text, field).path
