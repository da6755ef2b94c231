"""API keys. Only their SHA-256 hashes are stored, and no key is ever logged."""

import hashlib
import hmac
import logging
import os
import re
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raytune_llama.config.settings import ConfigError

logger = logging.getLogger(__name__)

KEY_BYTES = 32
POLL_SECONDS = 2.0
"""Seconds between two looks whether a keys file has changed."""

ENVIRONMENT_NAME = "RAYTUNE_LLAMA_API_KEYS"
"""Environment variable with the hashes of keys, separated by commas or whitespace."""

_HEX_DIGITS = 64


class AcceptedKeys(Protocol):
    """Which API keys are accepted."""

    @property
    def is_required(self) -> bool:
        """Whether a request needs a key."""
        ...

    def find(self, key: str) -> str | None:
        """Return the name of an accepted key; otherwise None."""
        ...


@dataclass(frozen=True)
class ApiKeys:
    """The accepted API keys; if empty, no key is required."""

    hashes: tuple[bytes, ...] = ()
    """SHA-256 hash of each key."""

    @property
    def is_required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self.hashes)

    def find(self, key: str) -> str | None:
        """Return the name of an accepted key, the first 8 hex digits of its hash; otherwise None.

        All keys are compared, each in constant time, so that the duration reveals nothing.
        """
        digest = hashlib.sha256(key.encode()).digest()
        found = [known for known in self.hashes if hmac.compare_digest(known, digest)]
        return found[0].hex()[:8] if found else None

    def __add__(self, other: "ApiKeys") -> "ApiKeys":
        """Return the union of both sets of keys."""
        return ApiKeys(tuple(dict.fromkeys(self.hashes + other.hashes)))


class WatchedKeys:
    """The keys of a file, which is read again when it has changed, and others.

    If the file can't be read, the keys that were read last stay accepted; if it has none any more,
    only the others are. A key is required in any case.
    """

    is_required = True

    def __init__(self, path: Path, others: ApiKeys) -> None:
        """Read the file, and start to watch it.

        Args:
            path: keys file.
            others: keys that are accepted whatever the file has.

        Raises:
            ConfigError: as of `read_keys`.
        """
        self._path, self._others = path, others
        self._seen = _stamp(path)
        self._current = read_keys(path) + others
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="keys", daemon=True).start()

    def find(self, key: str) -> str | None:
        """Return the name of an accepted key, as `ApiKeys.find` does; otherwise None."""
        return self._current.find(key)

    def close(self) -> None:
        """Stop watching the file."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            seen = _stamp(self._path)
            if seen == self._seen:
                continue
            self._seen = seen
            try:
                hashes = _read_hashes(self._path)
            except (OSError, UnicodeDecodeError, ConfigError) as error:
                logger.error(  # noqa: TRY400  # the message is enough
                    "keys_file: %s has changed and can't be read; the keys that were read before "
                    "stay accepted: %s",
                    self._path,
                    error,
                )
                continue
            self._current = ApiKeys(hashes) + self._others
            logger.info("keys_file: %s has changed: %d keys", self._path, len(hashes))


def watch_keys(
    keys_file: str | None, environment: Mapping[str, str], built_with: ApiKeys
) -> AcceptedKeys:
    """Return the keys of a file that may change (None: no file), of an environment, and others.

    Raises:
        ConfigError: as of `load_keys`.
    """
    others = keys_from_environment(environment) + built_with
    return others if keys_file is None else WatchedKeys(Path(keys_file), others)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what differs when a file was written or replaced; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _hash_of(text: str) -> bytes | None:
    """Parse a SHA-256 hash in hexadecimal; None if the text is not one."""
    text = text.lower()
    is_hash = len(text) == _HEX_DIGITS and not set(text) - set("0123456789abcdef")
    return bytes.fromhex(text) if is_hash else None


def keys_from_environment(environment: Mapping[str, str]) -> ApiKeys:
    """Return the keys whose hashes are in the environment variable; none if it is not set.

    Raises:
        ConfigError: the variable is empty or has an entry that is not a hash, such as a plain key.
    """
    texts = [text for text in re.split(r"[,\s]+", environment.get(ENVIRONMENT_NAME, "")) if text]
    hashes = [_hash_of(text) for text in texts]
    # The entries are not shown: they may be keys.
    problems = [
        f"{ENVIRONMENT_NAME}: entry {number} is not a SHA-256 hash in hexadecimal; set it to the "
        "hash of the key, never to the key itself"
        for number, one in enumerate(hashes, start=1)
        if one is None
    ]
    if ENVIRONMENT_NAME in environment and not texts:
        problems.append(f"{ENVIRONMENT_NAME}: is empty; unset it, or set it to hashes of keys")
    if problems:
        raise ConfigError(problems)
    return ApiKeys(tuple(one for one in hashes if one is not None))


def load_keys(path: Path | None, environment: Mapping[str, str]) -> ApiKeys:
    """Return the keys of a file (None: no file) and of an environment.

    Raises:
        ConfigError: the file can't be read or contains no hash, or an entry of either is not one.
    """
    found = keys_from_environment(environment)
    return found if path is None else read_keys(path) + found


def read_keys(path: Path) -> ApiKeys:
    """Read a file of SHA-256 hashes in hexadecimal, one per line; `#` starts a comment.

    Raises:
        ConfigError: the file can't be read, contains no hash, or has a line that is not a hash,
            such as a plain key.
    """
    try:
        hashes = _read_hashes(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"keys_file: {path} can't be read: {error}"]) from error
    if not hashes:
        raise ConfigError([f"keys_file: {path} contains no hash; all requests would be rejected"])
    return ApiKeys(hashes)


def _read_hashes(path: Path) -> tuple[bytes, ...]:
    """Return the hashes in a file, possibly none.

    Raises:
        ConfigError: a line is not a hash.
        OSError: the file can't be read.
        UnicodeDecodeError: the file is not UTF-8.
    """
    hashes: list[bytes] = []
    problems: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _hash_of(text)
        if found is not None:
            hashes.append(found)
        else:
            # The line is not shown: it may be a key.
            problems.append(
                f"keys_file: {path}:{number} is not a SHA-256 hash in hexadecimal; write the hash "
                "of the key, never the key itself"
            )
    if problems:
        raise ConfigError(problems)
    return tuple(hashes)


def make_key() -> tuple[str, str]:
    """Return a new key and its SHA-256 hash in hexadecimal, the line for the keys file."""
    key = f"sk-{secrets.token_urlsafe(KEY_BYTES)}"
    return key, hashlib.sha256(key.encode()).hexdigest()


def append_hash(path: Path, line: str, name: str = "") -> None:
    """Append a hash to a keys file and make the file readable by its owner only.

    Args:
        path: keys file; created if missing.
        line: hash as returned by `make_key`.
        name: owner of the key, written as a comment.

    Raises:
        ConfigError: a line of the file is not a hash: it is another file, or contains a key.
    """
    if path.exists():
        _read_hashes(path)
    comment = f"  # {' '.join(name.split())}" if name.strip() else ""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        os.fchmod(descriptor, 0o600)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        begin = "" if file.read(1) in {b"", b"\n"} else "\n"
        file.write(f"{begin}{line}{comment}\n".encode())
