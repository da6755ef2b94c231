"""Encode conversations from JSON files as token ids with a loss mask, unit by unit.

    corpus = open_chat_corpus(config, tokenizer)      # on the driver: files, formats, template
    reader = corpus.build_reader(text_encoder)        # picklable, for the workers
    for documents in reader.read(unit, plan, tally, quarantine): ...

A bad row is counted and quarantined, as with text. A file whose format differs from its source's
first row is an error: two data sets were probably mixed up.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.config import FormatName
from raytune_llama.chat.conversations import Conversation, Defect
from raytune_llama.chat.encoding import ChatEncoder, EncodedConversation, build_chat_encoder
from raytune_llama.chat.formats import KeyCounts, detect_row_format, read_row
from raytune_llama.chat.templates.choice import build_template
from raytune_llama.config.settings import ConfigError
from raytune_llama.data.build.actors import read_head_rows
from raytune_llama.data.build.text_corpus import choose_splits
from raytune_llama.data.build.unit_reader import (
    QuarantineWriter,
    Tally,
    quarantine_rows,
    read_byte_ranges,
)
from raytune_llama.data.build.units import BuildPlan, ByteRange, WorkUnit
from raytune_llama.data.config import ChatDataConfig, ChatSourceConfig
from raytune_llama.data.readers.conversations import find_conversation_files
from raytune_llama.data.readers.lines import count_bytes
from raytune_llama.data.readers.rows import BadRow, ObjectRow, SourceError, excerpt
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.data.store.shards import EncodedDocuments
from raytune_llama.tokenizer.reference import TextEncoder

logger = logging.getLogger(__name__)

_BATCH_CONVERSATIONS = 512
_SNIFFED_ROWS = 1000
_SAMPLE_BYTES = 4 << 20

DROP_REASONS = ("too_long", "no_target")
"""Drop reasons that are no defect of a file: such rows are skipped, not quarantined."""


@dataclass(frozen=True)
class RowFormat:
    """Row format of a source and its options."""

    name: FormatName
    """Name of the format."""
    input_separator: str
    """Text between instruction and input; see `ConversationSource.input_separator`."""


@dataclass(frozen=True)
class ChatCorpus:
    """Conversations to encode; implements `preparation.Corpus`."""

    config: ChatDataConfig
    """Data settings of the job."""
    tokenizer: PreTrainedTokenizerFast
    """Tokenizer that defines the ids and the chat template."""
    files: list[SourceFile]
    """Training files, followed by evaluation-only files."""
    formats: tuple[RowFormat, ...]
    """Row format of each source, evaluation-only sources last."""

    @property
    def fingerprint_inputs(self) -> dict[str, Any]:
        """Inputs that decide the documents, besides the files and the tokenizer."""
        chat = self.config.chat
        return {
            "validation_sources": len(self.config.validation),
            "formats": [[source.name, source.input_separator] for source in self.formats],
            "chat": {
                "template": chat.template,
                "template_sha256": build_template(chat.template, self.tokenizer).sha256,
                "max_tokens": chat.max_tokens,
                "truncation": chat.truncation,
                "train_on_prompt": chat.train_on_prompt,
            },
        }

    def sample_texts(self) -> list[str]:
        """Read messages from the heads of some files, to select an encoder."""
        step = max(1, len(self.files) // 32)
        texts: list[str] = []
        left = _SAMPLE_BYTES
        for file in self.files[::step]:
            for row in _first_rows(file):
                read = _read(row, self.formats[file.source], KeyCounts())
                if isinstance(read, Conversation):
                    texts += [turn.content for turn in read.turns]
                    left -= sum(len(turn.content) for turn in read.turns)
                if left <= 0:
                    return texts
        return texts

    def build_reader(self, encoder: TextEncoder) -> "ChatUnitReader":
        """Build the unit reader for the workers."""
        num_trained = len(self.config.sources)
        chat = build_chat_encoder(self.tokenizer, self.config.chat, encoder)
        return ChatUnitReader(chat, self.formats, num_trained)


def open_chat_corpus(config: ChatDataConfig, tokenizer: PreTrainedTokenizerFast) -> ChatCorpus:
    """List the files of all sources and detect the row format of each source.

    Raises:
        ConfigError: A source matches no file, mixes formats or has no known one, or the tokenizer
            has no usable chat template; lists all such problems with their field paths.
    """
    problems: list[str] = []
    try:
        build_template(config.chat.template, tokenizer)
    except ValueError as error:
        problems.append(f"data.chat.{error}")
    max_bytes = config.max_document_mib << 20
    trained = _find(config.sources, "sources", 0, max_bytes, problems)
    held_out = _find(config.validation, "validation", len(config.sources), max_bytes, problems)
    names = {_identity(file) for file in held_out}
    files = [file for file in trained if _identity(file) not in names]
    if len(files) < len(trained):
        logger.info(
            "%d files are in both data.sources and data.validation: not trained on",
            len(trained) - len(files),
        )
    every = (*config.sources, *config.validation)
    formats: list[RowFormat] = []
    for number, source in enumerate(every):
        own = [file for file in [*files, *held_out] if file.source == number]
        found = _find_format(source, _field(config, number), own, problems)
        formats.append(RowFormat(found or "messages", source.input_separator))
    if problems:
        raise ConfigError(problems)
    return ChatCorpus(config, tokenizer, [*files, *held_out], tuple(formats))


def _field(config: ChatDataConfig, number: int) -> str:
    index = number - len(config.sources)
    return f"data.sources.{number}" if index < 0 else f"data.validation.{index}"


def _identity(file: SourceFile) -> str:
    return str(file.place.path.resolve()) if file.place.is_local else str(file.place)


def _find(
    sources: Sequence[ChatSourceConfig],
    field: str,
    first: int,
    max_document_bytes: int,
    problems: list[str],
) -> list[SourceFile]:
    if not sources and first:
        return []
    try:
        files = find_conversation_files(tuple(sources))
    except ConfigError as error:
        problems += [f"data.{field}{line.removeprefix('sources')}" for line in error.problems]
        return []
    return [
        replace(
            file,
            source=file.source + first,
            options=replace(file.options, max_document_bytes=max_document_bytes),
        )
        for file in files
    ]


def _find_format(
    source: ChatSourceConfig, field: str, files: list[SourceFile], problems: list[str]
) -> FormatName | None:
    """Detect the format of a source from the first rows of its files; None adds a problem."""
    found: FormatName | None = None if source.format == "auto" else source.format
    first = "set by `format`"
    for file in files:
        named = _sniff(file)
        if named is None or named == found:
            continue
        if found is None:
            found, first = named, f"{file.place} is"
        elif source.format == "auto":
            problems.append(
                f"{field}.path: {file.place} has the format {named}, but its source has {found} "
                f"({first}); use one source per format"
            )
            return None
    if not files:
        problems.append(
            f"{field}.path: all files of {source.path} are also in data.validation, none is left "
            "to train on; name other files"
        )
    elif found is None:
        problems.append(
            f"{field}.format: no known row format found in {source.path}; set it if the first rows "
            "are damaged. Known formats: alpaca (instruction, output), conversations, messages, "
            "completion (prompt, completion)"
        )
    return found


def _sniff(file: SourceFile) -> FormatName | None:
    for number, row in enumerate(_first_rows(file)):
        found = detect_row_format(row.value)
        if found is not None:
            return found
        if number == _SNIFFED_ROWS:
            return None
    return None


def _first_rows(file: SourceFile) -> Iterator[ObjectRow]:
    for batch in read_head_rows(file):
        yield from batch.objects


def _read(row: ObjectRow, row_format: RowFormat, counts: KeyCounts) -> Conversation | Defect:
    separator = row_format.input_separator
    return read_row(row.value, row_format.name, counts, input_separator=separator)


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
        for number, byte_range, batch in read_byte_ranges(unit, plan.files, tally, quarantine):
            tally.skipped["blank"] += len(batch.texts)
            rows = batch.objects
            for start in range(0, len(rows), _BATCH_CONVERSATIONS):
                some = rows[start : start + _BATCH_CONVERSATIONS]
                bad: list[BadRow] = []
                made = self._encode(some, byte_range, plan, tally, bad)
                quarantine_rows(bad, tally, quarantine, plan.files[byte_range.file], number)
                if made is not None:
                    yield made

    def _encode(
        self,
        rows: Sequence[ObjectRow],
        byte_range: ByteRange,
        plan: BuildPlan,
        tally: Tally,
        bad: list[BadRow],
    ) -> EncodedDocuments | None:
        file = plan.files[byte_range.file]
        keys = KeyCounts()
        usable: list[tuple[ObjectRow, Conversation]] = []
        for row in rows:
            read = self._read(row, file, keys)
            if isinstance(read, Defect):
                bad.append(BadRow(row.line, row.offset, read.reason, read.detail))
            else:
                usable.append((row, read))
        _count_keys(keys, tally)
        kept: list[tuple[ObjectRow, Conversation, EncodedConversation]] = []
        encoded = self._encoder.encode([conversation for _, conversation in usable])
        for (row, conversation), made in zip(usable, encoded, strict=True):
            if isinstance(made, EncodedConversation):
                kept.append((row, conversation, made))
            elif made.reason in DROP_REASONS:
                tally.skipped[made.reason] += 1
            else:
                bad.append(BadRow(row.line, row.offset, made.reason, made.detail))
        if not kept:
            return None
        tally.events["truncated"] += sum(made.num_cut > 0 for *_, made in kept)
        tally.events["cut_tokens"] += sum(made.num_cut for *_, made in kept)
        tally.events["split_boundaries"] += sum(made.num_splits for *_, made in kept)
        split_texts = [_split_text(conversation) for _, conversation, _ in kept]
        return EncodedDocuments(
            file=byte_range.file,
            ids=np.concatenate([made.ids for *_, made in kept]),
            lengths=np.array([len(made.ids) for *_, made in kept], dtype=np.int64),
            num_bytes=np.array([_num_bytes(conversation) for _, conversation, _ in kept]),
            offsets=np.array([row.offset for row, *_ in kept], dtype=np.int64),
            is_validation=self._is_validation(split_texts, file, plan),
            targets=np.concatenate([made.targets for *_, made in kept]),
        )

    def _read(self, row: ObjectRow, file: SourceFile, keys: KeyCounts) -> Conversation | Defect:
        row_format = self._formats[file.source]
        read = _read(row, row_format, keys)
        if isinstance(read, Defect) and read.reason == "missing_field":
            found = detect_row_format(row.value)
            if found not in (None, row_format.name):
                raise SourceError(
                    f"{file.place}: byte {row.offset}: the row has the format {found}, but its "
                    f"source has {row_format.name}; use one source per format: "
                    f"{excerpt(json.dumps(row.value, ensure_ascii=False))}"
                )
        return read

    def _is_validation(
        self, split_texts: list[str], file: SourceFile, plan: BuildPlan
    ) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        if file.source >= self._num_trained:
            return np.ones(len(split_texts), dtype=np.bool_)
        sides = choose_splits(split_texts, plan.validation_fraction)
        return sides.get("validation", np.zeros(len(split_texts), dtype=np.bool_))


def _split_text(conversation: Conversation) -> str:
    """Return the text that decides a conversation's split: equal conversations stay together."""
    return json.dumps(
        [conversation.system, *[turn.content for turn in conversation.turns]], ensure_ascii=False
    )


def _num_bytes(conversation: Conversation) -> int:
    texts = [conversation.system or "", *[turn.content for turn in conversation.turns]]
    return sum(map(count_bytes, texts))


def _count_keys(keys: KeyCounts, tally: Tally) -> None:
    for kind, counter in (
        ("alias", keys.aliased),
        ("ignored field", keys.ignored),
        ("repeated field", keys.repeated),
    ):
        for name, count in counter.items():
            tally.events[f"{kind}: {name}"] += count
