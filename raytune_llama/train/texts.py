"""The held-out text of `eval.texts`, on the driver: check it, and encode it into its token store.

What workers do with it is in `inputs.py`, which needs no Ray.
"""

from raytune_llama.config.settings import renamed_fields
from raytune_llama.data.build.preparation import (
    DataInputs,
    open_current_store,
    open_data,
    prepare_data,
)
from raytune_llama.data.store.token_store import TokenStore
from raytune_llama.storage.directories import fetched
from raytune_llama.train.config import AnyTrainConfig
from raytune_llama.train.inputs import text_store_config

FIELD_NAMES = {"data.sources": "eval.texts", "data.store_dir": "eval.store_dir"}
"""Fields of `data` in the messages of a store's builder, and those that the texts have instead."""


def open_texts(config: AnyTrainConfig) -> DataInputs | None:
    """List the files of `eval.texts` and inspect the head of each; None without texts.

    Raises:
        ConfigError: lists every problem, as `open_data` does.
    """
    wanted = text_store_config(config)
    if wanted is None:
        return None
    with renamed_fields(FIELD_NAMES):
        return open_data(wanted, fetched(config.model.tokenizer_path))


def check_text_store(config: AnyTrainConfig, texts: DataInputs | None) -> None:
    """Check the token store of `eval.texts`, if it exists, before Ray starts.

    Raises:
        StoreError: the store is damaged, or was built from other inputs.
    """
    wanted = text_store_config(config)
    if wanted is not None and texts is not None:
        with renamed_fields(FIELD_NAMES):
            open_current_store(wanted, texts)


def prepare_texts(config: AnyTrainConfig, texts: DataInputs | None) -> TokenStore | None:
    """Return the token store of `eval.texts`, and build it if it does not exist; needs Ray.

    Args:
        config: config of the run.
        texts: result of `open_texts` for it.

    Raises:
        ConfigError: `eval.store_dir` holds something else.
        StoreError: the store is damaged, or was built from other inputs.
        SourceError: a file cannot be read as configured, or there is no text.
    """
    wanted = text_store_config(config)
    if wanted is None or texts is None:
        return None
    with renamed_fields(FIELD_NAMES):
        return prepare_data(wanted, texts)
