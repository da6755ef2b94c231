"""This node's copies of folders in object storage: fetched once, whatever the number of processes.

    folder = NodeCache.from_environment().fetch(Place.parse("s3://bucket/model", field), field)

A copy is of one state of its folder: its key is the folder's URI and the sizes and versions of its
files. A copy that was interrupted continues where it stopped; `complete.json` lists what is whole
and checked, and nothing else is trusted. A process that uses a copy holds a lock on it until the
process ends; to make room, the copies that were not used for longest and that nobody holds are
deleted. Locks are those of the kernel (flock), so the folder must be on a disk of the node's own.
"""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import pyarrow as pa

from raytune_llama.config.errors import UserError
from raytune_llama.logs import waiting
from raytune_llama.storage.buckets import NUM_CONNECTIONS
from raytune_llama.storage.files import (
    json_bytes,
    read_json,
    read_manifest,
    sync,
    write_json_atomic,
)
from raytune_llama.storage.hashes import hash_bytes, hash_file, hash_hex
from raytune_llama.storage.model_files import is_model_file, is_weights, refuse_pickles
from raytune_llama.storage.place import FileStatus, Place
from raytune_llama.storage.transfers import CACHE_ENVIRONMENT, default_cache_dir

logger = logging.getLogger(__name__)

LIMIT_ENVIRONMENT = "RAYTUNE_LLAMA_CACHE_GIB"
"""Environment variable with the maximum size of a node's copies, in GiB; unset: the disk's."""

_COMPLETE = "complete.json"
_WANTED = "wanted.json"
_READ_BYTES = 8 * 2**20

_IN_USE: dict[Path, IO[str]] = {}
"""Open lock files of the copies that this process uses, by copy; closed when the process ends."""


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file while the block runs; other processes of the node wait.

    Args:
        path: File to lock; created with its folder. It is never deleted.
        what: What is waited for if another process holds it, for the log.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with waiting(logger, what, usually="as long as the fetch takes"):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def show_size(num_bytes: int) -> str:
    """Return a size in MB or GB, for messages."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


@dataclass(frozen=True)
class _Copy:
    """A copy of one state of a folder."""

    root: Path
    key: str

    @property
    def path(self) -> Path:
        return self.root / self.key

    @property
    def use_lock(self) -> Path:
        return self.root / ".locks" / f"{self.key}.use"

    @property
    def fetch_lock(self) -> Path:
        return self.root / ".locks" / f"{self.key}.fetch"

    def complete(self) -> set[str]:
        """Return the names of the files that are whole and checked."""
        file = self.path / _COMPLETE
        return set(read_json(file)) if file.is_file() else set()

    def wanted_bytes(self) -> int:
        """Return the size that the copy has or will have, in bytes."""
        file = self.path / _WANTED
        return int(read_json(file)["bytes"]) if file.is_file() else self.present_bytes()

    def present_bytes(self) -> int:
        """Return the size of the present files, in bytes."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def last_used(self) -> float:
        file = self.path / _WANTED
        return file.stat().st_mtime if file.is_file() else 0.0

    def hold(self) -> None:
        """Keep the copy from being deleted until this process ends."""
        if self.path in _IN_USE:
            return
        self.use_lock.parent.mkdir(parents=True, exist_ok=True)
        file = self.use_lock.open("w")
        fcntl.flock(file, fcntl.LOCK_SH)
        _IN_USE[self.path] = file

    def delete_unless_used(self) -> bool:
        """Delete the copy and return True, unless a process holds it."""
        with self.use_lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            # First what says that it is whole: a kill in between leaves a copy to continue.
            (self.path / _COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(self.path)
            return True


@dataclass(frozen=True)
class NodeCache:
    """Copies of folders in object storage on one disk of this node."""

    root: Path
    """Folder of the copies."""

    max_bytes: int | None = None
    """Maximum size of all copies; None: limited by the disk."""

    @classmethod
    def from_environment(cls) -> Self:
        """Return the cache of this node; see `default_cache_dir` and `LIMIT_ENVIRONMENT`.

        Raises:
            ValueError: The limit is not a positive number.
        """
        text = os.environ.get(LIMIT_ENVIRONMENT)
        limit = None
        if text:
            try:
                limit = int(float(text) * 2**30)
            except ValueError:
                limit = 0
            if limit <= 0:
                raise UserError(
                    f"{LIMIT_ENVIRONMENT}: got {text!r}, wanted a number of GiB above 0"
                )
        return cls(default_cache_dir() / "folders", limit)

    def fetch(self, place: Place, field: str, *, weights: bool = True) -> Path:
        """Return a whole, checked copy of a folder's model files; fetch what is missing.

        The copy stays at least until this process ends.

        Args:
            place: Folder in object storage.
            field: Config field that holds it, for messages.
            weights: Whether to fetch the weights, which can be most of the bytes.

        Raises:
            ValueError: The folder can't be read or has no model files, its weights are pickles,
                it changes meanwhile, a file differs from the folder's manifest, or there is no
                room.
        """
        files = list_model_files(place, field)
        names = {name: status for name, status in files.items() if weights or not is_weights(name)}
        copy = _Copy(self.root, _key(place, files))
        folder = copy.path / (place.name or "bucket")
        try:
            copy.hold()
            with locked(copy.fetch_lock, f"another process fetches {place}"):
                if not set(names) <= copy.complete():
                    self._complete(copy, place, names, folder, field)
                    if list_model_files(place, field) != files:
                        raise UserError(
                            f"{field}: {place} was written while it was fetched; run the command "
                            "again"
                        )
                    write_json_atomic(copy.path / _COMPLETE, sorted(copy.complete() | set(names)))
                os.utime(copy.path / _WANTED)
        except OSError as error:
            raise UserError(f"{field}: {place} cannot be copied to {self.root}: {error}") from error
        return folder

    def _complete(
        self,
        copy: _Copy,
        place: Place,
        files: Mapping[str, FileStatus],
        folder: Path,
        field: str,
    ) -> None:
        """Make room, fetch the files of a copy that are missing, and check them."""
        self._reserve(copy, sum(status.num_bytes for status in files.values()), place, field)
        _download(place, files, folder, field)
        _verify(folder, set(files) - copy.complete(), f"{field}: {place}")

    def _reserve(self, copy: _Copy, num_bytes: int, place: Place, field: str) -> None:
        """Make room for a copy and record its size; delete copies that nobody uses if needed."""
        with locked(self.root / ".locks" / "room", "another process makes room in the cache"):
            copy.path.mkdir(parents=True, exist_ok=True)
            others = [
                _Copy(self.root, path.name)
                for path in self.root.iterdir()
                if path.name not in {".locks", copy.key}
            ]
            # Nothing is deleted for what would not fit into an empty cache either.
            every = sum(other.present_bytes() for other in others)
            shortage = self._find_shortage(copy, [], num_bytes, freed=every)
            if shortage is not None:
                raise UserError(f"{field}: no room for {place}: {shortage}")
            for oldest in [*sorted(others, key=_Copy.last_used), None]:
                shortage = self._find_shortage(copy, others, num_bytes)
                if shortage is None:
                    break
                if oldest is None:
                    raise UserError(f"{field}: no room for {place}: {shortage}")
                if oldest.delete_unless_used():
                    logger.info("deleted %s from the cache to make room for %s", oldest.path, place)
                    others.remove(oldest)
            write_json_atomic(copy.path / _WANTED, {"place": str(place), "bytes": num_bytes})

    def _find_shortage(
        self, copy: _Copy, others: list[_Copy], num_bytes: int, *, freed: int = 0
    ) -> str | None:
        """Return why there is no room for a copy beside the others, or None.

        `freed` are bytes on the disk that could be deleted.
        """
        promised = sum(other.wanted_bytes() for other in others)
        if self.max_bytes is not None and promised + num_bytes > self.max_bytes:
            return (
                f"it takes {show_size(num_bytes)}, but the cache may hold "
                f"{show_size(self.max_bytes)}, of which {show_size(promised)} are in use; raise "
                f"{LIMIT_ENVIRONMENT}, or end what uses {self.root}"
            )
        missing = num_bytes - copy.present_bytes()
        unwritten = sum(max(0, other.wanted_bytes() - other.present_bytes()) for other in others)
        free = shutil.disk_usage(self.root).free + freed
        if missing + unwritten > free:
            return (
                f"{show_size(missing)} are to be fetched, but {self.root} has "
                f"{show_size(free)} free, of which {show_size(unwritten)} are promised to other "
                f"fetches; free space, or set {CACHE_ENVIRONMENT} to a larger disk"
            )
        return None


def _key(place: Place, files: Mapping[str, FileStatus]) -> str:
    state = {name: [status.num_bytes, status.version] for name, status in files.items()}
    return hash_hex(hash_bytes(json_bytes([str(place), state])))[:32]


def list_model_files(place: Place, field: str) -> dict[str, FileStatus]:
    """Return the model files of a folder in object storage by name.

    Args:
        place: The folder.
        field: Config field that holds it, for messages.

    Raises:
        ValueError: It can't be listed, or has no model files, or has weights only as pickles.
    """
    try:
        found = {
            file.relative_to(place): status for file, status in place.files(recursive=True).items()
        }
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{field}: {place} cannot be listed ({error}); check the spelling, the endpoint, and "
            "that this node's credentials allow list and read access"
        ) from error
    if not found:
        raise UserError(f"{field}: {place} has no files; check the spelling and the bucket")
    refuse_pickles(found, f"{field}: {place}")
    files = {name: status for name, status in found.items() if is_model_file(name)}
    if not files:
        raise UserError(
            f"{field}: {place} has none of a model's files, only {', '.join(sorted(found)[:3])}"
        )
    return files


def _download(place: Place, files: Mapping[str, FileStatus], folder: Path, field: str) -> None:
    """Fetch the files that are not there yet; unfinished ones continue."""
    missing = {
        name: status
        for name, status in files.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != status.num_bytes
    }
    num_bytes = sum(status.num_bytes for status in missing.values())
    what = f"{field}: fetching {len(missing)} files, {show_size(num_bytes)}, from {place}"
    logger.info("%s to %s", what, folder)

    def fetch(name: str) -> None:
        try:
            _download_file(place / name, missing[name], folder / name)
        except OSError as error:
            raise UserError(f"{field}: {place / name} cannot be fetched: {error}") from error

    with (
        waiting(logger, what, usually="1 to 10 s per GB"),
        ThreadPoolExecutor(NUM_CONNECTIONS) as pool,
    ):
        list(pool.map(fetch, sorted(missing)))


def _download_file(source: Place, status: FileStatus, target: Path) -> None:
    """Fetch a file, or the rest of it; it appears under its name when it is whole and synced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with source.open() as file, part.open("ab") as output:
        if output.tell() > status.num_bytes:
            output.truncate(0)
        file.seek(output.tell())
        while block := file.read(_READ_BYTES):
            output.write(block)
            output.flush()
    if part.stat().st_size != status.num_bytes:
        got = part.stat().st_size
        part.unlink()
        raise OSError(f"got {got} bytes, wanted {status.num_bytes}")
    sync(part)
    part.replace(target)


def _verify(folder: Path, names: set[str], what: str) -> None:
    """Compare new files with the hashes in the folder's own manifest, if it has any."""
    recorded = read_manifest(folder).get("files")
    for name, digest in recorded.items() if isinstance(recorded, dict) else ():
        file = folder / name
        # A manifest is not ours: it may name any file of this machine, and hold anything.
        if name not in names or not isinstance(digest, str):
            continue
        if hash_file(file, like=digest) != digest:
            file.unlink()
            raise UserError(
                f"{what}: {name} differs from its hash in manifest.json; run the command "
                "again, and if it differs again, publish the folder again"
            )
