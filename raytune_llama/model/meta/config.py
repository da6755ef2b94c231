"""Settings of a conversion between Meta's format and a model directory."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_llama.config.settings import ConfigError, settings


@settings
class ConvertConfig:
    """Settings of a weight conversion."""

    source: str
    """Directory with Meta's files, or a Hugging Face model directory."""
    target: str
    """Output directory; it must be new or empty."""
    to: Literal["huggingface", "meta"] = "huggingface"
    """Format of the target; the source has the other one."""
    num_shards: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of files in Meta's format; Meta published 1, 2, 4 and 8 for 7B, 13B, 33B and 65B."""
    max_position_embeddings: Annotated[int, Field(ge=1)] | None = None
    """Context length in tokens, which Meta's files do not record. Null: 2,048 for a SentencePiece
    tokenizer, as in LLaMA 1 (LLaMA 2: 4,096), 8,192 for LLaMA 3 and 131,072 for 3.1 and later."""
    instruct: bool | None = None
    """Whether a LLaMA 3 is an instruct model, which Meta's files do not record: its turns end with
    <|eot_id|>, and it gets Meta's chat template. Required for LLaMA 3, null for others."""
    max_shard_mib: Annotated[int, Field(ge=1)] = 5120
    """Maximum size of a safetensors file in MiB, unless one tensor is larger."""
    require_originals: bool = False
    """Refuse Meta's files whose SHA256 is not in the published list (LLaMA 7B, 13B, 33B)."""

    @model_validator(mode="after")
    def _check(self) -> "ConvertConfig":
        wanted = {
            "num_shards": ("meta", self.num_shards != 1),
            "max_position_embeddings": ("huggingface", self.max_position_embeddings is not None),
            "instruct": ("huggingface", self.instruct is not None),
            "require_originals": ("huggingface", self.require_originals),
        }
        problems = [
            f"{name}: is only for to={form}, got to={self.to}; remove it"
            for name, (form, is_set) in wanted.items()
            if is_set and self.to != form
        ]
        if problems:
            raise ConfigError(problems)
        return self
