"""API keys: who may ask. Only their hashes are kept, and none is ever logged."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raytune_llama.config.settings import ConfigError

KEY_BYTES = 32
ENVIRONMENT_NAME = "RAYTUNE_LLAMA_API_KEYS"
"""Variable that holds hashes of keys, with commas or white space between them."""

_HEX_DIGITS = 64


@dataclass(frozen=True)
class ApiKeys:
    """The keys that are let in; empty: everyone is."""

    hashes: tuple[bytes, ...] = ()
    """SHA256 of each."""

    def find(self, key: str) -> str | None:
        """Return a name of a key that is let in, the beginning of its hash; None: it is not.

        All keys are compared, each in constant time: how long it takes tells nothing.
        """
        digest = hashlib.sha256(key.encode()).digest()
        found = [known for known in self.hashes if hmac.compare_digest(known, digest)]
        return found[0].hex()[:8] if found else None

    def __add__(self, other: "ApiKeys") -> "ApiKeys":
        """Return the keys of both."""
        return ApiKeys(tuple(dict.fromkeys(self.hashes + other.hashes)))


def _hash_of(text: str) -> bytes | None:
    """Return the hash that is written in hexadecimal; None: none is."""
    text = text.lower()
    is_hash = len(text) == _HEX_DIGITS and not set(text) - set("0123456789abcdef")
    return bytes.fromhex(text) if is_hash else None


def keys_from_environment(environment: Mapping[str, str]) -> ApiKeys:
    """Return the keys whose SHA256 hashes an environment has; none where it has no variable.

    Raises:
        ConfigError: the variable holds something else than hashes, as a plain key is.
    """
    texts = [text for text in re.split(r"[,\s]+", environment.get(ENVIRONMENT_NAME, "")) if text]
    hashes = [_hash_of(text) for text in texts]
    # Not shown: they may be keys.
    problems = [
        f"{ENVIRONMENT_NAME}: entry {number} is no SHA256 in hexadecimal; write the hash of the "
        "key there, never the key"
        for number, one in enumerate(hashes, start=1)
        if one is None
    ]
    if ENVIRONMENT_NAME in environment and not texts:
        problems.append(f"{ENVIRONMENT_NAME}: has no key; unset it, or write hashes there")
    if problems:
        raise ConfigError(problems)
    return ApiKeys(tuple(one for one in hashes if one is not None))


def load_keys(path: Path | None, environment: Mapping[str, str]) -> ApiKeys:
    """Return the keys of a file, None: no file, and those of an environment.

    Raises:
        ConfigError: the file can't be read, holds no hash, or one of both holds something else.
    """
    found = keys_from_environment(environment)
    return found if path is None else read_keys(path) + found


def read_keys(path: Path) -> ApiKeys:
    """Read a file of SHA256 hashes, one a line in hexadecimal; `#` begins a remark.

    Raises:
        ConfigError: the file can't be read, holds no hash, or a line is none, as a plain key is.
    """
    try:
        hashes = _read_hashes(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"keys_file: {path} can't be read: {error}"]) from error
    if not hashes:
        raise ConfigError([f"keys_file: {path} has no key; nobody could ask anything"])
    return ApiKeys(hashes)


def _read_hashes(path: Path) -> tuple[bytes, ...]:
    """Return the hashes of a file, maybe none.

    Raises:
        ConfigError: a line is none.
        OSError: the file can't be read; or UnicodeDecodeError.
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
            # Not shown: it may be a key.
            problems.append(
                f"keys_file: {path}:{number} is no SHA256 in hexadecimal; write the hash of the "
                "key there, never the key"
            )
    if problems:
        raise ConfigError(problems)
    return tuple(hashes)


def make_key() -> tuple[str, str]:
    """Return a new key and the line for the file of hashes."""
    key = f"sk-{secrets.token_urlsafe(KEY_BYTES)}"
    return key, hashlib.sha256(key.encode()).hexdigest()


def append_hash(path: Path, line: str, name: str = "") -> None:
    """Write a hash below those of a file, which only its owner may read from then on.

    Args:
        path: of the file; made where it is not there.
        line: as `make_key` returns it.
        name: whose key it is, written as a remark.

    Raises:
        ConfigError: the file has a line that is no hash: it is another file, or holds a key.
    """
    if path.exists():
        _read_hashes(path)
    remark = f"  # {' '.join(name.split())}" if name.strip() else ""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        os.fchmod(descriptor, 0o600)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        begin = "" if file.read(1) in {b"", b"\n"} else "\n"
        file.write(f"{begin}{line}{remark}\n".encode())
