"""One work unit of building a token store: a source file becomes its shards and a record.

A unit depends on nothing but its file and the plan, so that its bytes are the same on whatever
worker, in whatever order and after however many restarts. The work directory holds

    store/train-00000.arrow ...   what becomes the store
    units/00000.json              record of a finished unit: hashes and counts of its shards
    units/00000.attempts          a byte for each time that the unit was begun and not finished
    stop                          some unit has failed: the others give up
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import pydantic
from transformers import PreTrainedTokenizerBase

from raytune_llama.data.documents import Document, SourceError, read_documents
from raytune_llama.data.manifest import SPLITS, Shard, SplitName, fingerprint_of
from raytune_llama.data.sources import SourceFile
from raytune_llama.data.store import ShardWriter
from raytune_llama.files import sha256_file, write_json_atomic
from raytune_llama.model.tokenizer import encode_text

MAX_ATTEMPTS = 3
"""A unit that ended its process this often is refused: Ray would restart it for ever."""

_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 20


class UnitStoppedError(Exception):
    """A unit gave up because another one has failed."""


@dataclass(frozen=True)
class Unit:
    """A source file to encode."""

    index: int
    """Its place among the source files."""
    file: SourceFile
    """Where it is and how to read it."""
    sha256: str
    """Hash of its bytes."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the unit adds to the store's fingerprint; settings that its format ignores not."""
        options = self.file.options
        fields = {
            "source": self.file.source,
            "name": self.file.name,
            "sha256": self.sha256,
            "format": options.format,
        }
        if options.format == "txt":
            return fields | {"document": options.document}
        return fields | {"text_field": options.text_field}

    @property
    def key(self) -> str:
        """Identifies a finished unit in a work directory."""
        return fingerprint_of({"index": self.index, **self.inputs})


@dataclass(frozen=True, kw_only=True)
class EncodePlan:
    """What all units have in common."""

    work_dir: Path
    """The work directory, on a disk that all nodes share; absolute."""
    bos_id: int | None
    """Id before each document, if any."""
    eos_id: int | None
    """Id behind each document, if any."""
    dtype: Literal["uint16", "uint32"]
    """Type of the ids in the shards."""
    validation_fraction: float
    """Share of the documents that go to the validation split."""

    @property
    def store_dir(self) -> Path:
        """Where the shards are collected."""
        return self.work_dir / "store"

    @property
    def units_dir(self) -> Path:
        """Where the records of units are."""
        return self.work_dir / "units"

    @property
    def stop_file(self) -> Path:
        """Exists when some unit has failed."""
        return self.work_dir / "stop"


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What a finished unit has written."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    key: str
    """`Unit.key`."""
    shards: dict[SplitName, Shard | None]
    """Its shard in each split; None when no document went there."""
    skipped: dict[str, int]
    """Documents that are in no shard, by reason."""


def split_of(text: str, validation_fraction: float) -> SplitName:
    """Choose the side of a document by its text alone: equal texts are on the same side."""
    place = int.from_bytes(sha256(text.encode()).digest()[:8], "big")
    return "validation" if place < int(validation_fraction * 2**64) else "train"


def finished_record(unit: Unit, plan: EncodePlan) -> UnitRecord | None:
    """Return the record of a unit if it and the shards it lists are whole."""
    file = _record_file(unit, plan)
    if not file.is_file():
        return None
    try:
        record = pydantic.TypeAdapter(UnitRecord).validate_json(file.read_bytes())
    except pydantic.ValidationError:
        return None
    for shard in record.shards.values():
        path = plan.store_dir / shard.name if shard else None
        # Shards are synced only when the store is published: after a power cut one may be torn.
        if shard and path and not (path.is_file() and sha256_file(path) == shard.sha256):
            return None
    return record if record.key == unit.key else None


def encode_unit(unit: Unit, plan: EncodePlan, tokenizer: PreTrainedTokenizerBase) -> UnitRecord:
    """Encode a file and write its shards and its record.

    Raises:
        SourceError: The file cannot be read as configured, was changed meanwhile, or has ended
            the process too often.
        UnitStoppedError: Another unit has failed.
    """
    attempts_file = plan.units_dir / f"{unit.index:05d}.attempts"
    _count_attempt(attempts_file, unit.file.path)
    skipped: Counter[str] = Counter(blank=0, no_tokens=0)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    plan.store_dir / f"{split}-{unit.index:05d}.arrow",
                    plan.dtype,
                    source=unit.file.source,
                )
            )
            for split in SPLITS
        }
        documents = _without_blank(read_documents(unit.file.path, unit.file.options), skipped)
        for batch in _batched(documents):
            if plan.stop_file.exists():
                raise UnitStoppedError
            for document, ids in _encode(batch, plan, tokenizer, skipped):
                writer = writers[split_of(document.text, plan.validation_fraction)]
                writer.write(ids, document.num_bytes, unit.index, document.offset)
        if sha256_file(unit.file.path) != unit.sha256:
            raise SourceError(f"{unit.file.path} was changed while it was read; run again")
    shards: dict[SplitName, Shard | None] = {split: writers[split].shard for split in SPLITS}
    record = UnitRecord(key=unit.key, shards=shards, skipped=dict(skipped))
    write_json_atomic(_record_file(unit, plan), asdict(record))
    attempts_file.unlink()
    return record


def _record_file(unit: Unit, plan: EncodePlan) -> Path:
    return plan.units_dir / f"{unit.index:05d}.json"


def _count_attempt(file: Path, source: Path) -> None:
    """Note on disk that a unit is begun; refuse it when it has been too often."""
    attempts = file.stat().st_size if file.exists() else 0
    if attempts >= MAX_ATTEMPTS:
        raise SourceError(
            f"{source}: encoding it ended the process {attempts} times (out of memory, a crash of "
            "the tokenizer, or lost machines); look into the workers' logs, or leave the file out"
        )
    with file.open("ab") as opened:
        opened.write(b".")
        opened.flush()
        os.fsync(opened.fileno())


def _without_blank(documents: Iterable[Document], skipped: Counter[str]) -> Iterator[Document]:
    for document in documents:
        if document.is_blank:
            skipped["blank"] += 1
        else:
            yield document


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents so that a batch is worth a call and yet fits in memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    batch: list[Document],
    plan: EncodePlan,
    tokenizer: PreTrainedTokenizerBase,
    skipped: Counter[str],
) -> Iterator[tuple[Document, list[int]]]:
    """Encode a batch; a text that the tokenizer turns into nothing is counted, not written."""
    before = [] if plan.bos_id is None else [plan.bos_id]
    behind = [] if plan.eos_id is None else [plan.eos_id]
    encoded = encode_text(tokenizer, [document.text for document in batch])
    for document, ids in zip(batch, encoded, strict=True):
        if ids:
            yield document, [*before, *ids, *behind]
        else:
            skipped["no_tokens"] += 1
