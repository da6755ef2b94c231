"""Disks that fail, or processes that are killed, at the n-th call that touches the disk."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Never, Self

import pytest

Fault = Callable[[], Never]


def no_space() -> Never:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> Never:
    """End this process as SIGKILL does: nothing is flushed and nothing cleaned up."""
    os._exit(9)


class Calls:
    """Counts calls that open for writing, write, flush, rename, make or delete, and fails one."""

    def __init__(self, folder: Path, *, fail_at: int | None, fault: Fault = no_space) -> None:
        """Watch what is below a folder.

        Args:
            folder: other places are left alone.
            fail_at: the number of the call that fails, from 0; None: none does.
            fault: how it fails.
        """
        self._folder, self._fail_at, self._fault = str(folder), fail_at, fault
        self.names: list[str] = []

    def _touch(self, name: str, path: object) -> None:
        if not str(path).startswith(self._folder):
            return
        self.names.append(name)
        if len(self.names) - 1 == self._fail_at:
            self._fault()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch while the block runs."""
        with pytest.MonkeyPatch.context() as patch:
            self._watch_files(patch)
            for name in ("replace", "rename", "mkdir", "unlink"):
                self._watch_method(patch, Path, name)
            self._watch_method(patch, shutil, "rmtree")
            yield

    def _watch_method(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:  # noqa: ANN401
        real = getattr(owner, name)

        def watched(path: Path, *args: object, **options: object) -> object:
            self._touch(name, path)
            return real(path, *args, **options)

        patch.setattr(owner, name, watched)

    def _watch_files(self, patch: pytest.MonkeyPatch) -> None:
        real_open, real_sync = Path.open, os.fsync

        def open_watched(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:  # noqa: ANN401
            if mode not in ("wb", "xb"):
                return real_open(path, mode, *args, **options)
            self._touch("open", path)
            file: Any = real_open(path, mode, *args, **options)
            return _WatchedFile(file, lambda: self._touch("write", path))

        def sync_watched(descriptor: int) -> None:
            self._touch("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
            real_sync(descriptor)

        patch.setattr(Path, "open", open_watched)
        patch.setattr(os, "fsync", sync_watched)


class _WatchedFile:
    """Writes the first half of what is written before a fault can come, and then the rest."""

    def __init__(self, file: BinaryIO, touch: Callable[[], None]) -> None:
        self._file, self._touch = file, touch

    def write(self, data: bytes | memoryview) -> None:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._touch()
        self._file.write(data[half:])

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
