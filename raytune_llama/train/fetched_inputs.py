"""Fetch the directories that a run's config names to the node that opens them."""

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.storage.directories import fetch_directory
from raytune_llama.storage.place import is_url
from raytune_llama.train.config import AnyTrainConfig


def input_directories(config: AnyTrainConfig) -> dict[str, str | None]:
    """Return the directories of a run's model, tokenizer and adapter by field; None: not set."""
    return {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "adapter": config.adapter,
    }


def find_remote_inputs(config: AnyTrainConfig) -> dict[str, str]:
    """Return the directories of a run that each node fetches, by field."""
    named = input_directories(config).items()
    return {field: text for field, text in named if text is not None and is_url(text)}


def fetch_inputs(config: AnyTrainConfig, *, weights: bool = True) -> None:
    """Fetch the model, the tokenizer and the adapter of a run to this node, unless they are local.

    Args:
        config: config with resolved places.
        weights: whether to fetch weights too; a plan needs none.

    Raises:
        ConfigError: lists what can't be fetched, and why.
    """
    problems: list[str] = []
    for field, text in find_remote_inputs(config).items():
        try:
            fetch_directory(text, field, weights=weights and field != "model.tokenizer")
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
