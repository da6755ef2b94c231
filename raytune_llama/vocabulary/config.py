"""Settings of a vocabulary expansion."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings
from raytune_llama.data.readers.config import SourceConfig
from raytune_llama.model.config import InitialRows

PieceScores = Literal["descending", "tied"]
"""Scores of merged pieces: each below the one before it, or all 0."""


@settings
class PieceTraining:
    """Settings for learning new tokens from text."""

    num_tokens: Annotated[int, Field(ge=300)] = 20_000
    """Size of the vocabulary that SentencePiece trains, which may overlap with the base's; for a
    byte-level base, the number of tokens to add."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece's training algorithm. A LLaMA tokenizer always merges pairs, so some pieces
    trained with unigram are unreachable. Not used for a byte-level base."""
    character_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9995
    """Share of the text's characters that get a piece. Not used for a byte-level base, which can
    encode all of them."""
    num_threads: Annotated[int, Field(ge=1)] = 2
    """Number of threads of SentencePiece."""


@settings
class GrowthConfig:
    """The embedding rows that a model gets for new tokens."""

    initial_rows: InitialRows = "mean_subtokens"
    """Initialization, in the input embedding and the output projection. `mean_subtokens`: the mean
    of the old tokens that the text splits into; `mean`: of all old tokens; `normal`: draws around 0
    with the config's `initializer_range`, as in older transformers."""
    rows_multiple_of: Annotated[int, Field(ge=1)] = 1
    """The number of rows is rounded up to a multiple of this; 64 or 128 suits GPUs. Surplus rows
    are initialized to the mean of all old tokens."""
    seed: Annotated[int, Field(ge=0)] = 1
    """Random seed of `normal`."""
    max_shard_mib: Annotated[int, Field(ge=1)] = 5120
    """Maximum size of a safetensors file in MiB, unless one tensor is larger."""


@settings
class ExpandVocabConfig:
    """A tokenizer to grow, and the text to learn new tokens from."""

    model: str
    """Model directory with its tokenizer, or the directory of a tokenizer alone: local, `s3://...`
    or `gs://...`, or on the hub, `hf://org/name[@revision]`."""
    target: str
    """Output directory, of the same kind; it must be new or empty."""
    sources: tuple[SourceConfig, ...]
    """Text in the new language."""
    old_sources: tuple[SourceConfig, ...] = ()
    """Text like the model's training data, to show that its ids do not change. Empty: that is not
    measured."""
    pieces: str | None = None
    """SentencePiece model whose pieces are merged; null: train one on `sources`."""
    training: PieceTraining = PieceTraining()
    """Settings for learning from `sources`; not used if `pieces` is given."""
    sample_mib: Annotated[int, Field(ge=1)] = 256
    """Text to learn from, in MiB: of larger corpora, evenly spaced ranges of 1 MiB. SentencePiece
    takes about ten times as much memory."""
    scores: PieceScores = "descending"
    """Scores of merged pieces. `descending`: each below the one before it and all of the base's, so
    that SentencePiece and tokenizers give the same ids; pieces for which they do not are dropped.
    `tied`: all 0, as in the Chinese-LLaMA scripts, whose result `keep_ascii` and
    `keep_unreachable` reproduce."""
    keep_ascii: bool = False
    """Also merge pieces that consist only of ASCII characters, quotes and dashes, which change the
    ids of English text."""
    keep_unreachable: bool = False
    """Also merge pieces that a LLaMA tokenizer can never produce."""
    pad_token: str | None = None
    """Text of a padding token to add after all others, such as `[PAD]`; null: none is added."""
    growth: GrowthConfig = GrowthConfig()
    """The embedding rows that the model gets."""

    @model_validator(mode="after")
    def _check(self) -> "ExpandVocabConfig":
        problems = [
            f"sources: {problem}" for problem in ([] if self.sources else ["got none; name some"])
        ]
        if self.pad_token is not None and not self.pad_token.strip():
            problems.append("pad_token: is blank; use a text such as [PAD], or null")
        if problems:
            raise ConfigError(problems)
        return self
