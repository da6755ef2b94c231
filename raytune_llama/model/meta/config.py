"""Settings of a conversion between Meta's format and a model directory."""

from typing import Annotated, Literal

from pydantic import Field

from raytune_llama.config.settings import settings


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
    max_position_embeddings: Annotated[int, Field(ge=1)] = 2048
    """Context length in tokens, not recorded by Meta: 2,048 for LLaMA 1, 4,096 for LLaMA 2."""
    max_shard_mib: Annotated[int, Field(ge=1)] = 5120
    """Maximum size of a safetensors file in MiB, unless one tensor is larger."""
    require_originals: bool = False
    """Refuse Meta's files whose SHA256 is not in the published list (LLaMA 7B, 13B, 33B)."""
