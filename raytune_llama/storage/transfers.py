"""What goes between a place and this node's disk: whole folders, and checked copies of files.

Object storage has no rename and no append. A folder there counts as whole when the file that is
uploaded last is there; a file that grows is collected on the local disk and uploaded whole.
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
from raytune_llama.storage.place import Place


@contextlib.contextmanager
def publish_place(target: Place, last: str) -> Iterator[Path]:
    """Build a directory that counts as whole only when the block has succeeded.

    Args:
        target: A local folder appears by a rename; in object storage the files are uploaded. What
            an earlier attempt left there stays, unless a new file has its name.
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
    if is_published(target, last):
        raise FileExistsError(f"{target} exists; delete it or choose another place")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield folder
        files = [path for path in folder.rglob("*") if path.is_file() and path != folder / last]

        def upload(path: Path) -> None:
            (target / path.relative_to(folder).as_posix()).upload(path)

        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            list(pool.map(upload, sorted(files)))
        upload(folder / last)


def is_published(target: Place, last: str) -> bool:
    """Whether `publish_place` has ended there: a local folder appears whole, an uploaded one not.

    Args:
        target: The folder.
        last: The file that is uploaded last.
    """
    return target.exists() if target.is_local else (target / last).exists()


class Mirror:
    """A local folder whose files appear at a place: the place itself, or a temporary one.

    On a local disk a file is there as it is written, in object storage as it was at the last
    `push`.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._temporary = None if place.is_local else tempfile.TemporaryDirectory()
        self._pushed: dict[Path, tuple[int, int]] = {}
        self.folder = place.path if self._temporary is None else Path(self._temporary.name)
        """Where to write."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def push(self) -> None:
        """Bring every file that was written since the last time to the place."""
        if self._temporary is None:
            return
        for path in sorted(self.folder.rglob("*")):
            state = path.stat()
            written = (state.st_size, state.st_mtime_ns)
            if path.is_file() and self._pushed.get(path) != written:
                (self._place / path.relative_to(self.folder).as_posix()).upload(path)
                self._pushed[path] = written

    def close(self) -> None:
        """Push a last time, and end."""
        try:
            self.push()
        finally:
            if self._temporary is not None:
                self._temporary.cleanup()


def default_cache_dir() -> Path:
    """Return this node's folder for copies: `raytune_llama` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "raytune_llama"


def local_copy_path(place: Place, sha256: str, cache_dir: Path) -> Path:
    """Return where a file's bytes lie on this node, or would: of a file on the disk, its own."""
    return place.path if place.is_local else cache_dir / f"{sha256}{Path(place.name).suffix}"


def local_copy(place: Place, *, sha256: str, num_bytes: int, cache_dir: Path) -> Path:
    """Return a local path to a file's bytes: of a file on the disk its own, unchecked.

    A file in object storage is copied once to `<cache_dir>/<sha256><suffix>`, where all processes
    of the node find it: who comes first fetches it and the others wait. Its size and hash are
    checked before it appears there, and its size whenever it is found there.

    Raises:
        OSError: The file cannot be read, or not be written on the local disk.
        ValueError: The file has other bytes than `sha256` and `num_bytes` say.
    """
    target = local_copy_path(place, sha256, cache_dir)
    if place.is_local or _num_bytes(target) == num_bytes:
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    # A lock's file cannot be deleted safely: so there are few, that many copies share.
    with (cache_dir / f".lock-{sha256[:2]}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _num_bytes(target) != num_bytes:
            status = place.status()
            if status is not None and status.num_bytes != num_bytes:
                raise UserError(f"{place}: has {status.num_bytes} bytes, wanted {num_bytes}")
            place.download(target, sha256=sha256)
    return target


def _num_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
