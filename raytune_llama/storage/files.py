"""Atomic writes of local files and directories: they appear complete or not at all.

A file is written under a temporary name in its own folder, synced and renamed; a directory is
built beside its target and renamed. A reader therefore never sees partial output, and what it sees
survives a power failure.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytune_llama.config.errors import UserError

OUTPUT_MANIFEST = "manifest.json"
"""File in a stage's output directory that records the outputs and their inputs."""


def sha256_file(path: Path) -> str:
    """Return a file's SHA-256 as lowercase hex; releases the GIL, so threads hash in parallel."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_sibling(path: Path) -> Path:
    """Return a hidden, unique path in the same folder, from which a rename to `path` is atomic."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically and sync it; its folder must exist."""
    temporary = temporary_sibling(path)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json_atomic(path: Path, obj: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write JSON with sorted keys, so that equal values are equal bytes.

    Raises:
        ValueError: A float is NaN or infinite, which is not JSON.
    """
    write_bytes_atomic(path, json_bytes(obj))


def read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read a UTF-8 JSON file.

    Raises:
        ValueError: The file is not JSON; the message names it.
    """
    return parse_json(path.read_bytes(), str(path))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a directory written by this package; empty for any other directory."""
    file = directory / OUTPUT_MANIFEST
    content = read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def json_bytes(obj: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """Return a value as indented UTF-8 JSON with sorted keys; NaN raises a ValueError."""
    text = json.dumps(obj, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False)
    return (text + "\n").encode()


def parse_json(data: bytes, name: str) -> Any:  # noqa: ANN401 - any JSON value
    """Parse a file's bytes as JSON; a ValueError names the file."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"{name}: invalid JSON ({error}); restore or delete the file") from error


def move_directory(source: Path, target: Path) -> None:
    """Sync all files below `source`, then rename it to `target`; both on one file system.

    Raises:
        FileExistsError: `target` exists.
    """
    # rename() would replace an empty folder; never replace an existing target.
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; delete it or choose another path")
    for folder, _, names in os.walk(source):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    source.rename(target)
    sync(target.parent)


@contextlib.contextmanager
def publish_directory(target: Path) -> Iterator[Path]:
    """Build a directory that appears at `target` only after the block has succeeded.

    Yields:
        An empty folder beside `target` to write into; removed if the block raises.

    Raises:
        FileExistsError: `target` exists at the start or at the end of the block.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; delete it or choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(target)
    temporary.mkdir()
    try:
        yield temporary
        move_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RepeatedKeys(dict[str, Any]):
    """A JSON object with duplicate keys; the last value of a key is used."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = frozenset(name for name in names if names.count(name) > 1)


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object from its pairs, for `json`'s `object_pairs_hook`."""
    row = dict(pairs)
    return row if len(row) == len(pairs) else RepeatedKeys(pairs)


KEY_DECODER = json.JSONDecoder(object_pairs_hook=build_object)
"""JSON decoder that returns an object with duplicate keys as `RepeatedKeys`."""
