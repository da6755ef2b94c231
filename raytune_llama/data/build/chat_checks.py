"""What the rows of a store of conversations show: fields not used, answers left out or suspicious.

Called on the driver once all units are encoded, before the store is published.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa

from raytune_llama.data.build.chat_reader import DROP_REASONS, describe_unknown
from raytune_llama.data.build.units import BuildPlan
from raytune_llama.data.config import ChatDataConfig
from raytune_llama.data.readers.rows import SourceError
from raytune_llama.data.store.lengths import CUT_FROM, LEFT_OUT
from raytune_llama.data.store.manifest import (
    ALIAS,
    IGNORED_FIELD,
    REPAIRED,
    SUSPICIOUS,
    UNKNOWN_FIELD,
    Manifest,
    RowCounts,
    SplitManifest,
    named_events,
)

logger = logging.getLogger(__name__)

SHARED_ANSWERS = "held_out_answers_in_training"
"""Event: a conversation of the validation split whose answers are all those of a trained one."""


def check_conversations(
    manifest: Manifest, config: ChatDataConfig, first_unknown: Mapping[str, str]
) -> None:
    """Check what was left out of a store of conversations, and log what happened to its rows.

    Args:
        manifest: Manifest of the store.
        config: Data settings of the job.
        first_unknown: First row with each field that is not used, by name.

    Raises:
        SourceError: A field that may carry meaning is not used, too many rows have no answer to
            train on or a suspicious one, or no row of `data.validation` is usable.
    """
    rows = manifest.rows
    problems = [
        f"{describe_unknown(name, count)} rows or turns (first: {first_unknown.get(name, '?')})"
        for name, count in named_events(rows.events, UNKNOWN_FIELD).items()
    ]
    problems += [*_find_left_out(rows, config), *_find_suspicious(rows, config)]
    if config.validation and not manifest.splits["validation"].documents:
        problems.append(
            "data.validation: no row of its files is usable, so there is nothing to evaluate on; "
            f"rows left out: {_listed(rows.skipped | rows.quarantined) or 'none'}"
        )
    if problems:
        raise SourceError("\n".join(problems))
    _log_events(rows, config)


def count_shared_answers(manifest: Manifest, plan: BuildPlan) -> Manifest:
    """Return the manifest with the number of held-out answers that are also in training.

    A model that has seen an answer is not tested by it, whatever its question.
    """
    held_out = Counter(_answers(manifest.splits["validation"], plan))
    if not held_out:
        return manifest
    trained = set(held_out).intersection(_answers(manifest.splits["train"], plan))
    num_shared = sum(held_out[answer] for answer in trained)
    if not num_shared:
        return manifest
    events = dict(sorted((manifest.rows.events | {SHARED_ANSWERS: num_shared}).items()))
    return replace(manifest, rows=replace(manifest.rows, events=events))


def _answers(split: SplitManifest, plan: BuildPlan) -> Iterator[bytes]:
    """Stream a hash of the trained tokens of each conversation."""
    for shard in split.shards:
        with (plan.store_dir / shard.name).open() as file:
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                tokens, targets = batch.column("tokens"), batch.column("targets")
                ids = tokens.values.to_numpy()
                mask = targets.values.to_numpy().view(np.bool_)
                bounds = tokens.offsets.to_numpy()
                for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                    said = ids[start:stop][mask[start:stop]]
                    yield hashlib.blake2b(said.tobytes(), digest_size=8).digest()


def _find_left_out(rows: RowCounts, config: ChatDataConfig) -> list[str]:
    """Return the problem with rows without an answer to train on, and warn about cut ones."""
    left_out = sum(rows.skipped.get(reason, 0) for reason in DROP_REASONS)
    num_cut, limit = rows.events.get("truncated", 0), config.max_left_out_fraction
    if num_cut > limit * rows.total:
        logger.warning(
            "%d of %d conversations are longer than data.chat.max_tokens, %s, and were cut: %s",
            num_cut,
            rows.total,
            config.chat.max_tokens,
            _listed(named_events(rows.events, CUT_FROM)),
        )
    if left_out <= limit * rows.total:
        return []
    return [
        f"data.max_left_out_fraction: {left_out} of {rows.total} rows have no answer to train on "
        f"({_listed({reason: rows.skipped.get(reason, 0) for reason in DROP_REASONS})}), more than "
        f"{limit:.0%}; their lengths: {_listed(named_events(rows.events, LEFT_OUT))}; "
        f"data.chat.max_tokens is {config.chat.max_tokens}: raise it, or raise the limit"
    ]


def _find_suspicious(rows: RowCounts, config: ChatDataConfig) -> list[str]:
    number, limit = rows.events.get("suspicious", 0), config.max_suspicious_fraction
    if not number:
        return []
    found = (
        f"{number} of {rows.total} rows have an answer that looks like a failed export: "
        f"{_listed(named_events(rows.events, SUSPICIOUS))}"
    )
    if number > limit * rows.total:
        return [
            f"data.max_suspicious_fraction: {found}; more than {limit:.0%}: fix the files, or "
            "raise the limit if these answers are meant"
        ]
    logger.warning("%s", found)
    return []


def _log_events(rows: RowCounts, config: ChatDataConfig) -> None:
    events = rows.events
    for name, count in named_events(rows.events, ALIAS).items():
        logger.info("%d texts read from column %r", count, name)
    ignored = named_events(rows.events, IGNORED_FIELD)
    if ignored:
        logger.info("columns not used: %s", _listed(ignored))
    repaired = named_events(rows.events, REPAIRED)
    if repaired:
        logger.info("conversations repaired: %s", _listed(repaired))
    if events.get("masked_turns"):
        logger.info("%d turns are marked in their rows as not trained", events["masked_turns"])
    if events.get("truncated"):
        logger.info(
            "%d conversations cut at %s tokens, %d tokens lost; in %d an answer is learned without "
            "its question",
            events["truncated"],
            config.chat.max_tokens,
            events["cut_tokens"],
            events.get("answers_without_prompt", 0),
        )
    if events.get(SHARED_ANSWERS):
        logger.warning(
            "%d held-out answers are also in the training data: unless they are short by design, "
            "such as classes, the evaluation loss is too low",
            events[SHARED_ANSWERS],
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
