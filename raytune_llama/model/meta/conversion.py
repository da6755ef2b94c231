"""Convert LLaMA weights between Meta's format and Hugging Face's, bit for bit.

convert_weights(ConvertConfig(source="llama/7B", target="llama-7b"))
convert_weights(ConvertConfig(source="merged", target="merged-pth", to="meta", num_shards=2))
"""

from raytune_llama.config.errors import UserError
from raytune_llama.model.meta.config import ConvertConfig
from raytune_llama.model.meta.from_meta import convert_to_huggingface
from raytune_llama.model.meta.to_meta import convert_to_meta
from raytune_llama.storage.place import local_path


def convert_weights(config: ConvertConfig) -> None:
    """Run the configured conversion; see `convert_to_huggingface` and `convert_to_meta`."""
    source, target = local_path(config.source, "source"), local_path(config.target, "target")
    if not source.is_dir():
        raise UserError(f"source: {source} is not a directory; name a directory with weights")
    if config.to == "huggingface":
        convert_to_huggingface(
            source,
            target,
            max_position_embeddings=config.max_position_embeddings,
            instruct=config.instruct,
            max_shard_bytes=config.max_shard_mib << 20,
            require_originals=config.require_originals,
        )
    else:
        convert_to_meta(source, target, num_shards=config.num_shards)
