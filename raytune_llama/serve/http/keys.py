"""API keys: who may ask. Only their hashes are kept, and none is ever logged."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path

from raytune_llama.config import ConfigError

KEY_BYTES = 32
_HEX_DIGITS = 64


@dataclass(frozen=True)
class Keys:
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


def read_keys(path: Path) -> Keys:
    """Read a file of SHA256 hashes, one a line in hexadecimal; `#` begins a remark.

    Raises:
        ConfigError: the file can't be read, holds no hash, or a line is none, as a plain key is.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"keys_file: {path} can't be read: {error}"]) from error
    hashes: list[bytes] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip().lower()
        if not text:
            continue
        if len(text) == _HEX_DIGITS and not set(text) - set("0123456789abcdef"):
            hashes.append(bytes.fromhex(text))
        else:
            # Not shown: it may be a key.
            problems.append(
                f"keys_file: {path}:{number} is no SHA256 in hexadecimal; write the hash of the "
                "key there, never the key"
            )
    if not hashes and not problems:
        problems.append(f"keys_file: {path} has no key; nobody could ask anything")
    if problems:
        raise ConfigError(problems)
    return Keys(tuple(hashes))


def make_key() -> tuple[str, str]:
    """Return a new key and the line for the file of hashes."""
    key = f"sk-{secrets.token_urlsafe(KEY_BYTES)}"
    return key, hashlib.sha256(key.encode()).hexdigest()
