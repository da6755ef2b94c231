"""Read and encode conversations with a loss mask, unit by unit.

    for documents in reader.read(unit, plan, tally, quarantine): ...

A bad row is counted and quarantined, as with text.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from raytune_llama.chat.conversations import Conversation, Defect, find_suspicion
from raytune_llama.chat.encoding import ChatEncoder, EncodedConversation
from raytune_llama.chat.formats import RowFormat, detect_row_format, read_row
from raytune_llama.chat.row_fields import KeyCounts
from raytune_llama.data.build.duplicates_pass import DuplicateFilter
from raytune_llama.data.build.text_corpus import choose_splits
from raytune_llama.data.build.unit_reader import (
    QuarantineWriter,
    Tally,
    quarantine_rows,
    read_byte_ranges,
)
from raytune_llama.data.build.units import BuildPlan, WorkUnit
from raytune_llama.data.readers.lines import count_bytes
from raytune_llama.data.readers.rows import BadRow, ObjectRow, SourceError, excerpt
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.store.lengths import CUT_FROM, LEFT_OUT, length_event
from raytune_llama.data.store.manifest import (
    ALIAS,
    IGNORED_FIELD,
    REPAIRED,
    REPEATED_FIELD,
    SUSPICIOUS,
    UNKNOWN_FIELD,
)
from raytune_llama.data.store.shards import EncodedDocuments

_BATCH_CONVERSATIONS = 512

DROP_REASONS = ("too_long", "no_target")
"""Drop reasons that are no defect of a file: such rows are skipped, not quarantined."""

Row = tuple[ObjectRow, Conversation]


def describe_unknown(name: str, count: int) -> str:
    """Return what is wrong with a field that is not used, up to the number of rows with it."""
    return (
        f"column {name!r} may carry meaning and is not used; drop it with "
        f"data.chat.ignore_fields=[{json.dumps(name, ensure_ascii=False)}], or say in `fields` of "
        f"its source what it holds; it is in {count}"
    )


class ChatTextReader:
    """Picklable reader of the texts among which duplicate conversations are searched."""

    def __init__(self, formats: tuple[RowFormat, ...]) -> None:
        self._formats = formats

    def __call__(self, unit: WorkUnit, plan: BuildPlan) -> Iterator[list[str]]:
        """Stream the texts of a unit's usable conversations, in order.

        Raises:
            SourceError: As in `ChatUnitReader.read`.
        """
        for _, byte_range, batch in read_byte_ranges(unit, plan.files, Tally(), None):
            file = plan.files[byte_range.file]
            usable, _ = _read_rows(batch.objects, file, self._formats[file.source], KeyCounts())
            yield ["\n".join(conversation.texts) for _, conversation in usable]


class ChatUnitReader:
    """Picklable reader of conversation units; implements `unit_encoder.UnitReader`."""

    has_targets = True

    def __init__(
        self, encoder: ChatEncoder, formats: tuple[RowFormat, ...], num_trained: int
    ) -> None:
        """Store what all units share.

        Args:
            encoder: Renders and tokenizes conversations.
            formats: Row format of each source.
            num_trained: Number of training sources; later ones are evaluation-only.
        """
        self._encoder = encoder
        self._formats = formats
        self._num_trained = num_trained

    def read(
        self, unit: WorkUnit, plan: BuildPlan, tally: Tally, quarantine: QuarantineWriter
    ) -> Iterator[EncodedDocuments]:
        """Stream the encoded conversations of a unit, accounting for every row.

        Raises:
            SourceError: As in `read_unit_documents`, or a row's format differs from its source's.
        """
        duplicates = DuplicateFilter(unit, plan)
        for number, byte_range, batch in read_byte_ranges(unit, plan.files, tally, quarantine):
            tally.skipped["blank"] += len(batch.texts)
            file = plan.files[byte_range.file]
            for start in range(0, len(batch.objects), _BATCH_CONVERSATIONS):
                some = batch.objects[start : start + _BATCH_CONVERSATIONS]
                keys = KeyCounts()
                usable, bad = _read_rows(some, file, self._formats[file.source], keys)
                _count_keys(keys, tally)
                usable = list(compress(usable, duplicates.mask(len(usable), tally)))
                kept = self._encode(usable, tally, bad)
                quarantine_rows(bad, tally, quarantine, file, number)
                if kept:
                    rows = [row for row, _ in kept]
                    is_validation = self._is_validation(rows, file, plan)
                    yield _join(kept, byte_range.file, is_validation)

    def _encode(
        self, rows: Sequence[Row], tally: Tally, bad: list[BadRow]
    ) -> list[tuple[Row, EncodedConversation]]:
        """Encode conversations; count those that are left out, and append the defective ones."""
        kept: list[tuple[Row, EncodedConversation]] = []
        encoded = self._encoder.encode([conversation for _, conversation in rows])
        for (row, conversation), made in zip(rows, encoded, strict=True):
            if isinstance(made, EncodedConversation):
                kept.append(((row, conversation), made))
                _count_kept(conversation, made, tally)
            elif made.reason in DROP_REASONS:
                tally.skipped[made.reason] += 1
                tally.events[length_event(LEFT_OUT, made.num_tokens)] += 1
            else:
                bad.append(BadRow(row.line, row.offset, made.reason, made.detail))
        return kept

    def _is_validation(
        self, rows: Sequence[Row], file: SourceFile, plan: BuildPlan
    ) -> NDArray[np.bool_]:
        if file.source >= self._num_trained:
            return np.ones(len(rows), dtype=np.bool_)
        split_texts = [_split_text(conversation) for _, conversation in rows]
        sides = choose_splits(split_texts, plan.validation_fraction)
        return sides.get("validation", np.zeros(len(split_texts), dtype=np.bool_))


def _read_rows(
    rows: Sequence[ObjectRow], file: SourceFile, row_format: RowFormat, keys: KeyCounts
) -> tuple[list[Row], list[BadRow]]:
    """Return the usable rows as conversations, and the others with their reasons.

    Raises:
        SourceError: A row has another format than its source.
    """
    usable: list[Row] = []
    bad: list[BadRow] = []
    for row in rows:
        read = read_row(row.value, row_format, keys)
        if not isinstance(read, Defect):
            usable.append((row, read))
            continue
        bad.append(BadRow(row.line, row.offset, read.reason, read.detail))
        if read.reason == "missing_field":
            found = detect_row_format(row.value, row_format.columns)
            if found not in (None, row_format.name):
                raise SourceError(
                    f"{file.place}: {file.options.offset_unit} {row.offset}: the row has the "
                    f"format {found}, but its source has {row_format.name}; use one source per "
                    "format: "
                    f"{excerpt(json.dumps(row.value, ensure_ascii=False))}"
                )
    return usable, bad


def _join(
    kept: Sequence[tuple[Row, EncodedConversation]], file: int, is_validation: NDArray[np.bool_]
) -> EncodedDocuments:
    return EncodedDocuments(
        file=file,
        ids=np.concatenate([made.ids for _, made in kept]),
        lengths=np.array([len(made.ids) for _, made in kept], dtype=np.int64),
        num_bytes=np.array(
            [sum(map(count_bytes, conversation.texts)) for (_, conversation), _ in kept]
        ),
        offsets=np.array([row.offset for (row, _), _ in kept], dtype=np.int64),
        is_validation=is_validation,
        targets=np.concatenate([made.targets for _, made in kept]),
    )


def _count_kept(conversation: Conversation, made: EncodedConversation, tally: Tally) -> None:
    events = tally.events
    events["split_boundaries"] += made.num_splits
    events["masked_turns"] += sum(not turn.is_trained for turn in conversation.turns)
    if made.num_cut:
        events["truncated"] += 1
        events["cut_tokens"] += made.num_cut
        events["answers_without_prompt"] += made.lost_prompt
        events[length_event(CUT_FROM, len(made.ids) + made.num_cut)] += 1
    found = {
        what
        for turn in conversation.turns
        if turn.role == "assistant" and (what := find_suspicion(turn.content))
    }
    events["suspicious"] += bool(found)
    for what in found:
        events[SUSPICIOUS + what] += 1


def _split_text(conversation: Conversation) -> str:
    """Return the text that decides a conversation's split: equal conversations stay together."""
    said = [turn.content for turn in conversation.turns]
    return json.dumps([conversation.system, *said], ensure_ascii=False)


def _count_keys(keys: KeyCounts, tally: Tally) -> None:
    for prefix, counter in (
        (ALIAS, keys.aliased),
        (IGNORED_FIELD, keys.ignored),
        (REPEATED_FIELD, keys.repeated),
        (UNKNOWN_FIELD, keys.unknown),
        (REPAIRED, keys.repaired),
    ):
        for name, count in counter.items():
            tally.events[prefix + name] += count
