"""Settings of a token store built from text or from conversations."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.chat.config import ChatConfig, FormatName
from raytune_llama.config.settings import PLACEMENT, ConfigError, settings
from raytune_llama.data.filters.config import CleaningConfig, DuplicatesConfig
from raytune_llama.data.readers.config import ConversationSource, SourceConfig
from raytune_llama.data.store.config import StoreConfig


@settings
class DataConfig(StoreConfig):
    """Settings of a token store built from text corpora."""

    sources: tuple[SourceConfig, ...]
    """Text corpora, in store order."""
    bos: Literal["auto"] | bool = "auto"
    """Whether each document begins with the tokenizer's beginning-of-text id. `auto`: with what
    transformers' `tokenizer(text)` puts before a text, as prompts do in serving; a run or token
    store of the former default, true, keeps it."""
    eos: bool = True
    """Whether each document ends with the tokenizer's end-of-text id. It marks where a text ends,
    which a model learns from it alone; a prompt has none, so what transformers' `tokenizer(text)`
    appends does not matter here."""
    cleaning: CleaningConfig = CleaningConfig()
    """Text normalization and document filters, all off by default. Dropped documents are counted
    by reason."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    """Removal of exact and near duplicates across all sources, after cleaning; off by default.
    Needs a second pass over the corpus. Dropped documents are counted."""

    @property
    def validation(self) -> tuple[SourceConfig, ...]:
        """Evaluation-only sources; always empty, as text holds out `validation_fraction`."""
        return ()

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """All sources, in the order of the store's source indices."""
        return self.sources


@settings
class ChatSourceConfig(ConversationSource):
    """One source of conversations."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the run's sequences, relative to the other sources' weights; for all sources or for
    none. Null: every sequence once per epoch."""
    name: Annotated[Annotated[str, Field(pattern=r"^[\w.-]+$")] | None, PLACEMENT] = None
    """Unique name in metrics and manifests. Null: the last part of the path, without suffix and
    wildcards."""


@settings
class ChatDataConfig(StoreConfig):
    """Settings of a token store built from conversations, with a loss mask."""

    sources: tuple[ChatSourceConfig, ...]
    """Conversations to train on, in store order."""
    validation: tuple[ChatSourceConfig, ...] = ()
    """Evaluation-only conversations. Their files are never trained on, even if `sources` also
    matches them; their weights must be null."""
    chat: ChatConfig = ChatConfig()
    """How conversations are rendered and tokenized."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    """Removal of exact and near duplicates among all conversations; off by default. Needs a second
    pass over the files. Dropped conversations are counted."""
    max_left_out_fraction: Annotated[float, Field(ge=0, le=1), PLACEMENT] = 0.2
    """Maximum fraction of rows that are left out because no token of an answer would be trained,
    such as those longer than `chat.max_tokens`; above it the job fails. The same fraction of cut
    rows is warned about."""
    max_suspicious_fraction: Annotated[float, Field(ge=0, le=1), PLACEMENT] = 0.05
    """Maximum fraction of rows with an answer that looks like a failed export, such as `#REF!`,
    `n/a` or `_x000D_`; above it the job fails."""

    @model_validator(mode="after")
    def _check(self) -> "ChatDataConfig":
        problems = [
            f"validation.{number}.weight: got {source.weight}, but validation sources are never "
            "trained on; remove it"
            for number, source in enumerate(self.validation)
            if source.weight is not None
        ]
        if self.validation and self.validation_fraction:
            problems.append(
                f"validation_fraction: got {self.validation_fraction}, but `validation` also lists "
                "files; use only one of them"
            )
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def all_sources(self) -> tuple[ChatSourceConfig, ...]:
        """All sources, in the order of the store's source indices."""
        return (*self.sources, *self.validation)


AnyDataConfig = DataConfig | ChatDataConfig
"""Settings of a token store of either kind."""


@settings
class PrepareConfig:
    """Settings of the `prepare_data` job that do not depend on what its rows are."""

    tokenizer: str
    """Directory of a tokenizer, or of a model that includes one: local, `s3://...` or `gs://...`,
    or on the hub, `hf://org/name[@revision]`."""
    rows: Literal["auto", "text", "conversations"] = "auto"
    """What the rows of `data.sources` are. `auto`: conversations if `data` has a field that only
    conversations have, such as `chat` or `validation`, or if its fields fit both and the first row
    is in a known format of conversations and has no `text`; otherwise text."""
    preview: bool = False
    """Whether to print a few documents or conversations per source as tokens, spread over its
    files, instead of building the store. Colors mark the tokens in a terminal, unless the
    environment variable NO_COLOR is set."""
    preview_documents: Annotated[int, Field(ge=1)] = 3
    """Number of documents or conversations to print per source."""


@settings
class PrepareDataConfig(PrepareConfig):
    """Settings of the `prepare_data` job: the token store to build and its tokenizer."""

    data: DataConfig
    """Token store to build. For one of conversations, `--help data.chat` and `--help
    data.validation` list its other fields. The config of a training job is taken too: its `data`
    is built with its tokenizer and, for conversations, its `batch.sequence_tokens`."""


@settings
class PrepareChatDataConfig(PrepareConfig):
    """Settings of the `prepare_data` job for conversations."""

    data: ChatDataConfig
    """Token store to build. Training cuts conversations at `batch.sequence_tokens` if
    `chat.max_tokens` is null; set it here for the same store."""


AnyPrepareConfig = PrepareDataConfig | PrepareChatDataConfig
"""Config of the `prepare_data` job of either kind."""


@settings
class DevSplit:
    """Rule that selects the held-out rows, which are written to `dev`."""

    head: Annotated[int, Field(ge=1)] | None = None
    """Number of rows held out from the start of the output; CALM's scripts use 3000. Null: use
    `hash_fraction`."""
    hash_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction of rows held out by the SHA-256 of their text: equal conversations land in the same
    split, whatever their order and ids. Null: use `head`."""

    @model_validator(mode="after")
    def _check(self) -> "DevSplit":
        if (self.head is None) == (self.hash_fraction is None):
            raise ConfigError(["head: set either head or hash_fraction, and the other to null"])
        return self


@settings
class ConvertDataConfig:
    """Settings of the `convert_data` job."""

    sources: tuple[ConversationSource, ...]
    """Conversations to read; each source has one format."""
    target: Annotated[str, Field(min_length=1)]
    """Directory to create; it must not exist."""
    format: FormatName = "conversations"
    """Output row format."""
    layout: Literal["jsonl", "json"] = "jsonl"
    """Output file layout: `jsonl` is one row per line, `json` one array per file."""
    id_prefix: str | None = None
    """Prefix of generated ids: a row without an id gets `<id_prefix>-<n>`, where n counts all input
    rows from 1, bad ones included. Null: no id is generated."""
    ignore_fields: tuple[str, ...] = ()
    """Names of fields that are not converted; see `ChatConfig.ignore_fields`."""
    split: DevSplit | None = None
    """Rule that selects the held-out rows; null: none are held out."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Maximum fraction of unusable rows; above it the job fails and writes nothing."""

    @model_validator(mode="after")
    def _check(self) -> "ConvertDataConfig":
        if not self.sources:
            raise ConfigError(["sources: got an empty list; name at least one file"])
        return self
