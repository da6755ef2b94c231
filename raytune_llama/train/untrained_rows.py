"""Rows of the embedding tables that no training has touched since the vocabulary has grown.

They are counted before a run, and marked in the manifest of its result, so that the next run knows
of them.
"""

from pathlib import Path

from transformers import PreTrainedModel

from raytune_llama.model.embeddings import embedding_layers, trained_layers
from raytune_llama.model.lora import check_adapter_directory, is_tied
from raytune_llama.storage.files import read_json, read_manifest
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig

UNTRAINED_ROWS = "untrained_rows"
"""Key of a model's manifest: how many rows of each table no training has touched."""


def count_untrained_rows(
    config: AnyTrainConfig, model: PreTrainedModel, num_new_ids: int
) -> dict[str, int]:
    """Return how many rows of each table will be as they started when a run has ended.

    Args:
        config: of the run.
        model: its base, with or without its weights, before or after its training.
        num_new_ids: ids of the tokenizer that the base's own lacks.

    Returns:
        By the last part of the layer's name; a table without such rows is left out.
    """
    before = read_untrained_rows(Path(config.model.path))
    counts = {name: num_new_ids + before.get(name, 0) for name in _untrained_tables(config, model)}
    return {name: count for name, count in counts.items() if count}


def read_untrained_rows(path: Path) -> dict[str, int]:
    """Return the rows of each table that the run which made a model directory left untrained."""
    return dict(read_manifest(path).get(UNTRAINED_ROWS) or {})


def check_embedding_rate(config: AnyTrainConfig, model: PreTrainedModel) -> list[str]:
    """Return why the learning rate of embedding tables has none to work on; empty where it has."""
    frozen = _untrained_tables(config, model)
    if config.optim.embedding_learning_rate is None or len(frozen) < len(embedding_layers(model)):
        return []
    return [
        f"optim.embedding_learning_rate: got {config.optim.embedding_learning_rate}, but the run "
        f"trains neither {' nor '.join(frozen)}; set it to null, or name one of them in "
        "lora.modules_to_save"
    ]


def _untrained_tables(config: AnyTrainConfig, model: PreTrainedModel) -> list[str]:
    """Return the embedding tables, by the last part of their layers' names, that stay frozen."""
    layers = embedding_layers(model)
    if config.train == "full":
        trained = list(layers)
    elif isinstance(config, PretrainConfig) and config.train == "embeddings":
        trained = list(trained_layers(model, config.embeddings))
    else:
        endings = modules_to_save(config)
        trained = [name for name in layers if any(f".{name}".endswith(f".{e}") for e in endings)]
        if trained and is_tied(model):
            return []
    return sorted(name.rpartition(".")[2] for name in layers if name not in trained)


def modules_to_save(config: AnyTrainConfig) -> tuple[str, ...]:
    """Return the name endings of the modules that a run trains whole, beside an adapter."""
    if config.lora is not None:
        return config.lora.modules_to_save
    if config.adapter is None or check_adapter_directory(Path(config.adapter)):
        return ()
    settings = read_json(Path(config.adapter) / "adapter_config.json")
    return tuple(settings.get("modules_to_save") or ())
