"""The rows of the input: prompts in order, each with its index, also those that can't be used.

    prompts = read_prompts(config.input, with_prompt=True, system=None)
    prompts.rows[0].conversation

A row that can't be used has a problem instead of a prompt and is written with it, so that each row
of the input has its line in the output. Blank lines are no rows: they are counted and named.
"""

import heapq
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raytune_llama.chat.config import FieldName
from raytune_llama.chat.conversations import Conversation, Defect, Turn
from raytune_llama.chat.formats import (
    RowFormat,
    describe_columns,
    detect_prompt_format,
    read_prompt,
)
from raytune_llama.chat.row_fields import KeyCounts, plain_name
from raytune_llama.config.settings import ConfigError, renamed_fields
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.data.readers.conversations import ConversationCounts, read_objects
from raytune_llama.data.readers.detection import FileKind
from raytune_llama.data.readers.documents import read_file
from raytune_llama.data.readers.rows import BadRow, ObjectRow, RowBatch, SourceError, excerpt
from raytune_llama.data.readers.sources import SourceFile, discover_files
from raytune_llama.generate.config import InputConfig
from raytune_llama.storage.directories import parse_source

logger = logging.getLogger(__name__)

_NUM_SHOWN = 10
_TEXT_COLUMN: dict[FieldName, str] = {"prompt": "text"}


@dataclass(frozen=True, slots=True)
class PromptedRow:
    """A row of the input."""

    index: int
    """Index of the row, from 0; blank lines do not count."""
    id: str | None = None
    """Id of the row; None if it has none."""
    conversation: Conversation | None = None
    """Conversation to answer; None if the row is a text to continue, or can't be used."""
    text: str | None = None
    """Text to continue; None if the row is a conversation, or can't be used."""
    reference: str | None = None
    """Answer that the row has; None if it has none."""
    problem: str | None = None
    """Why the row can't be used; None if it can."""

    @property
    def num_characters(self) -> int:
        """Number of characters of the prompt."""
        if self.conversation is not None:
            return sum(map(len, self.conversation.texts))
        return len(self.text or "")

    def describe(self) -> dict[str, Any]:
        """Return the part of the row's output that is known before it is answered."""
        described: dict[str, Any] = {"index": self.index}
        if self.id is not None:
            described["id"] = self.id
        if self.conversation is not None:
            described["messages"] = _write_messages(self.conversation)
            if self.conversation.tools:
                described["tools"] = [json.loads(tool) for tool in self.conversation.tools]
        if self.text is not None:
            described["prompt"] = self.text
        if self.reference is not None:
            described["reference"] = self.reference
        return described


@dataclass(slots=True)
class Prompts:
    """The input of a job."""

    rows: list[PromptedRow] = field(default_factory=list)
    """All rows, in the order of the input."""
    files: dict[str, str] = field(default_factory=dict)
    """Hash of each file, by its name relative to the input's path."""
    num_blank_lines: int = 0
    """Number of blank lines."""
    blank_lines: list[str] = field(default_factory=list)
    """Places of the first blank lines of text files, as `FILE: line N`."""
    keys: KeyCounts = field(default_factory=KeyCounts)
    """Counts of field names that are aliases, ignored or unknown."""


def read_prompts(source: InputConfig, *, with_prompt: bool, system: str | None) -> Prompts:
    """Read all rows of the input into memory.

    Args:
        source: input of the config.
        with_prompt: whether rows are conversations to answer; false: texts to continue.
        system: system message of rows that have none; None: no message.

    Raises:
        ConfigError: the path matches no file that can be read.
        SourceError: a file can't be read, or no row can be used.
    """
    prompts = Prompts()
    files = _find_files(source)
    prompts.files = {file.name: file.place.hash() for file in files}
    rows = itertools.chain.from_iterable(_read(file, source, prompts) for file in files)
    for row in itertools.islice(rows, source.max_rows):
        prompt = _with_system(row, system) if with_prompt else _as_text(row)
        prompts.rows.append(replace(prompt, index=len(prompts.rows)))
    _log(prompts, source)
    if all(row.problem is not None for row in prompts.rows):
        first = f"; the first: {prompts.rows[0].problem}" if prompts.rows else ""
        raise SourceError(f"input: none of {len(prompts.rows)} rows can be used{first}")
    return prompts


def _find_files(source: InputConfig) -> list[SourceFile]:
    kind = FileKind.from_name(parse_source(source.path, "input.path").name, "auto")
    is_text = kind is not None and kind.format == "txt"
    with renamed_fields({"sources.0.": "input.", "sources:": "input:"}):
        files = discover_files(
            (SourceConfig(path=source.path, encoding=source.encoding),),
            rows="texts" if is_text else "objects",
        )
    if is_text and (source.fields or source.format != "auto"):
        name = "fields" if source.fields else "format"
        raise ConfigError([f"input.{name}: set, but {source.path} is plain text: remove it"])
    return files


def _read(file: SourceFile, source: InputConfig, prompts: Prompts) -> Iterator[PromptedRow]:
    """Yield the rows of a file, not numbered yet."""
    if file.options.format == "txt":
        yield from _read_lines(file, prompts)
        return
    counts = ConversationCounts()
    ignored = frozenset(map(plain_name, source.ignore_fields))
    for row in read_objects(file, counts):
        if isinstance(row, BadRow):
            yield _unusable(file, row.line, row)
            continue
        read = _read_object(row, source, ignored, prompts.keys)
        yield _unusable(file, row.line, read) if isinstance(read, Defect) else read
    prompts.num_blank_lines += counts.blank_lines


def _read_lines(file: SourceFile, prompts: Prompts) -> Iterator[PromptedRow]:
    number = 0
    for batch in read_file(file):
        for line in _lines_in_order(batch):
            number += 1
            if isinstance(line, BadRow):
                yield _unusable(file, number, line)
            elif line.strip():
                yield PromptedRow(0, text=line)
            else:
                prompts.num_blank_lines += 1
                if len(prompts.blank_lines) < _NUM_SHOWN:
                    prompts.blank_lines.append(f"{file.name}: line {number}")


def _lines_in_order(batch: RowBatch) -> Iterator[str | BadRow]:
    texts = zip(batch.offsets, batch.texts, strict=True)
    bad = ((row.offset, row) for row in batch.bad)
    for _, line in heapq.merge(texts, bad, key=lambda pair: pair[0]):
        yield line


def _read_object(
    row: ObjectRow, source: InputConfig, ignored: frozenset[str], keys: KeyCounts
) -> PromptedRow | Defect:
    columns: Mapping[FieldName, str] = source.fields
    found = None if source.format == "auto" else source.format
    found = found or detect_prompt_format(row.value, columns)
    if found is None and not columns and "text" in row.value:
        # BELLE's inference reads such rows.
        found, columns = "completion", _TEXT_COLUMN
    if found is None:
        return Defect("unknown_format", excerpt(describe_columns(row.value)))
    row_format = RowFormat(found, source.input_separator, columns, ignored)
    read = read_prompt(row.value, row_format, keys)
    if isinstance(read, Defect):
        return read
    if not read.conversation.turns:
        return Defect("empty_conversation", "there is no message to answer")
    conversation = replace(read.conversation, places=())
    return PromptedRow(0, conversation.id, conversation, reference=read.reference)


def _unusable(file: SourceFile, line: int, reason: Defect | BadRow) -> PromptedRow:
    return PromptedRow(0, problem=f"{file.name}: line {line}: {reason.reason}: {reason.detail}")


def _with_system(row: PromptedRow, system: str | None) -> PromptedRow:
    """Return a row as a conversation."""
    if row.text is not None:
        return replace(row, text=None, conversation=Conversation((Turn("user", row.text),), system))
    if row.conversation is not None and row.conversation.system is None:
        return replace(row, conversation=replace(row.conversation, system=system))
    return row


def _as_text(row: PromptedRow) -> PromptedRow:
    """Return a row as a text to continue; a conversation of more than one text is a problem."""
    conversation = row.conversation
    if conversation is None:
        return row
    if len(conversation.texts) == 1 and conversation.turns[0].role == "user":
        return replace(row, conversation=None, text=conversation.turns[0].content)
    problem = (
        f"with_prompt=false continues one text, but the row has {len(conversation.texts)}: "
        "system message, tools and turns"
    )
    return replace(row, conversation=None, problem=problem)


def _write_messages(conversation: Conversation) -> list[dict[str, str]]:
    written: list[dict[str, str]] = []
    if conversation.system is not None:
        written.append({"role": "system", "content": conversation.system})
    for turn in conversation.turns:
        reasoning = {} if turn.reasoning is None else {"reasoning_content": turn.reasoning}
        written.append({"role": turn.role, "content": turn.content, **reasoning})
    return written


def _log(prompts: Prompts, source: InputConfig) -> None:
    is_cut = source.max_rows == len(prompts.rows)
    first = ", as many as input.max_rows" if is_cut else ""
    logger.info("input: %s: %d rows%s", source.path, len(prompts.rows), first)
    if prompts.num_blank_lines:
        named = f", such as {', '.join(prompts.blank_lines)}" if prompts.blank_lines else ""
        logger.warning("input: skipped %d blank lines%s", prompts.num_blank_lines, named)
    unusable = [row for row in prompts.rows if row.problem is not None]
    if unusable:
        shown = "; ".join(f"row {row.index}: {row.problem}" for row in unusable[:_NUM_SHOWN])
        logger.warning("input: %d rows can't be used: %s", len(unusable), shown)
    ids = [row.id for row in prompts.rows if row.id is not None]
    if len(set(ids)) < len(ids):
        logger.warning("input: %d ids are not unique; rows keep them", len(ids) - len(set(ids)))
    for meaning, names in (
        ("read under an alias", prompts.keys.aliased),
        ("that are metadata or ignored, not used", prompts.keys.ignored),
    ):
        if names:
            listed = ", ".join(f"{name!r} {number} times" for name, number in names.most_common(20))
            logger.info("input: fields %s: %s", meaning, listed)


def log_moved_systems(prompts: Prompts, *, allows_system: bool) -> None:
    """Log how many rows have a system message that the template has no place for.

    It is at the start of the first user turn then, as in serving.
    """
    if allows_system:
        return
    number = sum(bool(row.conversation and row.conversation.system) for row in prompts.rows)
    if number:
        logger.warning(
            "the template has no system messages: those of %d rows are at the start of their first "
            "user turn",
            number,
        )
