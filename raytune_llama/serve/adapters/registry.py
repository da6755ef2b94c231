"""The directory of adapters: which exist now, by name, and in which version.

    registry = AdapterRegistry(Place.parse("s3://bucket/adapters", "adapters_dir"))
    found = registry.list().get("poet")

A request's name is looked up in the listing and never becomes a path. The directory is listed at
most once per second.
"""

import hashlib
import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from raytune_llama.config.settings import ConfigError
from raytune_llama.serve.errors import EngineError
from raytune_llama.storage.buckets import NUM_CONNECTIONS
from raytune_llama.storage.place import FileStatus, Place, check_place

logger = logging.getLogger(__name__)

PEFT_CONFIG_FILE = "adapter_config.json"
MAX_NAME_CHARACTERS = 256
LISTING_TTL_SECONDS = 1.0
"""How long a listing counts as current."""

SETTLED_SECONDS = 2.0
"""How long files in object storage must stay unchanged to count as settled: servers report
modification times in whole seconds, so two writes within a second can look alike."""

_FOREIGN = (".bin", ".pt", ".pth")
"""Suffixes of files that are never read: pickles."""


class RegistryError(EngineError):
    """The registry can't be read now; the base and loaded adapters continue to work."""


@dataclass(frozen=True)
class RegisteredAdapter:
    """An adapter of the registry."""

    name: str
    """Name of the adapter, which is its directory's."""

    place: Place
    """Directory of the adapter."""

    files: tuple[tuple[str, FileStatus], ...]
    """Files of the adapter, by name."""

    is_settled: bool = True
    """Whether any later write is certain to look different. An adapter loaded before it settled is
    loaded again."""

    @property
    def version(self) -> str:
        """Hash that changes when a file is rewritten, added or removed, and on settling."""
        return hashlib.sha256(repr((self.files, self.is_settled)).encode()).hexdigest()[:16]


class AdapterRegistry:
    """A directory with one subdirectory per adapter. Thread-safe."""

    def __init__(self, root: Place) -> None:
        """Set the directory, which is not read yet."""
        self._root = root
        self._lock = threading.Lock()
        self._listed: dict[str, RegisteredAdapter] = {}
        self._read_at: float | None = None
        self._warned: set[str] = set()
        self._changed: dict[str, tuple[object, float]] = {}

    @classmethod
    def from_path(cls, adapters_dir: str) -> "AdapterRegistry":
        """Open the directory that a config names.

        Raises:
            ConfigError: the path is invalid, its bucket can't be reached, or a local directory
                does not exist.
        """
        try:
            root = Place.parse(adapters_dir, "adapters_dir")
        except ValueError as error:
            raise ConfigError([str(error)]) from error
        problem = check_place(root, "adapters_dir")
        if problem is None and root.is_local and not root.is_dir():
            problem = f"adapters_dir: {root} does not exist; create it, adapters may be added later"
        if problem is not None:
            raise ConfigError([problem])
        return cls(root)

    def list(self, *, refresh: bool = False) -> Mapping[str, RegisteredAdapter]:
        """Return the adapters by name, from a listing at most a second old; may block.

        Args:
            refresh: list the directory now, even if the last listing is current.

        Raises:
            RegistryError: the directory can't be read, and never could.
        """
        with self._lock:
            now = time.monotonic()
            is_fresh = self._read_at is not None and now - self._read_at < LISTING_TTL_SECONDS
            if is_fresh and not refresh:
                return self._listed
            try:
                self._listed = self._read()
            except (OSError, pa.ArrowException) as error:
                if self._read_at is None:
                    raise RegistryError(
                        "the directory of adapters can't be read; retry later"
                    ) from error
                logger.warning("%s can't be read, using the last listing: %s", self._root, error)
            self._read_at = time.monotonic()
            return self._listed

    @contextmanager
    def fetch(self, listed: RegisteredAdapter) -> Iterator[Path]:
        """Yield a local directory with an adapter's files; a download is deleted after the block.

        Raises:
            RegistryError: a file can't be read.
        """
        if listed.place.is_local:
            yield listed.place.path
            return
        names = [name for name, _ in listed.files if not name.endswith(_FOREIGN)]
        with tempfile.TemporaryDirectory(prefix="adapter-") as folder:

            def download(name: str) -> None:
                (listed.place / name).download(Path(folder, name))

            try:
                with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
                    list(pool.map(download, names))
            except (OSError, pa.ArrowException) as error:
                logger.warning("%s can't be fetched: %s", listed.place, error)
                raise RegistryError(
                    f"the adapter {listed.name} can't be fetched; retry later"
                ) from error
            yield Path(folder)

    def _read(self) -> dict[str, RegisteredAdapter]:
        listed: dict[str, RegisteredAdapter] = {}
        for folder, files in self._folders().items():
            if PEFT_CONFIG_FILE not in files or folder.name.startswith("."):
                continue
            if not _is_name(folder.name):
                if folder.name not in self._warned:
                    logger.warning("%s: skipped, its name is not valid for an adapter", folder)
                self._warned.add(folder.name)
                continue
            found = tuple(sorted(files.items()))
            listed[folder.name] = RegisteredAdapter(
                folder.name, folder, found, is_settled=self._is_settled(folder, found)
            )
        return listed

    def _is_settled(self, folder: Place, files: object) -> bool:
        if folder.is_local:
            return True
        now = time.monotonic()
        before, since = self._changed.get(folder.name, (None, now))
        if before != files:
            since = now
        self._changed[folder.name] = (files, since)
        return now - since >= SETTLED_SECONDS

    def _folders(self) -> dict[Place, dict[str, FileStatus]]:
        """Return the files of each subdirectory; in object storage with a single listing."""
        if self._root.is_local:
            return {
                folder: {file.name: status for file, status in folder.files().items()}
                for folder in self._root.folders()
            }
        folders: dict[Place, dict[str, FileStatus]] = {}
        for file, status in self._root.files(recursive=True).items():
            if file.parent.parent == self._root:
                folders.setdefault(file.parent, {})[file.name] = status
        return folders


def _is_name(name: str) -> bool:
    """Whether a directory's name can be the adapter in `model:adapter`."""
    is_plain = name.isprintable() and not set(name) & set(" /\\:")
    return is_plain and 0 < len(name) <= MAX_NAME_CHARACTERS
