"""Names of a base's weights: in its files, in the model that an adapter was attached to.

They are the same for a LLaMA. Other families name their embedding tables in their own way, and a
model that was saved without its head lacks the first part of each name (Bloom's published files).
"""

from dataclasses import dataclass
from pathlib import Path

from raytune_llama.config.errors import UserError
from raytune_llama.model.embeddings import embedding_layers
from raytune_llama.model.llama import build_empty_model
from raytune_llama.model.tensors import ShardedWeights
from raytune_llama.model.vocab import EMBEDDING, HEAD


@dataclass(frozen=True)
class BaseWeightNames:
    """How a base names its weights."""

    embedding: str
    """Its input embedding, in its files."""
    head: str
    """Its output projection; a tied one need not be in the files."""
    prefix: str
    """First part of the adapters' names that those in the files lack; mostly empty."""


def find_weight_names(base_dir: Path, base: ShardedWeights) -> BaseWeightNames:
    """Find the embedding tables of a base.

    Args:
        base_dir: Its directory, whose config.json is read unless it has a LLaMA's names.
        base: Its weights.

    Raises:
        ValueError: The directory is of no causal LM that transformers knows, or its files hold no
            input embedding.
    """
    if EMBEDDING in base.specs:
        return BaseWeightNames(EMBEDDING, HEAD, "")
    try:
        model = build_empty_model(base_dir)
    except (ValueError, OSError) as error:
        raise UserError(f"base: {base_dir} is no causal LM that can be read: {error}") from error
    names = {id(layer): f"{name}.weight" for name, layer in embedding_layers(model).items()}
    embedding = names[id(model.get_input_embeddings())]
    head = names.get(id(model.get_output_embeddings()), HEAD)
    prefix = f"{model.base_model_prefix}."
    if embedding in base.specs:
        return BaseWeightNames(embedding, head, "")
    if embedding.removeprefix(prefix) in base.specs:
        return BaseWeightNames(embedding.removeprefix(prefix), head, prefix)
    raise UserError(
        f"base: the files of {base_dir} hold no {embedding}, the input embedding of a "
        f"{type(model).__name__}; load it in transformers and save it again"
    )
