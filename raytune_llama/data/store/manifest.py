"""Manifest of a token store (`manifest.json`): its inputs, their fingerprint, and its content."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, Self

import pydantic

from raytune_llama.config.errors import UserError
from raytune_llama.data.store.differences import describe_differences
from raytune_llama.storage.hashes import hash_bytes
from raytune_llama.storage.place import Place

STORE_FORMAT_VERSION = 3
"""Version of the store layout; part of the fingerprint."""

MANIFEST_NAME = "manifest.json"
"""File name of the manifest, which is written last: a directory without it is no token store."""

SplitName = Literal["train", "validation"]
"""Name of a split of a store."""

SPLITS: tuple[SplitName, ...] = ("train", "validation")
"""All splits, in the order of the manifest."""

REBUILD_HINT = "delete the store and run prepare_data again"
"""Remedy given in error messages about a damaged store."""

READ_HASH = pydantic.Field(validation_alias=pydantic.AliasChoices("hash", "sha256"))
"""Reads a field `hash` also from files of releases that wrote SHA-256, as `sha256`."""

_MAX_DIFFERENCES = 12


class StoreError(UserError):
    """A token store that is damaged, incomplete, or not the one that the config describes."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Manifest entry of a shard."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    name: str
    """File name inside the store."""
    source: int
    """Index of the configured source of its documents."""
    hash: Annotated[str, READ_HASH]
    """Hash of the file; see `storage.hashes`."""
    file_bytes: int
    """File size in bytes."""
    documents: int
    """Number of documents, one per row."""
    tokens: int
    """Number of token ids."""
    text_bytes: int
    """Size of the text in UTF-8 bytes."""
    targets: int | None = None
    """Number of loss-target tokens; None: the store has no loss mask, all tokens are targets."""


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """Counts and shards of a split; the counts are the sums over the shards."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    documents: int
    """Number of documents, each with at least one token."""
    tokens: int
    """Length of the flat token stream in tokens."""
    text_bytes: int
    """Size of the text in UTF-8 bytes."""
    shards: list[Shard]
    """Shards in stream order."""

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


ALIAS, IGNORED_FIELD, REPEATED_FIELD = "alias: ", "ignored field: ", "repeated field: "
UNKNOWN_FIELD, REPAIRED, SUSPICIOUS = "unknown field: ", "repaired: ", "suspicious answer: "
"""Prefixes of the events that count fields, repairs and suspicious answers of rows, by name."""


def named_events(events: Mapping[str, int], prefix: str) -> dict[str, int]:
    """Return the counts of the events with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): count
        for name, count in events.items()
        if name.startswith(prefix)
    }


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of source rows: `total` is `documents` plus skipped and quarantined rows."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    total: int = 0
    """Number of rows read, counted independently of the outcomes."""
    documents: int = 0
    """Number of rows that became documents of the store."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of usable rows dropped on purpose, by reason, such as blank, too short, duplicate."""
    quarantined: dict[str, int] = field(default_factory=dict)
    """Number of unusable rows, by reason."""
    aliased: int = 0
    """Number of documents and skipped rows whose text was under an alias of its field."""
    events: dict[str, int] = field(default_factory=dict)
    """Counts of other events, by name: truncated conversations, tokens cut from them, fields read
    under an alias, ignored or repeated. They count occurrences, not rows."""

    @property
    def num_quarantined(self) -> int:
        """Number of rows in quarantine."""
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
    """Manifest entry of the JSON Lines file with the unusable rows."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    name: str
    """File name inside the store."""
    hash: Annotated[str, READ_HASH]
    """Hash of the file; see `storage.hashes`."""
    file_bytes: int
    """File size in bytes."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Inputs and content of a token store, as in `manifest.json`."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    format_version: int
    """Version of the store layout, `STORE_FORMAT_VERSION`."""
    fingerprint: str
    """`fingerprint_of(inputs)`: equal stores have equal fingerprints."""
    inputs: dict[str, Any]
    """All inputs that decide the store's bytes, as plain JSON data."""
    token_dtype: Literal["uint16", "uint32"]
    """Smallest dtype that holds all ids of the vocabulary."""
    splits: dict[SplitName, SplitManifest]
    """All splits, including empty ones."""
    rows: RowCounts
    """Source row counts by outcome."""
    quarantine: QuarantineFile | None
    """File of the quarantined rows; None if there are none."""
    lengths: list[int]
    """Histogram of document lengths: bin n counts documents of 2**n to 2**(n + 1) - 1 tokens."""
    revisions: list[str] = field(default_factory=list)
    """Datasets on the hub that it was built from, each at its commit; not part of its identity."""


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted({*one, *other})}


def fingerprint_of(inputs: Mapping[str, Any], like: str | None = None) -> str:
    """Hash the inputs of a store; the order of keys does not matter.

    Args:
        inputs: Plain JSON data.
        like: Recorded fingerprint whose algorithm to use; see `storage.hashes`.
    """
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hash_bytes(text.encode(), like)


def token_dtype(vocabulary_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest dtype that holds the ids 0 to `vocabulary_size - 1`."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


def check_fingerprint(path: Place, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a store was built from the inputs that the config describes now.

    Args:
        path: Location of the store, for the message.
        stored: Inputs in the store's manifest.
        wanted: Inputs that a new store would have.

    Raises:
        StoreError: The inputs differ; lists the field or file of each difference, and both values.
    """
    if fingerprint_of(stored) == fingerprint_of(wanted):
        return
    lines = describe_differences(stored, wanted)
    if len(lines) > _MAX_DIFFERENCES:
        more = len(lines) - _MAX_DIFFERENCES
        lines = [*lines[:_MAX_DIFFERENCES], f"... and {more} more"]
    listed = "\n  ".join(lines)
    raise StoreError(
        f"data.store_dir: the token store {path} was built from other inputs (then -> now):\n"
        f"  {listed}\n"
        "Undo the change, set data.store_dir to another directory to build a second store, or "
        "delete this one to rebuild it"
    )


def read_manifest(file: Place) -> Manifest:
    """Read and validate a manifest.

    Raises:
        StoreError: The file is damaged or has another format version; names the file.
    """
    data = file.read_bytes()
    try:
        version = json.loads(data).get("format_version")
    except (ValueError, AttributeError) as error:
        raise StoreError(f"{file}: not a manifest ({error}); {REBUILD_HINT}") from error
    if version != STORE_FORMAT_VERSION:
        raise StoreError(
            f"{file}: got format_version {version!r}, this release reads "
            f"{STORE_FORMAT_VERSION}; {REBUILD_HINT}"
        )
    try:
        manifest = pydantic.TypeAdapter(Manifest).validate_json(data)
    except pydantic.ValidationError as error:
        raise StoreError(f"{file}: not a manifest ({error}); {REBUILD_HINT}") from error
    if manifest.fingerprint != fingerprint_of(manifest.inputs, like=manifest.fingerprint):
        raise StoreError(f"{file}: the fingerprint does not match the inputs; {REBUILD_HINT}")
    return manifest


def write_manifest(place: Place, manifest: Manifest) -> None:
    """Write a manifest as JSON; equal manifests give equal bytes."""
    content = asdict(manifest)
    if not manifest.revisions:
        del content["revisions"]  # as in releases that did not have them
    place.write_json(content)


def read_revisions(store: Place) -> list[str]:
    """Return the datasets on the hub that a store was built from; empty if there is no store.

    Raises:
        ValueError: The manifest is not JSON.
    """
    file = store / MANIFEST_NAME
    content = file.read_json() if file.exists() else {}
    return [str(one) for one in content.get("revisions", ())] if isinstance(content, dict) else []
