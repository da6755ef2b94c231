"""Places of files and folders, on a local disk or in object storage, and how things appear there.

    place = Place.parse("s3://bucket/stores/demo", "data.store_dir")
    (place / "manifest.json").write_json({"documents": 2})

On a local disk things appear as `files.py` says. Object storage has no rename: a file appears
there when its upload is complete, and a directory counts as whole when the file that is written
last is there. A reader therefore never meets half of anything.
"""

import contextlib
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from raytune_llama.files import (
    json_bytes,
    parse_json,
    publish_directory,
    sync,
    temporary_sibling,
    write_bytes_atomic,
)

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_REMOTE_OPTIONS = {"s3": {"endpoint_override", "scheme", "region"}, "gs": {"endpoint_override"}}
_NUM_ATTEMPTS = 8  # of a request to S3, with growing pauses: about half a minute
_CONNECT_SECONDS = 10
_REQUEST_SECONDS = 60
_COPY_BYTES = 8 * 2**20


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
            raise ValueError(f"{field}: got an empty path; name a file or folder")
        if not _SCHEME.match(text):
            return cls("", os.path.normpath(Path(text).expanduser().absolute()))
        parts = urlsplit(text)
        known = _REMOTE_OPTIONS.get(parts.scheme)
        if known is None:
            raise ValueError(
                f"{field}: got {text!r}; wanted a local path, s3://bucket/key or gs://bucket/key"
            )
        if "@" in parts.netloc:
            raise ValueError(
                f"{field}: holds a user name or a password; drop it and put the credentials into "
                "the environment or the vendor's credentials file of every node"
            )
        if not parts.netloc:
            raise ValueError(f"{field}: got {text!r}, which names no bucket")
        unknown = sorted({name for name, _ in parse_qsl(parts.query)} - known)
        if unknown:
            raise ValueError(
                f"{field}: unknown option {', '.join(unknown)} in {text!r}; there are: "
                f"{', '.join(sorted(known))}"
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
        """The folder that it is in."""
        return Place(self.scheme, str(PurePosixPath(self.key).parent), self.options)

    def with_name(self, name: str) -> "Place":
        """Return its neighbour of another name."""
        return self.parent / name

    def relative_to(self, folder: "Place") -> str:
        """Return the parts behind a folder above it, with "/" between them."""
        return PurePosixPath(self.key).relative_to(folder.key).as_posix()

    def status(self) -> FileStatus | None:
        """Return what is known of a file; None where there is no file (but perhaps a folder)."""
        info = self._info(self.key)
        return _status(info) if info.type == pafs.FileType.File else None

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
        selector = pafs.FileSelector(self.key, allow_not_found=True, recursive=recursive)
        infos = sorted(self._filesystem.get_file_info(selector), key=lambda info: info.path)
        return {
            Place(self.scheme, info.path, self.options): _status(info)
            for info in infos
            if info.type == pafs.FileType.File
        }

    def folders(self) -> list["Place"]:
        """List the folders right below a folder by name; empty where there is no folder."""
        selector = pafs.FileSelector(self.key, allow_not_found=True)
        return sorted(
            Place(self.scheme, info.path, self.options)
            for info in self._filesystem.get_file_info(selector)
            if info.type == pafs.FileType.Directory
        )

    def open(self) -> pa.NativeFile:
        """Open a file for reading at any offset; use it in a `with`.

        Raises:
            OSError: There is no such file, or it cannot be read.
        """
        return self._filesystem.open_input_file(self.key)

    def read_bytes(self) -> bytes:
        """Read a whole file."""
        with self.open() as file:
            return file.read()

    def write_bytes(self, data: bytes) -> None:
        """Write a file that is either the old one or whole; folders above it are made."""
        if self.is_local:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(self.path, data)
            return
        with self._filesystem.open_output_stream(self.key) as file:
            file.write(data)

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
            self._filesystem.delete_dir(self.key)
        elif self.exists():
            self._filesystem.delete_file(self.key)

    def upload(self, source: Path) -> None:
        """Write a local file's bytes; the file appears when all of them are there."""
        if self.is_local:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_sibling(self.path)
            shutil.copyfile(source, temporary)
            sync(temporary)
            temporary.replace(self.path)
            return
        with source.open("rb") as file, self._filesystem.open_output_stream(self.key) as target:
            while block := file.read(_COPY_BYTES):
                target.write(block)

    def download(self, target: Path) -> None:
        """Copy a file to a local path, which appears when it is whole."""
        temporary = temporary_sibling(target)
        try:
            with self.open() as source, temporary.open("xb") as file:
                while block := source.read(_COPY_BYTES):
                    file.write(block)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @property
    def _filesystem(self) -> pafs.FileSystem:
        bucket = self.key.partition("/")[0]
        return _filesystem(self.scheme, "" if self.is_local else bucket, self.options)

    def _info(self, key: str) -> pafs.FileInfo:
        return self._filesystem.get_file_info(key)


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str, bucket: str, options: str) -> pafs.FileSystem:
    """Connect to a bucket; the credentials come from the vendor's own chain."""
    if not scheme:
        return pafs.LocalFileSystem()
    query = f"?{options}" if options else ""
    # This asks the vendor for the bucket's region where none is given.
    filesystem, _ = pafs.FileSystem.from_uri(f"{scheme}://{bucket}{query}")
    if not isinstance(filesystem, pafs.S3FileSystem):
        return filesystem
    given = dict(parse_qsl(options))
    return pafs.S3FileSystem(
        region=filesystem.region,
        endpoint_override=given.get("endpoint_override"),
        scheme=given.get("scheme", "https"),
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_NUM_ATTEMPTS),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
    )


def _status(info: pafs.FileInfo) -> FileStatus:
    size = int(info.size or 0)
    if not isinstance(info.path, str) or not info.path.startswith("/"):
        return FileStatus(size, str(info.mtime_ns))
    # A changed file can keep its size and be given its old time; it cannot keep its change time.
    local = Path(info.path).stat()
    return FileStatus(size, f"{local.st_mtime_ns}.{local.st_ctime_ns}.{local.st_ino}")


@contextlib.contextmanager
def publish_place(target: Place, last: str) -> Iterator[Path]:
    """Build a directory that counts as whole only when the block has succeeded.

    Args:
        target: A local folder appears by a rename; in object storage the files are uploaded.
        last: The file, relative to the folder, without which a reader does not trust it.

    Yields:
        An empty local folder to write into; removed when the block raises.

    Raises:
        FileExistsError: `target` exists: locally anything, in object storage its file `last`.
    """
    if target.is_local:
        with publish_directory(target.path) as folder:
            yield folder
        return
    if (target / last).exists():
        raise FileExistsError(f"{target} exists; delete it or choose another place")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield folder
        files = [path for path in folder.rglob("*") if path.is_file() and path != folder / last]
        for path in [*sorted(files), folder / last]:
            (target / path.relative_to(folder).as_posix()).upload(path)


def local_path(text: str, field: str) -> Path:
    """Turn a configured path into an absolute local one.

    Args:
        text: What the user wrote; `~` is expanded, a relative path starts at the current folder.
        field: The config field that holds it, for the error message.

    Raises:
        ValueError: The path is empty or names object storage (`s3://...`).
    """
    if _SCHEME.match(text):
        raise ValueError(
            f"{field}: got {text!r}, but only a local path can be read there; copy it to a disk "
            "that every node mounts and name that path"
        )
    return Place.parse(text, field).path
