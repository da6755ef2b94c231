"""Content hashes that name their algorithm.

    recorded = hash_file(path)                          # "blake3:9f86d081..."
    is_unchanged = hash_file(path, like=recorded) == recorded

New hashes are BLAKE3, which is several times as fast as SHA-256. Releases before it wrote SHA-256
without the algorithm's name; what they wrote is still checked, with SHA-256.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from blake3 import blake3

from raytune_llama.config.errors import UserError

Algorithm = Literal["blake3", "sha256"]
"""Algorithms of hashes that this release reads; it writes the first."""

HASH_KEYS = ("hash", "sha256")
"""Keys of a content hash in JSON; the second is of releases that wrote SHA-256."""

_DISPLAYED: dict[Algorithm, str] = {"blake3": "BLAKE3", "sha256": "SHA-256"}
_READ_BYTES = 4 << 20
_SHOWN_CHARACTERS = 16


class _Digest(Protocol):
    def update(self, data: Any, /) -> object: ...  # noqa: ANN401  # any buffer

    def hexdigest(self) -> str: ...


class Hasher:
    """Hashes bytes piece by piece; releases the GIL for large pieces, so threads can share work."""

    def __init__(self, like: str | None = None) -> None:
        """Start a hash.

        Args:
            like: Recorded hash whose algorithm to use; None: BLAKE3.

        Raises:
            ValueError: The recorded hash is of an unknown algorithm.
        """
        self._algorithm = algorithm_of(like)
        self._digest: _Digest = blake3() if self._algorithm == "blake3" else hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._digest.update(data)

    def finish(self) -> str:
        """Return the hash, as `algorithm:hex`; SHA-256, only written by older releases, as hex."""
        digest = self._digest.hexdigest()
        return digest if self._algorithm == "sha256" else f"{self._algorithm}:{digest}"


def hash_bytes(data: bytes | memoryview, like: str | None = None) -> str:
    """Return the hash of bytes; see `Hasher`."""
    hasher = Hasher(like)
    hasher.update(data)
    return hasher.finish()


def hash_file(path: Path, like: str | None = None) -> str:
    """Return the hash of a file's content; see `Hasher`.

    Raises:
        OSError: The file cannot be read.
    """
    hasher, buffer = Hasher(like), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(buffer):
            hasher.update(buffer[:num_bytes])
    return hasher.finish()


def algorithm_of(recorded: str | None) -> Algorithm:
    """Return the algorithm of a recorded hash; None: of new ones.

    Raises:
        ValueError: This release does not know the algorithm.
    """
    if recorded is None:
        return "blake3"
    name, separator, _ = recorded.partition(":")
    if not separator:
        return "sha256"
    if name != "blake3":
        raise UserError(
            f"the hash {recorded!r} is of an algorithm that this release does not know; use the "
            "release that wrote it"
        )
    return name


def hash_key(name: str, like: str | None) -> str:
    """Return the key of a hash in JSON whose hashes have the algorithm of `like`.

    Args:
        name: Current key, such as `hash` or `template_hash`; older releases wrote `sha256`, not
            `hash`.
        like: Recorded hash of the same document; None: a new document.
    """
    return name if algorithm_of(like) == "blake3" else name.replace("hash", "sha256")


def find_hash(entry: Mapping[str, Any], name: str = "hash") -> str | None:
    """Return a hash that is recorded under its current key or an older one; None if there is none.

    Args:
        entry: JSON object that records it.
        name: Current key; see `hash_key`.
    """
    found = entry.get(name) or entry.get(name.replace("hash", "sha256"))
    return found if isinstance(found, str) else None


def hash_hex(recorded: str) -> str:
    """Return the digest of a hash without its algorithm, for file names."""
    return recorded.rpartition(":")[2]


def show_hash(recorded: str) -> str:
    """Return the algorithm and the first digits of a hash, for messages."""
    return f"{_DISPLAYED[algorithm_of(recorded)]} {hash_hex(recorded)[:_SHOWN_CHARACTERS]}"
