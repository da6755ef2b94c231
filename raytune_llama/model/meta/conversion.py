"""Convert LLaMA weights between Meta's form and Hugging Face's; every bit of every weight.

convert_weights(ConvertConfig(source="llama/7B", target="llama-7b"))
convert_weights(ConvertConfig(source="merged", target="merged-pth", to="meta", num_shards=2))
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import settings
from raytune_llama.model.meta.from_meta import convert_to_huggingface
from raytune_llama.model.meta.to_meta import convert_to_meta


@settings
class ConvertConfig:
    """Weights to convert."""

    source: str
    """Directory with Meta's files, or a Hugging Face model directory."""
    target: str
    """Directory to make; it must not exist, or be empty."""
    to: Literal["huggingface", "meta"] = "huggingface"
    """Which form the target has; the source has the other one."""
    num_shards: Annotated[int, Field(ge=1, le=64)] = 1
    """Files of Meta's form; it published 1, 2, 4 and 8 for 7B, 13B, 33B and 65B."""
    max_position_embeddings: Annotated[int, Field(ge=1)] = 2048
    """Tokens of context, which Meta's files don't tell: 2,048 for LLaMA 1, 4,096 for LLaMA 2."""
    max_shard_mib: Annotated[int, Field(ge=1)] = 5120
    """Largest safetensors file, unless one tensor is larger."""
    require_originals: bool = False
    """Refuse Meta's files whose SHA256 is not in the published list (LLaMA 7B, 13B, 33B)."""


def convert_weights(config: ConvertConfig) -> None:
    """Do what a config says; see `convert_to_huggingface` and `convert_to_meta`."""
    source, target = Path(config.source), Path(config.target)
    if not source.is_dir():
        raise UserError(f"source: {source} is not a directory; name one with weights")
    if config.to == "huggingface":
        convert_to_huggingface(
            source,
            target,
            max_position_embeddings=config.max_position_embeddings,
            max_shard_bytes=config.max_shard_mib << 20,
            require_originals=config.require_originals,
        )
    else:
        convert_to_meta(source, target, num_shards=config.num_shards)
