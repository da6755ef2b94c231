"""Publish finished units as a token store: quarantine file, report, and the manifest last."""

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np

from raytune_llama.data.build.chat_checks import check_conversations
from raytune_llama.data.build.file_hashes import SourceHashes
from raytune_llama.data.build.unit_encoder import UnitRecord, quarantine_place
from raytune_llama.data.build.units import BuildPlan, WorkUnit
from raytune_llama.data.config import AnyDataConfig, ChatDataConfig, DataConfig
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.manifest import (
    MANIFEST_NAME,
    SPLITS,
    STORE_FORMAT_VERSION,
    UNKNOWN_FIELD,
    Manifest,
    QuarantineFile,
    RowCounts,
    SplitManifest,
    fingerprint_of,
    named_events,
    write_manifest,
)
from raytune_llama.data.store.report import REPORT_NAME, render_report
from raytune_llama.storage.files import move_directory
from raytune_llama.storage.hashes import Hasher
from raytune_llama.storage.place import Place

logger = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"
"""Name of the file of unusable rows: source, file, line, byte offset, reason and detail."""

_NUM_SHOWN = 10

_REASONS: Final = {"no_tokens": "without a token", "uncuttable": "too long to be encoded"}
"""Reasons to leave out a row whose names say too little."""


def build_manifest(
    inputs: dict[str, Any], units: list[WorkUnit], plan: BuildPlan, records: list[UnitRecord]
) -> Manifest:
    """Sum up the records of all units and write the quarantine file next to the shards."""
    rows = sum((record.rows for record in records), RowCounts())
    assert rows.is_balanced, f"rows were lost: {rows}"
    lengths = np.array([record.lengths for record in records], dtype=np.int64).sum(axis=0)
    return Manifest(
        format_version=STORE_FORMAT_VERSION,
        fingerprint=fingerprint_of(inputs),
        inputs=inputs,
        token_dtype=plan.dtype,
        splits={
            split: SplitManifest.from_shards(
                shard for record in records if (shard := record.shards[split])
            )
            for split in SPLITS
        },
        rows=rows,
        quarantine=_write_quarantine(units, plan, records),
        lengths=np.trim_zeros(np.atleast_1d(lengths), "b").tolist(),
    )


def check_counts(manifest: Manifest, plan: BuildPlan, config: AnyDataConfig) -> None:
    """Check that the store can be used for training, and for evaluation if configured.

    Raises:
        SourceError: Too many rows are in quarantine (the first are listed), there is no text, or a
            configured split is empty.
    """
    rows, max_bad_fraction = manifest.rows, config.max_bad_fraction
    if isinstance(config, ChatDataConfig):
        check_conversations(manifest, config, _first_unknown(manifest, plan))
    bad = _in_words(rows.quarantined)
    if rows.num_quarantined > max_bad_fraction * rows.total:
        raise SourceError(
            f"data.max_bad_fraction: {rows.num_quarantined} of {rows.total} rows are unusable "
            f"({bad}), more than {max_bad_fraction:.2%}; fix them, drop files, or raise the limit. "
            f"All are listed in {plan.store_dir / QUARANTINE_NAME}; first ones:\n  "
            + "\n  ".join(_first_bad_rows(plan))
        )
    if rows.num_quarantined:
        logger.warning(
            "%d of %d rows are unusable, see %s: %s",
            rows.num_quarantined,
            rows.total,
            QUARANTINE_NAME,
            bad,
        )
    skipped = _in_words(rows.skipped)
    if skipped:
        number = sum(rows.skipped.values())
        logger.info("%d of %d rows left out: %s", number, rows.total, skipped)
    if rows.events and not isinstance(config, ChatDataConfig):
        met = ", ".join(f"{count} {name}" for name, count in rows.events.items())
        logger.info("events in rows: %s", met)
    if rows.aliased and isinstance(config, DataConfig):
        logger.info("%d texts read from %s", rows.aliased, _alias_names(config))
    _check_splits(manifest, config.validation_fraction, skipped or "none")


def _in_words(counts: Mapping[str, int]) -> str:
    """Return counts by reason in words, without those that are 0: `3 blank, 1 null field`."""
    return ", ".join(
        f"{count} {_REASONS.get(reason, reason.replace('_', ' '))}"
        for reason, count in counts.items()
        if count
    )


def _alias_names(config: DataConfig) -> str:
    """Return the columns that replace a text column, by source."""
    return "; ".join(
        f"{' or '.join(map(repr, source.text_aliases))} instead of {source.text_field!r}"
        for source in dict.fromkeys(config.sources)
        if source.text_aliases
    )


def _check_splits(manifest: Manifest, validation_fraction: float, skipped: str) -> None:
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    if not train.documents and not validation.documents:
        raise SourceError(f"data.sources: no document has any text (rows skipped: {skipped})")
    # An empty split is an error, not a warning: it would surface only at the first evaluation, on
    # expensive machines. Only small corpora are affected, so little work is lost.
    for split, name in ((train, "train"), (validation, "validation")):
        if not split.documents and (name == "train" or validation_fraction > 0):
            total = train.documents + validation.documents
            raise SourceError(
                f"data.validation_fraction: {validation_fraction} of {total} documents leaves none "
                f"for the {name} split; change the fraction, or split the text into more documents"
            )


def publish(
    manifest: Manifest,
    seen: SourceHashes,
    plan: BuildPlan,
    store_dir: Place,
    source_names: list[str],
) -> None:
    """Publish the collected shards as the store; its manifest is written last."""
    listed = {shard.name for split in manifest.splits.values() for shard in split.shards}
    if manifest.quarantine:
        listed.add(manifest.quarantine.name)
    for place in plan.store_dir.files():
        if place.name not in listed:  # left by a killed worker, or by files no longer configured
            place.delete()
    seen.write(plan.store_dir)
    (plan.store_dir / REPORT_NAME).write_bytes(render_report(manifest, source_names).encode())
    write_manifest(plan.store_dir / MANIFEST_NAME, manifest)
    if plan.store_dir.is_local:
        move_directory(plan.store_dir.path, store_dir.path)
        shutil.rmtree(plan.work_dir.path)
    else:
        plan.work_dir.delete()
    for name, split in manifest.splits.items():
        targets = [shard.targets for shard in split.shards if shard.targets is not None]
        logger.info(
            "%s: %d documents, %d tokens%s, %.1f MB of text",
            name,
            split.documents,
            split.tokens,
            f", {sum(targets)} of them loss targets" if targets else "",
            split.text_bytes / 1e6,
        )


def _write_quarantine(
    units: list[WorkUnit], plan: BuildPlan, records: list[UnitRecord]
) -> QuarantineFile | None:
    """Merge the units' bad rows, converting their line numbers to those of the whole file."""
    target = plan.store_dir / QUARANTINE_NAME
    rows = _quarantined_rows(units, plan, records)
    first = next(rows, None)
    if first is None:
        target.delete()
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, QUARANTINE_NAME)
        hasher, num_bytes = Hasher(), 0
        with file.open("wb") as opened:
            for row in chain([first], rows):
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
                opened.write(line)
                hasher.update(line)
                num_bytes += len(line)
        target.upload(file)
    return QuarantineFile(name=target.name, hash=hasher.finish(), file_bytes=num_bytes)


def _quarantined_rows(
    units: list[WorkUnit], plan: BuildPlan, records: list[UnitRecord]
) -> Iterator[dict[str, Any]]:
    lines_before: dict[int, int] = {}
    for unit, record in zip(units, records, strict=True):
        starts: list[int] = []
        for byte_range, found in zip(unit.byte_ranges, record.pieces, strict=True):
            starts.append(lines_before.get(byte_range.file, 0))
            lines_before[byte_range.file] = starts[-1] + found.lines
        if record.quarantine is None:
            continue
        for line in quarantine_place(unit, plan).read_bytes().decode().split("\n")[:-1]:
            row = json.loads(line)
            row["line"] += starts[row.pop("piece")]
            yield row


def _first_unknown(manifest: Manifest, plan: BuildPlan) -> dict[str, str]:
    """Return the first row with each field that is not used, by the field's name."""
    first: dict[str, str] = {}
    if not manifest.rows.quarantined.get("unknown_field"):
        return first
    data = (plan.store_dir / QUARANTINE_NAME).read_bytes()
    names = named_events(manifest.rows.events, UNKNOWN_FIELD)
    for line in data.decode().split("\n")[:-1]:
        row = json.loads(line)
        if row["reason"] == "unknown_field":
            for name in names:
                if repr(name) in row["detail"]:
                    first.setdefault(name, f"{row['file']}: line {row['line']}")
    return first


def _first_bad_rows(plan: BuildPlan) -> list[str]:
    data = (plan.store_dir / QUARANTINE_NAME).read_bytes()
    rows = [json.loads(line) for line in data.decode().split("\n")[:_NUM_SHOWN] if line]
    units = {(file.source, file.name): file.options.offset_unit for file in plan.files}
    return [
        f"{row['file']}: line {row['line']}, {units[row['source'], row['file']]} {row['offset']}: "
        f"{row['reason']}: {row['detail']}"
        for row in rows
    ]
