"""What a token store is made of and what is in it: `manifest.json` and the fingerprint."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import pydantic

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import find_differences
from raytune_llama.storage.place import Place

STORE_FORMAT_VERSION = 3
"""Version of the directory's layout; part of the fingerprint."""

MANIFEST_NAME = "manifest.json"
"""Written last: a directory without it is no token store."""

SplitName = Literal["train", "validation"]
"""The two sides of a store."""

SPLITS: tuple[SplitName, ...] = ("train", "validation")
"""All splits, in the order of the manifest."""

REBUILD_HINT = "delete the store and run prepare_data again"
"""The next step in every message about a damaged store."""

_MAX_DIFFERENCES = 12


class StoreError(UserError):
    """A token store that is damaged, incomplete, or not the one that the config describes."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard as the manifest lists it."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    name: str
    """File name inside the store."""
    source: int
    """Index of the configured source that its documents are from."""
    sha256: str
    """Hash of the file."""
    file_bytes: int
    """Size of the file."""
    documents: int
    """Rows."""
    tokens: int
    """Token ids over all rows."""
    text_bytes: int
    """UTF-8 bytes of the text over all rows."""
    targets: int | None = None
    """Tokens that are learned; None: all."""


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """Counts and shards of a split; the counts are the sums over the shards."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    documents: int
    """Documents with at least one token."""
    tokens: int
    """Length of the flat token stream."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    shards: list[Shard]
    """In the order of the stream."""

    @classmethod
    def from_shards(cls, shards: Iterable[Shard]) -> Self:
        """Sum up the shards of a split."""
        listed = list(shards)
        return cls(
            documents=sum(shard.documents for shard in listed),
            tokens=sum(shard.tokens for shard in listed),
            text_bytes=sum(shard.text_bytes for shard in listed),
            shards=listed,
        )


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Rows of the sources; `total` is counted apart and is the sum of all others."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    total: int = 0
    """Rows that were read."""
    documents: int = 0
    """Rows that are documents of the store."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Usable rows that were left out on purpose, by reason: blank, too short, twice there."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """Rows that cannot be used, by reason."""
    aliased: int = 0
    """Documents (and skipped rows) whose text was under another name of its field."""
    events: dict[str, int] = field(default_factory=dict)
    """What else was met, by name: conversations that were cut, tokens that they lack, names of
    fields that are aliases or mean nothing. Counts of such things, not of rows."""

    @property
    def num_quarantined(self) -> int:
        """Rows in quarantine."""
        return sum(self.quarantined.values())

    @property
    def is_balanced(self) -> bool:
        """Whether every row was accounted for."""
        return self.total == self.documents + sum(self.skipped.values()) + self.num_quarantined

    def __add__(self, other: "RowCounts") -> "RowCounts":
        return RowCounts(
            total=self.total + other.total,
            documents=self.documents + other.documents,
            skipped=_sum(self.skipped, other.skipped),
            quarantined=_sum(self.quarantined, other.quarantined),
            aliased=self.aliased + other.aliased,
            events=_sum(self.events, other.events),
        )


@dataclass(frozen=True, kw_only=True)
class QuarantineFile:
    """The file with the rows that cannot be used, a JSON object a line."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    name: str
    """File name inside the store."""
    sha256: str
    """Hash of the file."""
    file_bytes: int
    """Size of the file."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store is made of and what is in it; `manifest.json`."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    format_version: int
    """Layout of the directory."""
    fingerprint: str
    """`fingerprint_of(inputs)`: equal stores have equal fingerprints."""
    inputs: dict[str, Any]
    """Everything that decides the store's bytes, in clear."""
    token_dtype: Literal["uint16", "uint32"]
    """The smallest type that holds the vocabulary."""
    splits: dict[SplitName, SplitManifest]
    """All splits, also empty ones."""
    rows: RowCounts
    """What became of every row of the sources."""
    quarantine: QuarantineFile | None
    """The file that lists the rows in quarantine; None when there are none."""
    lengths: list[int]
    """Documents by length: the n-th number counts those of 2**n to 2**(n + 1) - 1 tokens."""


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted({*one, *other})}


def fingerprint_of(inputs: Mapping[str, Any]) -> str:
    """Hash the inputs of a store (plain JSON data) as hex; the order of keys does not matter."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def token_dtype(vocabulary_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest type that holds the ids 0 to `vocabulary_size - 1`."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def check_fingerprint(path: Place, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a store that was made from other inputs than the config describes now.

    Args:
        path: The store, for the message.
        stored: The inputs in its manifest.
        wanted: The inputs that a new store would have.

    Raises:
        StoreError: They differ; each difference is listed as `field: old -> new`.
    """
    if fingerprint_of(stored) == fingerprint_of(wanted):
        return
    lines = find_differences(_indexed(stored), _indexed(wanted))
    if len(lines) > _MAX_DIFFERENCES:
        more = len(lines) - _MAX_DIFFERENCES
        lines = [*lines[:_MAX_DIFFERENCES], f"... and {more} more"]
    listed = "\n  ".join(lines)
    raise StoreError(
        f"{path} was made from other inputs (stored -> wanted):\n  {listed}\n"
        "Undo the change, choose another store_dir, or delete this one to build it anew."
    )


def read_manifest(file: Place) -> Manifest:
    """Read and check a manifest.

    Raises:
        StoreError: It is damaged or of another format version; names the file.
    """
    data = file.read_bytes()
    try:
        version = json.loads(data).get("format_version")
    except (ValueError, AttributeError) as error:
        raise StoreError(f"{file}: not a manifest ({error}); {REBUILD_HINT}") from error
    if version != STORE_FORMAT_VERSION:
        raise StoreError(
            f"{file}: format_version is {version!r}, this version reads "
            f"{STORE_FORMAT_VERSION}; {REBUILD_HINT}"
        )
    try:
        manifest = pydantic.TypeAdapter(Manifest).validate_json(data)
    except pydantic.ValidationError as error:
        raise StoreError(f"{file}: not a manifest ({error}); {REBUILD_HINT}") from error
    if manifest.fingerprint != fingerprint_of(manifest.inputs):
        raise StoreError(f"{file}: the fingerprint is not that of its inputs; {REBUILD_HINT}")
    return manifest


def write_manifest(place: Place, manifest: Manifest) -> None:
    """Write a manifest as JSON; equal manifests are equal bytes."""
    place.write_json(asdict(manifest))


def _indexed(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Turn lists into mappings by index, so that a difference names the one element."""
    if isinstance(value, Mapping):
        return {key: _indexed(item) for key, item in value.items()}
    if isinstance(value, list):
        return {str(index): _indexed(item) for index, item in enumerate(value)}
    return value
