"""What a token store is made from: text, or conversations."""

from typing import Annotated

from pydantic import Field, model_validator

from raytune_llama.chat.encoding import ChatConfig
from raytune_llama.config.settings import PLACEMENT, ConfigError, settings
from raytune_llama.data.filters.cleaning import CleaningConfig
from raytune_llama.data.filters.signatures import DuplicatesConfig
from raytune_llama.data.readers.conversations import ConversationSource
from raytune_llama.data.readers.sources import SourceConfig
from raytune_llama.data.store.config import StoreConfig


@settings
class DataConfig(StoreConfig):
    """A token store and the corpora it is made from."""

    sources: tuple[SourceConfig, ...]
    """The corpora, in the order of the store."""
    bos: bool = True
    """Whether each document begins with the tokenizer's beginning-of-text id."""
    eos: bool = True
    """Whether each document ends with the tokenizer's end-of-text id."""
    cleaning: CleaningConfig = CleaningConfig()
    """Normalisation, and rules that leave documents out; all off. What they leave out is counted
    by reason."""
    duplicates: DuplicatesConfig = DuplicatesConfig()
    """Exact and near duplicates over all sources, behind cleaning; off. Takes a second pass over
    the corpus. What is left out is counted."""

    @property
    def validation(self) -> tuple[SourceConfig, ...]:
        """Sources for evaluation alone; of text a fraction is taken instead."""
        return ()

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources by which the store numbers its documents."""
        return self.sources


@settings
class ChatSourceConfig(ConversationSource):
    """Conversations that are trained on."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the run's sequences, as of a source of text."""
    name: Annotated[Annotated[str, Field(pattern=r"^[\w.-]+$")] | None, PLACEMENT] = None
    """Name in metrics and manifests, as of a source of text."""


@settings
class ChatDataConfig(StoreConfig):
    """A token store of conversations, with a mask of what is learned."""

    sources: tuple[ChatSourceConfig, ...]
    """The conversations, in the order of the store."""
    validation: tuple[ChatSourceConfig, ...] = ()
    """Conversations for evaluation alone. A file of them is never trained on, even where it lies
    in a folder of `sources`; their weights are of no use."""
    chat: ChatConfig = ChatConfig()
    """How conversations become ids."""

    @model_validator(mode="after")
    def _check(self) -> "ChatDataConfig":
        problems = [
            f"validation.{number}.weight: got {source.weight}, but nothing of it is trained on; "
            "remove it"
            for number, source in enumerate(self.validation)
            if source.weight is not None
        ]
        if self.validation and self.validation_fraction:
            problems.append(
                f"validation_fraction: got {self.validation_fraction}, and validation names files "
                "of their own; use one of them"
            )
        if problems:
            raise ConfigError(problems)
        return self

    @property
    def all_sources(self) -> tuple[ChatSourceConfig, ...]:
        """The sources by which the store numbers its documents."""
        return (*self.sources, *self.validation)


AnyDataConfig = DataConfig | ChatDataConfig
"""Of text, or of conversations."""


@settings
class PrepareDataConfig:
    """A token store to build, and the tokenizer for it."""

    tokenizer: str
    """Directory of a tokenizer, or of a model with its tokenizer."""
    data: DataConfig
    """What to encode, and where to."""
    preview: bool = False
    """Print some documents of each source as tokens, and build nothing."""
    preview_documents: Annotated[int, Field(ge=1)] = 3
    """How many of each source."""
