"""Rows of the embedding tables that were added for new tokens and never trained.

They are counted before a run and recorded in the manifest of its result, so that the next run can
check them.
"""

import logging
from pathlib import Path

from transformers import PreTrainedModel

from raytune_llama.model.adapter_config import read_adapter_config
from raytune_llama.model.embeddings import embedding_layers, trained_layers
from raytune_llama.model.vocab import VocabularyFit, is_tied
from raytune_llama.storage.directories import fetched
from raytune_llama.storage.files import read_manifest
from raytune_llama.train.config import AnyTrainConfig, PretrainConfig

logger = logging.getLogger(__name__)

UNTRAINED_ROWS = "untrained_rows"
"""Manifest key of a model directory: number of untrained rows per embedding table."""


def count_untrained_rows(
    config: AnyTrainConfig, model: PreTrainedModel, num_new_ids: int
) -> dict[str, int]:
    """Return how many rows of each table will still be untrained when a run has ended.

    Args:
        config: config of the run.
        model: base model, with or without weights, before or after training.
        num_new_ids: number of tokenizer ids that the base model's own tokenizer lacks.

    Returns:
        Row counts by the last part of the layer's name; tables without such rows are omitted.
    """
    before = read_untrained_rows(fetched(config.model.path))
    counts = {name: num_new_ids + before.get(name, 0) for name in frozen_tables(config, model)}
    return {name: count for name, count in counts.items() if count}


def read_untrained_rows(path: Path) -> dict[str, int]:
    """Return the number of untrained rows per table that a model directory's manifest records."""
    return dict(read_manifest(path).get(UNTRAINED_ROWS) or {})


def check_untrained_rows(
    config: AnyTrainConfig, model: PreTrainedModel, fit: VocabularyFit
) -> list[str]:
    """Refuse rows that no stage trains; an embedding stage may leave some to the next stage."""
    counts = count_untrained_rows(config, model, fit.num_new_ids)
    if not counts:
        return []
    tables = " and ".join(counts)
    if config.train == "embeddings":
        logger.warning(
            "%s stays frozen, with %s rows of new ids untrained: train it in the next stage "
            "(lora.modules_to_save), or set embeddings.lm_head here",
            tables,
            " and ".join(str(count) for count in counts.values()),
        )
    if config.train == "embeddings" or config.model.allow_untrained_rows:
        return []
    remedy = f"add {', '.join(counts)} to lora.modules_to_save, or set model.allow_untrained_rows"
    if fit.num_new_ids:
        return [
            f"model.tokenizer: it has {fit.num_new_ids} ids that the model was not trained with, "
            f"and the new rows of {tables} would stay as initialized; {remedy}"
        ]
    return [
        f"model.path: the run that made {config.model.path} trained no new row of {tables} "
        f"({', '.join(str(count) for count in counts.values())} rows), and neither would this one; "
        f"{remedy}"
    ]


def check_embedding_rate(config: AnyTrainConfig, model: PreTrainedModel) -> list[str]:
    """Return a problem if `optim.embedding_learning_rate` is set but no table is trained."""
    frozen = frozen_tables(config, model)
    if config.optim.embedding_learning_rate is None or len(frozen) < len(embedding_layers(model)):
        return []
    return [
        f"optim.embedding_learning_rate: got {config.optim.embedding_learning_rate}, but the run "
        f"trains neither {' nor '.join(frozen)}; set it to null, or name one of them in "
        "lora.modules_to_save"
    ]


def frozen_tables(config: AnyTrainConfig, model: PreTrainedModel) -> list[str]:
    """Return the embedding tables that a run does not train, by the last part of their names."""
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
    """Return the name suffixes of the modules that a run trains in full besides an adapter."""
    if config.lora is not None:
        return config.lora.modules_to_save
    if config.adapter is None:
        return ()
    try:
        settings = read_adapter_config(fetched(config.adapter), "adapter")
    except (ValueError, OSError):
        return ()  # reported by the checks before a run
    return tuple(settings.get("modules_to_save") or ())
