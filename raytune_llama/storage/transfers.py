"""Transfers between a place and this node's disk: publish folders, cache verified file copies.

Object storage has no rename and no append. A folder there is complete once the file that is
uploaded last exists; a growing file is written on the local disk and uploaded in full.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raytune_llama.config.errors import UserError
from raytune_llama.storage.buckets import NUM_CONNECTIONS
from raytune_llama.storage.files import publish_directory
from raytune_llama.storage.hashes import hash_hex
from raytune_llama.storage.place import Place


@contextlib.contextmanager
def publish_place(target: Place, last: str, entry: str | None = None) -> Iterator[Path]:
    """Build a directory that is complete only after the block has succeeded.

    Args:
        target: A local folder appears by a rename; in object storage the files are uploaded. Files
            of an earlier attempt are kept, unless a new file has the same name.
        last: File to upload last, relative to the folder; readers ignore a folder without it.
        entry: File to upload just before it, if there is one: what other programs look for, so that
            they see no folder of which files are missing either.

    Yields:
        An empty local folder to write into; removed if the block raises.

    Raises:
        FileExistsError: `target` exists; in object storage, its file `last` does.
    """
    if target.is_local:
        with publish_directory(target.path) as folder:
            yield folder
        return
    if is_published(target, last):
        raise FileExistsError(f"{target} exists; delete it or choose another path")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield folder
        ends = [folder / name for name in (entry, last) if name and (folder / name).is_file()]
        files = [path for path in folder.rglob("*") if path.is_file() and path not in ends]

        def upload(path: Path) -> None:
            (target / path.relative_to(folder).as_posix()).upload(path)

        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            list(pool.map(upload, sorted(files)))
        for path in ends:
            upload(path)


def is_published(target: Place, last: str) -> bool:
    """Whether `publish_place` has completed: a local folder appears at once, an uploaded one not.

    Args:
        target: Folder to check.
        last: File that is uploaded last.
    """
    return target.exists() if target.is_local else (target / last).exists()


class Mirror:
    """A local folder mirrored to a place: the place itself if local, else a temporary folder.

    On a local disk writes are visible at once, in object storage after the next `push`.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._temporary = None if place.is_local else tempfile.TemporaryDirectory()
        self._pushed: dict[Path, tuple[int, int]] = {}
        self.folder = place.path if self._temporary is None else Path(self._temporary.name)
        """Local folder to write into."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def push(self) -> None:
        """Upload every file written since the last push."""
        if self._temporary is None:
            return
        for path in sorted(self.folder.rglob("*")):
            state = path.stat()
            written = (state.st_size, state.st_mtime_ns)
            if path.is_file() and self._pushed.get(path) != written:
                (self._place / path.relative_to(self.folder).as_posix()).upload(path)
                self._pushed[path] = written

    def close(self) -> None:
        """Push one last time and delete the temporary folder."""
        try:
            self.push()
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()


CACHE_ENVIRONMENT = "RAYTUNE_LLAMA_CACHE_DIR"
"""Environment variable with a node's cache folder, on a disk of its own."""


def default_cache_dir() -> Path:
    """Return this node's cache folder: that of `CACHE_ENVIRONMENT`, or one in the user's cache."""
    chosen = os.environ.get(CACHE_ENVIRONMENT)
    if chosen:
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "raytune_llama"


def local_copy_path(place: Place, wanted: str, cache_dir: Path) -> Path:
    """Return the local path of a file's copy, which may not exist; a local file's own path."""
    return (
        place.path if place.is_local else cache_dir / f"{hash_hex(wanted)}{Path(place.name).suffix}"
    )


def local_copy(place: Place, *, wanted: str, num_bytes: int, cache_dir: Path) -> Path:
    """Return the path of a local copy of a file; for a local file, its own path, unchecked.

    A file in object storage is copied once to `<cache_dir>/<hash><suffix>`, shared by all
    processes of the node: the first one downloads it and the others wait. Size and hash are checked
    before it appears there, and the size on each later use.

    Raises:
        OSError: The file cannot be read, or the copy cannot be written.
        ValueError: The file does not match `wanted`, its hash, or `num_bytes`.
    """
    target = local_copy_path(place, wanted, cache_dir)
    if place.is_local or _num_bytes(target) == num_bytes:
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    # A lock file cannot be deleted safely, so many copies share a few.
    with (cache_dir / f".lock-{hash_hex(wanted)[:2]}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _num_bytes(target) != num_bytes:
            status = place.status()
            if status is not None and status.num_bytes != num_bytes:
                raise UserError(f"{place}: has {status.num_bytes} bytes, wanted {num_bytes}")
            place.download(target, wanted=wanted)
    return target


def _num_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
