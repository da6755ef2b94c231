"""Conversations as the corpus of a token store: list files, detect row formats, check their heads.

    corpus = open_chat_corpus(config, tokenizer)      # on the driver: files, formats, template
    reader = corpus.build_reader(text_encoder)        # picklable, for the workers

A file whose format differs from its source's first row is an error: two data sets were probably
mixed up. So is a field that may carry meaning and is not used.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from raytune_llama.chat.config import FormatName, RepairConfig
from raytune_llama.chat.conversations import Conversation
from raytune_llama.chat.encoding import build_chat_encoder
from raytune_llama.chat.formats import (
    RowFormat,
    describe_columns,
    detect_row_format,
    read_row,
)
from raytune_llama.chat.row_fields import KeyCounts, plain_name
from raytune_llama.chat.templates.choice import build_template
from raytune_llama.chat.templates.segments import Template
from raytune_llama.chat.templates.tokenizer import TokenizerTemplate
from raytune_llama.config.settings import ConfigError
from raytune_llama.data.build.chat_reader import ChatTextReader, ChatUnitReader, describe_unknown
from raytune_llama.data.config import ChatDataConfig, ChatSourceConfig
from raytune_llama.data.readers.conversations import find_conversation_files
from raytune_llama.data.readers.documents import read_head_rows
from raytune_llama.data.readers.rows import ObjectRow
from raytune_llama.data.readers.sources import SourceFile
from raytune_llama.storage.hashes import hash_key
from raytune_llama.tokenizer.reference import TextEncoder

logger = logging.getLogger(__name__)

_SNIFFED_ROWS = 1000
_SAMPLE_BYTES = 4 << 20

_HEAD_ROWS = 200
"""Rows per file that are read on the driver to find fields that are not used."""

_ROWS_VERSION = 2
"""Version of how rows become conversations, incremented with each change of meaning."""


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

    def fingerprint_inputs(self, like: str | None = None) -> dict[str, Any]:
        """Return the inputs that decide the documents, besides the files and the tokenizer."""
        chat = self.config.chat
        template = build_template(chat.template, self.tokenizer)
        return {
            "validation_sources": len(self.config.validation),
            "rows_version": _ROWS_VERSION,
            "formats": [
                [source.name, source.input_separator, dict(source.columns)]
                for source in self.formats
            ],
            "duplicates": self.config.duplicates.fingerprint_inputs,
            "chat": {
                "template": chat.template,
                hash_key("template_hash", like): template.hash(like),
                "max_tokens": chat.max_tokens,
                "truncation": chat.truncation,
                "train_on_prompt": chat.train_on_prompt,
                "ignore_fields": sorted(map(plain_name, chat.ignore_fields)),
                "repairs": {each.name: getattr(chat, each.name) for each in fields(RepairConfig)},
            },
        }

    def sample_texts(self) -> list[str]:
        """Read messages from the heads of some files, to select an encoder."""
        step = max(1, len(self.files) // 32)
        texts: list[str] = []
        left = _SAMPLE_BYTES
        for file in self.files[::step]:
            for row in _first_rows(file):
                read = read_row(row.value, self.formats[file.source], KeyCounts())
                if isinstance(read, Conversation):
                    texts += read.texts
                    left -= sum(map(len, read.texts))
                if left <= 0:
                    return texts
        return texts

    def build_reader(self, encoder: TextEncoder) -> "ChatUnitReader":
        """Build the unit reader for the workers."""
        num_trained = len(self.config.sources)
        chat = build_chat_encoder(self.tokenizer, self.config.chat, encoder)
        return ChatUnitReader(chat, self.formats, num_trained)

    @property
    def read_texts(self) -> "ChatTextReader":
        """Reader of the texts among which duplicates are searched."""
        return ChatTextReader(self.formats)


def open_chat_corpus(config: ChatDataConfig, tokenizer: PreTrainedTokenizerFast) -> ChatCorpus:
    """List the files of all sources and detect the row format of each source.

    Raises:
        ConfigError: A source matches no file, mixes formats or has no known one, or the tokenizer
            has no usable chat template; lists all such problems with their field paths.
    """
    problems: list[str] = []
    template: Template | None = None
    try:
        template = build_template(config.chat.template, tokenizer)
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
    every, listed = (*config.sources, *config.validation), {file.source for file in trained}
    ignored = frozenset(map(plain_name, config.chat.ignore_fields))
    formats: list[RowFormat] = []
    for number, source in enumerate(every):
        field = source_field(config, number)
        own = [file for file in [*files, *held_out] if file.source == number]
        if not own and number in listed:
            problems.append(
                f"{field}.path: all files of {source.path} are also in data.validation, none is "
                "left to train on; name other files"
            )
        options = RowFormat("messages", source.input_separator, source.fields, ignored, config.chat)
        heads = _Heads(source, options)
        problems += heads.read(own, field)
        formats.append(heads.options)
        if heads.has_tools and isinstance(template, TokenizerTemplate):
            _warn_of_tool_format(template, tokenizer)
    if problems:
        raise ConfigError(problems)
    return ChatCorpus(config, tokenizer, [*files, *held_out], tuple(formats))


def source_field(config: ChatDataConfig, number: int) -> str:
    """Return the config field of a source, by its number in the store."""
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


class _Heads:
    """What the first rows of a source's files show: their format, unused fields, tools."""

    def __init__(self, source: ChatSourceConfig, options: RowFormat) -> None:
        self.options = options
        """How to read the rows; its format's name is set once a row has shown it."""
        self.has_tools = False
        self._source = source
        self._found: FormatName | None = None
        self._first_in_format = "set by `format`"
        if source.format != "auto":
            self._set_format(source.format)
        self._unnamed: ObjectRow | None = None
        self._counts = KeyCounts()
        self._first_unknown: dict[str, str] = {}
        self._num_rows = 0

    def _set_format(self, name: FormatName) -> None:
        self._found, self.options = name, replace(self.options, name=name)

    def read(self, files: list[SourceFile], field: str) -> list[str]:
        """Read the first rows of the files; return the problems, each with the source's field."""
        for file in files:
            other = self._read_file(file)
            if other is not None:
                return [
                    f"{field}.path: {file.place} has the format {other}, but its source has "
                    f"{self._found} ({self._first_in_format}); use one source per format"
                ]
        if files and self._found is None:
            row = self._unnamed
            columns = "no row is a JSON object" if row is None else describe_columns(row.value)
            return [
                f"{field}.fields: no known row format found in {self._source.path}: {columns}. "
                "Known formats: alpaca (instruction, output), conversations, messages, completion "
                "(prompt, completion); set format if only the first rows are damaged"
            ]
        return [
            f"{field}: {describe_unknown(name, count)} of the first {self._num_rows} "
            f"(first: {self._first_unknown[name]})"
            for name, count in self._counts.unknown.items()
        ]

    def _read_file(self, file: SourceFile) -> FormatName | None:
        """Read the first rows of a file; return its format if it is not the source's."""
        named: FormatName | None = None
        for number, row in enumerate(_first_rows(file)):
            is_sought = named is None and self._source.format == "auto"
            if number >= _HEAD_ROWS and (not is_sought or number > _SNIFFED_ROWS):
                break
            if named is None:
                named = detect_row_format(row.value, self._source.fields)
                if named is None:
                    self._unnamed = self._unnamed or row
                elif self._found is None:
                    self._set_format(named)
                    self._first_in_format = f"{file.place} is"
                elif named != self._found and self._source.format == "auto":
                    return named
            if number < _HEAD_ROWS:
                self._count(row, file)
        return None

    def _count(self, row: ObjectRow, file: SourceFile) -> None:
        self._num_rows += 1
        if self._found is None:
            return
        read = read_row(row.value, self.options, self._counts)
        self.has_tools = self.has_tools or (isinstance(read, Conversation) and bool(read.tools))
        for name in self._counts.unknown.keys() - self._first_unknown:
            self._first_unknown[name] = f"{file.place}, row at line {row.line}"


def _warn_of_tool_format(template: TokenizerTemplate, tokenizer: PreTrainedTokenizerFast) -> None:
    if template.has_other_tool_format():
        logger.warning(
            "the chat template of %s has a format of its own for tools; training and serving write "
            "them in that of Qwen's and Hermes' templates, and other servers may parse its calls "
            "differently",
            tokenizer.name_or_path,
        )


def _first_rows(file: SourceFile) -> Iterator[ObjectRow]:
    for batch in read_head_rows(file):
        yield from batch.objects
