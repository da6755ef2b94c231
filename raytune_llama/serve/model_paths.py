"""Pin the models of an endpoint, so that all its replicas serve the same ones."""

from dataclasses import replace
from typing import TypeVar

from raytune_llama.config.errors import UserError
from raytune_llama.config.settings import ConfigError
from raytune_llama.serve.config import ServeConfig, ServedModelConfig
from raytune_llama.storage.directories import pin_directory
from raytune_llama.storage.hub import SCHEME
from raytune_llama.storage.node_cache import list_model_files
from raytune_llama.storage.place import Place, is_url

C = TypeVar("C", bound=ServeConfig)


def pin_models(config: C) -> C:
    """Return a config whose models on the hub are those of one commit; local paths are kept.

    Raises:
        ConfigError: A model in a bucket or on the hub can't be reached, or does not exist.
    """
    problems: list[str] = []
    models: list[ServedModelConfig] = []
    for number, model in enumerate(config.models):
        try:
            pinned = pin_directory(model.path, f"models.{number}.path")
            if is_url(pinned) and not pinned.startswith(SCHEME):
                # This process fetches nothing; the replicas do.
                list_model_files(Place.parse(pinned, "path"), f"models.{number}.path")
        except UserError as error:
            problems.append(str(error))
            continue
        models.append(replace(model, path=pinned) if is_url(pinned) else model)
    if problems:
        raise ConfigError(problems)
    return replace(config, models=tuple(models))
